"""The split of a batch: the optimum of the linear program, the same on every rank, every token served once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from moec.placement import PlacementError, Plan, RoutingStats, prefer, settle, solve, split, topology
from moec.placement.flow import level
from moec.placement.metrics import evenly

from .cases import FOUR_BY_FOUR, halves, random_topk


@st.composite
def placements(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens wanted per slot, expert per slot, GPUs), with empty slots and experts that nobody wants."""
    gpus, room = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    experts = rng.integers(-1, draw(st.integers(1, gpus * room)), gpus * room)
    wanted = rng.integers(0, 40, gpus * room) ** draw(st.integers(0, 2)) * (rng.random(gpus * room) < 0.8)
    return np.where(experts >= 0, wanted, 0), experts, gpus


@given(placements())
def test_the_busiest_gpu_has_the_optimum(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    wanted, experts, gpus = case
    take = level(wanted[None], experts[None], gpus)[0]
    assert (take >= 0).all()
    assert (take[experts < 0] == 0).all()
    assert np.array_equal(per_expert(take, experts), per_expert(wanted, experts))
    assert take.reshape(gpus, -1).sum(axis=1).max() == np.ceil(optimum(wanted, experts, gpus) - 1e-6)


def per_expert(tokens: np.ndarray, experts: np.ndarray) -> np.ndarray:
    return np.bincount(experts + 1, weights=tokens, minlength=experts.max() + 2)[1:]


def optimum(wanted: np.ndarray, experts: np.ndarray, gpus: int) -> float:
    """min M such that sums per expert hold and every GPU has at most M; HiGHS."""
    slots, kinds = len(experts), int(experts.max()) + 1
    held = experts >= 0
    same = np.zeros((kinds, slots + 1))
    same[experts[held], np.flatnonzero(held)] = 1
    load = np.zeros((gpus, slots + 1))
    load[np.arange(slots) // (slots // gpus), np.arange(slots)] = held
    load[:, -1] = -1
    if not kinds:
        return 0.0
    return float(linprog(np.eye(slots + 1)[-1], load, np.zeros(gpus), same, per_expert(wanted, experts)).fun)


@given(placements(), st.sampled_from([0.01, 0.1, 0.5]))
def test_slack_is_a_limit_below_which_nothing_moves(case: tuple[np.ndarray, np.ndarray, int], slack: float) -> None:
    wanted, experts, gpus = case
    take = level(wanted[None], experts[None], gpus, slack)[0]
    load = wanted.reshape(gpus, -1).sum(axis=1)
    limit = max(-(-load.sum() // gpus), int(load.sum() * (1 + slack) / gpus + 1e-9))
    least = np.ceil(optimum(wanted, experts, gpus) - 1e-6)
    assert take.reshape(gpus, -1).sum(axis=1).max() <= max(limit, least)
    if load.max() <= limit:
        assert np.array_equal(take, wanted)


@given(st.lists(placements(), min_size=2, max_size=4))
def test_a_batch_of_problems_is_each_alone(cases: list[tuple[np.ndarray, np.ndarray, int]]) -> None:
    wanted, experts, gpus = cases[0]
    rng = np.random.default_rng(len(wanted))
    many = np.stack([np.where(experts >= 0, rng.permutation(wanted), 0) for _ in cases])
    together = level(many, np.tile(experts, (len(cases), 1)), gpus)
    alone = np.concatenate([level(row[None], experts[None], gpus) for row in many])
    tops = [take.reshape(len(cases), gpus, -1).sum(axis=2).max(axis=1) for take in (together, alone)]
    assert np.array_equal(*tops)


def plan_of(seed: int, experts: int = 12, slots: int = 3) -> tuple[Plan, np.ndarray]:
    topk = random_topk(1, 300, 3, experts, seed)
    cluster = topology("h100", nodes=2, gpus_per_node=3)
    return solve(RoutingStats.from_topk(topk, experts), cluster, slots), topk[0]


@given(st.integers(0, 500), st.sampled_from([0, 1, 50, 300]), st.sampled_from([0.0, 0.05]))
def test_every_token_is_served_by_its_expert(seed: int, tokens: int, slack: float) -> None:
    """The protocol of docs/placement.md, rank by rank, with dropped slots (-1) and ranks without tokens."""
    plan, topk = plan_of(seed % 20)
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(np.where(rng.random((tokens, 3)) < 0.1, -1, topk[:tokens]))
    home = torch.from_numpy(rng.integers(0, 4, tokens))  # ranks 4 and 5 get no tokens
    tables = plan.tables(0, max_copies=8)
    slots = len(tables.expert_of)
    wanted = [prefer(tables, ids[home == r], home[home == r]) for r in range(6)]
    demand = np.stack([torch.bincount(w[w >= 0], minlength=slots).numpy() for w in wanted])
    quota = split(tables, demand, slack)
    assert (quota >= 0).all()
    for rank in range(6):
        mine = ids[home == rank]
        found = settle(tables, mine, wanted[rank], torch.from_numpy(quota[rank]))
        assert torch.equal(found >= 0, mine >= 0)
        assert torch.equal(tables.expert_of[found[found >= 0]], mine[mine >= 0])
        assert np.array_equal(torch.bincount(found[found >= 0], minlength=slots).numpy(), quota[rank])


def test_every_rank_computes_the_same() -> None:
    plan, topk = plan_of(3)
    demand = np.random.default_rng(0).integers(0, 50, (6, plan.physical_to_logical.shape[1]))
    first = split(plan.tables(0), demand)
    assert all(np.array_equal(first, split(plan.tables(0), demand.copy())) for _ in range(3))
    assert first.dtype == np.int64


def test_a_token_prefers_home_then_nodes_it_visits() -> None:
    """Experts 0 and 1 have copies on both nodes, 2 only on node 1."""
    slots = np.array([[0, 1, 2, 0, 1, -1]])
    plan = Plan(slots, 3, np.array([0, 0, 1]))
    tables = plan.tables(0)
    at = lambda ids, gpu: tables.gpu_of[prefer(tables, torch.tensor([ids]), torch.tensor([gpu]))[0]].tolist()  # noqa: E731
    assert at([0], 0) == [0]
    assert at([0], 1) == [1]
    assert at([1], 1) == [0]  # its node before the other one
    assert at([1], 2) == [2]
    assert at([2, 1], 0) == [1, 0]


def test_wanting_an_empty_slot() -> None:
    plan = Plan(np.array([[0, -1, 0, -1]]), 1, np.array([0, 0]))
    with pytest.raises(PlacementError, match="holds no expert"):
        split(plan.tables(0), np.ones((2, 4), dtype=np.int64))


def test_evenly_takes_copies_in_turn() -> None:
    plan = Plan(np.array([[0, 1, 0, 1, 0, 2]]), 3, np.array([0, 0, 0]), split="even")
    slots = evenly(plan.tables(0), torch.tensor([[0, 1], [0, 2], [0, -1], [0, 1]]))
    assert slots.tolist() == [[0, 1], [2, 5], [4, -1], [0, 3]]


def test_prefer_and_settle_compile_into_one_graph() -> None:
    plan, topk = plan_of(5)
    tables = plan.tables(0, max_copies=6)
    ids, home = torch.from_numpy(topk[:32].copy()), torch.arange(32) % 6
    quota = torch.bincount(prefer(tables, ids, home).reshape(-1), minlength=len(tables.expert_of))

    def both(ids: torch.Tensor, home: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        return settle(tables, ids, prefer(tables, ids, home), quota)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, home, quota), both(ids, home, quota))


def test_batches_are_split_one_by_one() -> None:
    first, second = halves("law")
    plan = solve(RoutingStats.from_topk(first[:2], 64), FOUR_BY_FOUR, 6, traffic=0)
    even, flow = (plan.evaluate(second[:2, :1024], batch=256, split=s) for s in ("even", "flow"))
    assert flow.imbalance < even.imbalance
    assert flow.imbalance_p50 <= flow.imbalance_p95 <= flow.imbalance_max
