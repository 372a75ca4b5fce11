"""Checkpoints under logical names, and plans that change while a model trains."""

from pathlib import Path

import pytest
import torch

from .. import hf
from . import cases, ranks

pytest.importorskip("transformers")


@pytest.mark.parametrize(("name", "dispatcher"), [("mixtral", "all-to-all")])
def test_life(name: str, dispatcher: str, tmp_path: Path) -> None:
    """Two ranks train and rebalance and save; four ranks and one process read."""
    path = str(tmp_path / "checkpoint")
    first, second = ranks.run(2, cases.life, name=name, path=path, dispatcher=dispatcher)
    whole = first["whole"]
    assert first["sent"] + second["sent"] > 0
    ranks.run(4, cases.resume, name=name, path=path, plan="copies", whole=whole)
    model = hf.build(name, seed=9)
    state = model.state_dict()
    torch.distributed.checkpoint.load(state, checkpoint_id=path)
    for key, value in model.state_dict().items():
        assert (value.numpy() == whole[key]).all(), key
