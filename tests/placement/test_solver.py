"""Plans of any size hold what they promise, the gates of docs/placement.md, and the bounds against an exact solver."""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moec.placement import PlacementError, RoutingStats, eplb, linear, random, solve, topology
from moec.placement.balance import EMPTY, first_fit, improve, polish
from moec.placement.bounds import lower_bound
from moec.placement.grouping import group

from .cases import FOUR_BY_FOUR, halves, random_topk, requests


@given(requests())
def test_any_plan_is_sound(request_: tuple[RoutingStats, int, int, int, float]) -> None:
    """Plan itself checks that every expert is there, and never twice on a GPU; here: room is used, the same comes out again."""
    stats, nodes, gpus, slots, traffic = request_
    cluster = topology("h100", nodes=nodes, gpus_per_node=gpus)
    plan = solve(stats, cluster, slots, traffic=traffic)
    assert plan.physical_to_logical.shape == (stats.num_layers, nodes * gpus * slots)
    assert (plan.replica_count >= 1).all()
    assert not len(plan.duplicates)
    empty = (plan.physical_to_logical < 0).sum(axis=1)
    assert (empty == max(0, nodes * gpus * (slots - stats.num_experts))).all()
    again = solve(stats, cluster, slots, traffic=traffic)
    assert np.array_equal(plan.physical_to_logical, again.physical_to_logical)
    assert plan.predicted is not None
    assert (plan.predicted.imbalance >= plan.predicted.bound - 1e-9).all()


@given(requests())
def test_from_itself_nothing_moves(request_: tuple[RoutingStats, int, int, int, float]) -> None:
    stats, nodes, gpus, slots, traffic = request_
    cluster = topology("h100", nodes=nodes, gpus_per_node=gpus)
    plan = solve(stats, cluster, slots, traffic=traffic)
    again = solve(stats, cluster, slots, current=plan, traffic=traffic)
    assert plan.diff(again).slots == 0
    assert np.array_equal(plan.physical_to_logical, again.physical_to_logical)


def test_too_few_slots() -> None:
    stats = RoutingStats.from_topk(random_topk(1, 9, 2, 9, 0), 9)
    with pytest.raises(PlacementError, match="9 experts in 4 GPUs x 2 slots; at least 3 slots"):
        solve(stats, topology("flat", gpus_per_node=4), 2)
    with pytest.raises(PlacementError, match="traffic=1.5"):
        solve(stats, topology("flat", gpus_per_node=4), 3, traffic=1.5)


def test_thin_statistics_are_balanced_plainly_and_say_so() -> None:
    few, many = (RoutingStats.from_topk(random_topk(1, n, 4, 32, 0), 32) for n in (20, 4000))
    assert "statistics are thin: layer 0" in solve(few, FOUR_BY_FOUR, 3).note
    assert solve(few, FOUR_BY_FOUR, 3).method == "balanced"
    assert (solve(many, FOUR_BY_FOUR, 3).method, solve(many, FOUR_BY_FOUR, 3).note) == ("grouped", "")
    assert "one node" in solve(many, topology("flat", gpus_per_node=16), 3).note


def test_one_visit_does_not_win_every_copy() -> None:
    stats = RoutingStats.from_topk(np.array([[[0]]]), 8)
    assert solve(stats, topology("flat", gpus_per_node=4), 3).replica_count[0, 0] == 3


def test_nodes_of_different_size() -> None:
    graph = nx.Graph()
    for gpu in range(6):
        graph.add_node(gpu, kind="gpu")
        graph.add_edge(gpu, "big" if gpu < 4 else "small", bandwidth=400e9, latency=1e-6)
    graph.add_edge("big", "small", bandwidth=50e9, latency=5e-6)
    stats = RoutingStats.from_topk(random_topk(2, 2000, 3, 16, 1), 16)
    plan = solve(stats, topology(graph), 3)
    assert plan.node_of_gpu.tolist() == [0, 0, 0, 0, 1, 1]
    assert plan.method == "grouped"
    load = plan.fractions * np.take_along_axis(stats.loads(), plan.physical_to_logical, axis=1)
    share = load[:, :12].sum(axis=1) / load.sum(axis=1)
    assert np.allclose(share, 4 / 6, atol=0.05)


@pytest.mark.parametrize("domain", ["intent", "law"])
def test_gate_fewer_sends_than_eplb(domain: str) -> None:
    first, second = halves(domain)
    stats = RoutingStats.from_topk(first, 64)
    ours, base = solve(stats, FOUR_BY_FOUR, 5).evaluate(second), eplb(stats, FOUR_BY_FOUR, 5).evaluate(second)
    assert ours.remote_node_sends <= 0.8 * base.remote_node_sends
    assert ours.imbalance <= base.imbalance + 0.02


@pytest.mark.parametrize("domain", ["intent", "law"])
def test_gate_balance(domain: str) -> None:
    first, second = halves(domain)
    plan = solve(RoutingStats.from_topk(first, 64), FOUR_BY_FOUR, 6, traffic=0)
    assert plan.evaluate(second).imbalance <= 1.02


