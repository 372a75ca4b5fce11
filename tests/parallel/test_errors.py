"""What cannot be is said on every rank, before anything is changed; nothing hangs."""

import re
from pathlib import Path

import pytest

from . import cases, ranks

REFUSED = {
    "corrupt plan": "damaged or no moec.placement_plan file",
    "corrupt on one rank": "damaged or no moec.placement_plan file",
    "other E": r"the plan is for 6 experts, experts has 8",
    "other L": "the plan has 3 layers, the model 1 with experts",
    "other GPUs": "the plan is for 4 GPUs, the mesh has 2 ranks",
    "different plans": "ranks 0 and 1 of the mesh differ",
    "no plan": "not dict",
    "no mesh": "mesh is a DeviceMesh of one dimension, not ProcessGroup",
    "compiled": "the model is compiled already",
    "twice": "parallelized already",
    "dispatcher": "dispatcher is one of 'all-gather', 'all-to-all', or None; not 'pigeons'",
    "tokens": "at least 1, not 0",
    "no inputs": "pass inputs that it runs on, as args= or kwargs=",
    "wrong inputs": "could not be traced to find its experts",
    "tied": "tied experts are not handled",
    "read elsewhere": "is read outside its layer of experts too, by square",
    "flat": "its first dim is not that of the 4 experts|computed by `view`",
    "none": "no layer of experts was found",
    "not a sum": "was not recognized, so nothing was changed",
}

MISUSED = {
    "eager": r"^ParallelError: .*this call is not compiled with moec",
    "another backend": r"^ParallelError: .*this call is not compiled with moec",
    "a part with another backend": "this run is not moec's",
    "a break in the loop": "code that reads them runs without being traced",
    "switched off": "^NotSpread: .*moec is switched off",
    "rebalance: other E": "the plan is for 6 experts",
    "rebalance: other slots": "the plan has 12 slots",
    "rebalance: different": "ranks 0 and 1 of the mesh differ",
    "rebalance: none": "needs a plan",
    "rebalance: other model": "was not parallelized",
    "state: missing": "the state lacks",
    "explain": r"1 of 1 MoE sites rewritten(?s:.*), all-gather over 2 ranks",
    "reduction": "reduction is one of 'mean', 'sum', not 'max'",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    path.write_bytes(b"PK\x03\x04 nothing that a plan would hold")
    for name, message in ranks.run(2, cases.refused, what=what, path=str(path)):
        assert name in ("ParallelError", "PlacementError"), (name, message)
        assert re.search(REFUSED[what], message), message


def test_misused() -> None:
    for found in ranks.run(2, cases.misused):
        assert found.keys() == MISUSED.keys()
        for what, message in found.items():
            assert re.search(MISUSED[what], message), (what, message)
