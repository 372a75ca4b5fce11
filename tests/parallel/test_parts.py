"""The pieces, in one process: the ops, the routes of a rebalance, the plans, the cost model."""

import numpy as np
import pytest
import torch

import moec.kernels
from moec.ops import reference
from moec.parallel.entry import _in_order
from moec.parallel.local import copies_of, dropped, shared_of
from moec.parallel.moves import routes
from moec.passes.dispatchers import AllGather, AllToAll, Traffic, cheapest

ops = torch.ops.moec


def test_copies_are_taken_in_turn() -> None:
    copies = torch.tensor([[3, -1], [0, 4], [1, -1]])
    ids = torch.tensor([[1, 0], [1, 2], [1, -1], [3, 1]])
    assert ops.assign(ids, copies, 0).tolist() == [[0, 3], [4, 1], [0, -1], [-1, 4]]
    assert ops.assign(ids, copies, 1).tolist() == [[4, 3], [0, 1], [4, -1], [-1, 0]]


def test_a_token_visits_a_rank_once() -> None:
    slots = torch.tensor([[0, 1], [5, 2], [-1, -1], [3, -1]])
    assert ops.visits(slots, 2, 3).tolist() == [[0, 3, 3], [3, 1, 2], [3, 3, 3], [3, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_rows_are_padded_and_trimmed(dtype: torch.dtype) -> None:
    x = torch.arange(6).view(3, 2).to(dtype)
    assert ops.pad_rows(x, 5, -1).tolist() == [*x.tolist(), [-1, -1], [-1, -1]]
    assert torch.equal(ops.trim_rows(ops.pad_rows(x, 5), 3), x)
    with pytest.raises(ValueError, match="3 rows do not fit in 2"):
        ops.pad_rows(x, 2)
    with pytest.raises(ValueError, match="4 of 3 rows"):
        ops.trim_rows(x, 4)


def test_padding_and_trimming_are_differentiable() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.pad_rows(x, 5), x)
    assert torch.autograd.gradcheck(lambda x: ops.trim_rows(x, 2), x)


def test_the_tail_may_be_left_out() -> None:
    """An order without its tail: what `combine` and `dispatch` give is the same, in the kernel and in the reference."""
    ids = torch.tensor([[2, -1], [0, 5], [-1, -1], [2, 1]])
    order, inverse, offsets = ops.route(ids, 3)
    short = order[: int(offsets[-1])]
    x = torch.randn(4, 5, dtype=torch.float64)
    whole, rows = ops.dispatch(x, order, inverse, offsets, 2), ops.dispatch(x, short, inverse, offsets, 2)
    assert torch.equal(rows, whole[: len(short)])
    for combine in (ops.combine, reference.combine):
        assert torch.equal(combine(rows, short, inverse, offsets, 2), combine(whole, order, inverse, offsets, 2))


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (7, 2), (3, 4), (1, 1), (10, 4)])
def test_experts_in_order(experts: int, ranks: int) -> None:
    slots = _in_order(experts, ranks)
    assert sorted(slots[slots >= 0].tolist()) == list(range(experts))
    counts = (slots.reshape(ranks, -1) >= 0).sum(1)
    assert counts.max() - counts.min() <= 1


def test_tables() -> None:
    slots = np.array([0, 1, 2, 1, -1, 2])
    assert copies_of(slots, 3, 3).tolist() == [[0, -1, -1], [1, 3, -1], [2, 5, -1]]
    assert [shared_of(slots, 3, 3, rank, 3).tolist() for rank in range(3)] == [[3, 0], [1, 0], [3, 1]]


def test_tables_survive_what_empties_buffers() -> None:
    from moec.parallel.local import Tables

    tables = Tables(np.array([[1, -1], [0, 2]]), np.array([1, 0]), 3, torch.device("cpu"))
    tables.to("meta").to_empty(device="cpu")
    assert (tables.copies.tolist(), tables.shared.tolist()) == ([[1, -1], [0, 2]], [1, 0])
    tables.show(np.array([[0, -1], [1, 2]]), np.array([0, 0]))
    assert tables.half().copies.tolist() == [[0, -1], [1, 2]]


def test_routes_stay_at_home_where_they_can() -> None:
    old, new = np.array([[0, 1], [2, 1]]), np.array([[1, 2], [1, 0]])
    found = routes(old, new)
    assert found[0][0] == [(1, 0)]
    assert found[1][1] == [(1, 0)]
    assert found[1][0] == [(0, 1)]
    assert found[0][1] == [(0, 1)]


def test_few_tokens_are_gathered_and_many_ranks_are_not() -> None:
    """Gathering saves an exchange of counts; sending to the ranks that are visited saves bytes."""
    assert isinstance(cheapest(Traffic(tokens=1, top_k=8, ranks=2, width=64, itemsize=2)), AllGather)
    assert isinstance(cheapest(Traffic(tokens=4096, top_k=8, ranks=64, width=7168, itemsize=2)), AllToAll)


def test_a_dropped_parameter_keeps_its_shape() -> None:
    from moec.parallel.local import drop

    p = torch.nn.Parameter(torch.randn(4, 5))
    drop(p)
    assert dropped(p)
    assert tuple(p.shape) == (4, 5)
    assert bool(p.isnan().all())
    assert p.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError, match="more than one element"), torch.no_grad():
        p.copy_(torch.zeros(4, 5))


assert moec.kernels
