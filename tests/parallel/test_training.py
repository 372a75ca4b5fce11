"""Experts on ranks: logits, loss and every gradient are those of one process with all tokens."""

import pytest

from . import cases, ranks

pytest.importorskip("transformers")


ONE = {"num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("name", "plan", "dispatcher", "changes"),
    [
        ("mixtral", None, "all-gather", {}),
        ("qwen3_moe", "random", "all-to-all", {}),
        ("deepseek_v3", "copies", "all-gather", {"num_hidden_layers": 2}),
        ("mixtral", "copies", "all-to-all", ONE),
    ],
)
def test_two_ranks(name: str, plan: str | None, dispatcher: str, changes: dict[str, int]) -> None:
    for found in ranks.run(
        2, cases.train, name=name, batches=[2, 1], plan=plan, dispatcher=dispatcher, changes=changes
    ):
        ran, layers = found["ran"], len(found["shares"])
        if dispatcher == "all-gather":
            assert ran["all_gather_into_tensor"] >= 3 * layers, ran  # slots, tokens, weights
            assert ran["reduce_scatter_tensor"] >= layers, ran
        else:
            assert ran["all_to_all_single"] >= 5 * layers, ran
        assert ("all_reduce" in ran) == (plan == "copies"), ran
        assert all(share == (0.75 if plan == "copies" else 0.5) for share in found["shares"].values()), found


def test_under_inductor() -> None:
    ranks.run(2, cases.train, name="qwen3_moe", batches=[1, 2], dispatcher="all-gather", inner="inductor", changes=ONE)


def test_four_ranks_of_which_two_share_their_experts() -> None:
    """A mesh ("dp", "ep") of two by two; uneven batches, 7 experts."""
    changes = {"num_local_experts": 7, **ONE}
    found = ranks.run(4, cases.train, name="mixtral", batches=[1, 2, 1, 1], plan="random", dp=True, changes=changes)
    assert all(share == pytest.approx(4 / 7) for f in found for share in f["shares"].values()), found


def test_four_ranks() -> None:
    found = ranks.run(
        4,
        cases.train,
        name="qwen3_moe",
        batches=[2, 1, 1, 3],
        plan="copies",
        dispatcher="all-to-all",
        dtype="bfloat16",
        changes=ONE,
    )
    assert all(share == 0.5 for f in found for share in f["shares"].values()), found


def test_with_ddp() -> None:
    """DDP averages what is replicated, and leaves the experts alone."""
    for found in ranks.run(2, cases.train, name="mixtral", batches=[2, 2], ddp=True, changes=ONE):
        assert list(found["shares"].values()) == [0.5]