@pytest.mark.parametrize("domain", ["intent", "law"])
@pytest.mark.parametrize("nodes", [2, 4])
def test_gate_bound_without_replicas(domain: str, nodes: int) -> None:
    stats = RoutingStats.from_topk(halves(domain)[0], 64)
    plan = solve(stats, topology("h100", nodes=nodes, gpus_per_node=4), 16 // nodes, traffic=0)
    assert plan.predicted is not None
    assert plan.predicted.gap.max() <= 0.005


@given(st.integers(0, 10_000), st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2), (3, 3)]))
def test_bound_and_solver_against_exact(seed: int, size: tuple[int, int]) -> None:
    """The bound is below the proven optimum; the solver without replicas is within 0.5 % of it."""
    gpus, room = size
    rng = np.random.default_rng(seed)
    loads = np.sort(rng.lognormal(4, 1.2, gpus * room).astype(int) + 1)[::-1]
    best = exact(loads, gpus, room)
    mean = loads.sum() / gpus
    assert lower_bound(loads[None].astype(float), gpus, room)[0] <= best / mean + 1e-9
    counts = loads[None, None].copy()
    stats = RoutingStats(
        counts, np.zeros((1, gpus * room, gpus * room), dtype=np.int64), np.zeros(1, dtype=np.int64), ("w",)
    )
    plan = solve(stats, topology("flat", gpus_per_node=gpus), room)
    assert plan.predicted is not None
    assert plan.predicted.imbalance[0] <= best / mean * 1.005


def exact(loads: np.ndarray, gpus: int, room: int) -> float:
    """The least load of the busiest GPU, by HiGHS: x[e, g] is 1 where e lies on g, the last variable is the load."""
    experts = len(loads)
    one_place = np.kron(np.eye(experts), np.ones(gpus))
    full = np.kron(np.ones(experts), np.eye(gpus))
    load = np.kron(loads, np.eye(gpus))
    pad = np.zeros((1, 1))
    rows = np.block(
        [
            [one_place, np.broadcast_to(pad, (experts, 1))],
            [full, np.broadcast_to(pad, (gpus, 1))],
            [load, -np.ones((gpus, 1))],
        ]
    )
    low = np.concatenate([np.ones(experts), np.full(gpus, room), np.full(gpus, -np.inf)])
    high = np.concatenate([np.ones(experts), np.full(gpus, room), np.zeros(gpus)])
    found = milp(
        np.eye(rows.shape[1])[-1],
        constraints=LinearConstraint(rows, low, high),
        bounds=Bounds(0, np.append(np.ones(experts * gpus), np.inf)),
        integrality=np.append(np.ones(experts * gpus), 0),
        options={"mip_rel_gap": 0},
    )
    return float(found.fun)


@given(st.integers(0, 10_000))
def test_grouping_against_all_partitions(seed: int) -> None:
    """Eight experts on two nodes without a limit on loads: no exchange of one pair is left that keeps more."""
    rng = np.random.default_rng(seed)
    topk = np.argsort(rng.random((1, 60, 8)), axis=2)[:, :, :3]
    together = RoutingStats.from_topk(topk, 8).coactivation
    node = group(np.ones((1, 8)), together, np.array([4, 4]), np.array([0.5, 0.5]), slack=1.0)[0]
    kept = lambda a: sum(together[0, i, j] for side in (a, set(range(8)) - a) for i, j in combinations(sorted(side), 2))  # noqa: E731
    found = set(np.flatnonzero(node == node[0]).tolist())
    assert len(found) == 4
    assert all(kept(found) >= kept((found - {i}) | {j}) for i in found for j in set(range(8)) - found)


def test_grouping_respects_the_limit() -> None:
    stats = RoutingStats.from_topk(halves("law")[0][:4], 64)
    for slack in (0.0, 0.05, 0.3):
        node = group(stats.loads(), stats.coactivation, np.full(4, 16), np.full(4, 0.25), slack)
        load = np.stack([np.bincount(n, w, minlength=4) for n, w in zip(node, stats.loads())])
        start = group(stats.loads(), np.zeros((4, 64, 64)), np.full(4, 16), np.full(4, 0.25), slack)
        packed = np.stack([np.bincount(n, w, minlength=4) for n, w in zip(start, stats.loads())])
        assert (load.max(axis=1) <= np.maximum(packed.max(axis=1), load.mean(axis=1) * (1 + slack)) + 1e-6).all()


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 4))
def test_no_two_copies_on_a_bin_even_when_cornered(seed: int, bins: int, room: int) -> None:
    """Items of few experts, as many copies as bins allow: first_fit must part what longest-first runs into."""
    rng = np.random.default_rng(seed)
    copies = rng.integers(1, bins + 1, size=bins * room)
    experts = np.repeat(np.arange(len(copies)), copies)[: bins * room]
    experts[rng.random(len(experts)) < 0.1] = EMPTY
    weights = rng.random((2, 1, len(experts)))
    items = first_fit(experts[None], weights, bins)
    better = improve(items, experts[None], weights, 16)
    for found in (items[0], better[0]):
        assert sorted(found.reshape(-1)) == list(range(bins * room))
        held = [[e for e in experts[row] if e != EMPTY] for row in found]
        assert all(len(set(row)) == len(row) for row in held)
    squares = [
        float((np.take_along_axis(w[:, None], i, axis=2).sum(2) ** 2).sum()) for i in (items, better) for w in weights
    ]
    assert squares[2] + squares[3] <= squares[0] + squares[1] + 1e-9


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 9))
def test_polish_never_worsens(seed: int, bins: int, room: int) -> None:
    weights = np.random.default_rng(seed).lognormal(0, 1, (1, bins * room))
    items = np.random.default_rng(seed + 1).permutation(bins * room).reshape(1, bins, room)
    better = polish(items, weights)
    top = [np.take_along_axis(weights[:, None], i, axis=2).sum(2).max() for i in (items, better)]
    assert sorted(better.reshape(-1)) == list(range(bins * room))
    assert top[1] <= top[0] + 1e-9


def test_baselines() -> None:
    stats = RoutingStats.from_topk(halves("law")[0], 64)
    plans = [make(stats, FOUR_BY_FOUR, 5) for make in (linear, random, eplb)]
    assert [plan.method for plan in plans] == ["linear", "random", "eplb"]
    imbalances = [plan.predicted.imbalance.mean() for plan in plans if plan.predicted]
    assert imbalances[2] < 1.1 < min(imbalances[:2])
