"""Experts on ranks: logits, loss and every gradient are those of one process with all tokens."""

import pytest

from . import cases, ranks

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "plan", "dispatcher"),
    [
        ("mixtral", None, "all-gather"),
        ("qwen3_moe", "random", "all-to-all"),
        ("deepseek_v3", "copies", "all-gather"),
        ("mixtral", "copies", "all-to-all"),
    ],
)
def test_two_ranks(name: str, plan: str | None, dispatcher: str) -> None:
    for found in ranks.run(2, cases.train, name=name, batches=[2, 1], plan=plan, dispatcher=dispatcher):
        ran = found["ran"]
        if dispatcher == "all-gather":
            assert ran["all_gather_into_tensor"] >= 6, ran  # slots, tokens, weights of two layers, and their way back
            assert ran["reduce_scatter_tensor"] >= 4, ran
        else:
            assert ran["all_to_all_single"] >= 14, ran
        assert ("all_reduce" in ran) == (plan == "copies"), ran
        assert all(share == (0.75 if plan == "copies" else 0.5) for share in found["shares"].values()), found
