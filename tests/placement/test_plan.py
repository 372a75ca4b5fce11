"""Tables of a plan, moves between plans, names kept, the command line and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moec.placement import PlacementError, Plan, RoutingStats, heat_map, relabel, solve, topology
from moec.placement.naming import INTER, assign

from .cases import random_topk

TWO_NODES = np.array([0, 0, 1, 1])
CLUSTERS = [((0, 0, 1, 1), 2, 6), ((0, 0, 0, 1), 2, 8), ((0, 1, 2), 3, 7), ((0, 0, 0), 2, 5)]  # nodes, room, experts


def test_tables_by_hand() -> None:
    plan = Plan(np.array([[2, 0, 1, -1, 0, 2, -1, -1]]), 3, TWO_NODES)
    assert plan.logical_to_physical.tolist() == [[[1, 4], [2, -1], [0, 5]]]
    assert plan.replica_count.tolist() == [[2, 1, 2]]
    assert plan.fractions.tolist() == [[0.5, 0.5, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0]]
    assert (plan.slots_per_gpu, plan.num_gpus, plan.num_nodes, plan.num_layers) == (2, 4, 2, 1)
    assert plan.tables(0, max_copies=3).copies_of.tolist() == [[1, 4, -1], [2, -1, -1], [0, 5, -1]]
    with pytest.raises(PlacementError, match="more than max_copies=1"):
        plan.tables(0, max_copies=1)


def test_diff_by_hand() -> None:
    """GPU 0 gets 1, which lies on GPU 1 of its node; GPU 3 gets 0, which no GPU of its node has; order in a GPU is no move."""
    old = Plan(np.array([[0, 2, 1, 3, 2, 3, 3, 1]]), 4, TWO_NODES)
    new = Plan(np.array([[1, 0, 3, 1, 3, 2, 3, 0]]), 4, TWO_NODES)
    moves = old.diff(new, bytes_per_expert=10)
    assert (moves.intra, moves.inter, moves.slots, moves.bytes) == (1, 1, 2, 20)
    with pytest.raises(PlacementError, match="differ in GPUs by node"):
        old.diff(Plan(new.physical_to_logical, 4, np.array([0, 1, 0, 1])))
    with pytest.raises(PlacementError, match="differ in experts: 4 and 5"):
        old.diff(Plan(np.array([[0, 1, 2, 3, 4, 0, 1, 2]]), 5, TWO_NODES))


def plan_at_random(seed: int, nodes: np.ndarray, room: int, experts: int) -> Plan:
    rng = np.random.default_rng(seed)
    gpus = len(nodes)
    held = rng.permutation(experts)[np.arange(gpus * room) % experts].reshape(gpus, room)
    return Plan(rng.permutation(held).reshape(1, -1), experts, nodes)


@given(
    st.integers(0, 10_000),
    st.sampled_from(CLUSTERS),
)
def test_relabel_moves_least_of_all_names(seed: int, size: tuple[tuple[int, ...], int, int]) -> None:
    nodes, room, experts = np.array(size[0]), size[1], size[2]
    old, new = plan_at_random(seed, nodes, room, experts), plan_at_random(seed + 1, nodes, room, experts)
    named = relabel(new, old)
    cost = lambda plan: old.diff(plan).intra + INTER * old.diff(plan).inter  # noqa: E731
    gpus = new.physical_to_logical.reshape(len(nodes), room)
    best = min(
        cost(Plan(gpus[list(order)].reshape(1, -1), experts, nodes))
        for order in permutations(range(len(nodes)))
        if len({(a, b) for a, b in zip(nodes, nodes[list(order)])}) == len(set(nodes))  # nodes stay whole
    )
    assert cost(named) == best
    stays = (named.physical_to_logical == old.physical_to_logical).sum()
    assert stays == room * len(nodes) - old.diff(named).slots - (named.physical_to_logical < 0).sum()


@given(st.integers(0, 10_000), st.integers(1, 7))
def test_assignment_against_scipy(seed: int, n: int) -> None:
    costs = np.random.default_rng(seed).integers(0, 9, (5, n, n)).astype(float)
    for cost, columns in zip(costs, assign(costs)):
        assert sorted(columns) == list(range(n))
        assert cost[np.arange(n), columns].sum() == cost[linear_sum_assignment(cost)].sum()


def test_evaluate_by_hand() -> None:
    """Experts 0, 1 on node 0, 2, 3 on node 1, one per GPU; two tokens at GPU 0: one send to node 1; the loads are 2, 1, 0, 1."""
    plan = Plan(np.array([[0, 1, 2, 3]]), 4, TWO_NODES)
    found = plan.evaluate(np.array([[[0, 1], [0, 3]]]), home_T=np.array([0, 0]))
    assert (found.imbalance, found.imbalance_total) == (2.0, 2.0)
    assert (found.remote_node_sends, found.remote_gpu_sends) == (0.5, 1.0)
    assert plan.evaluate(np.array([[[-1, -1]]])).remote_node_sends == 0
    for wrong in (np.zeros((2, 3, 1)), np.full((1, 1, 1), 4), np.zeros((1, 0, 2))):
        with pytest.raises(PlacementError, match="the plan is for 1 layers and 4 experts"):
            plan.evaluate(wrong.astype(int))


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moec.cli", "place", *map(str, args)], capture_output=True, text=True)


def test_command_line(tmp_path: Path) -> None:
    stats = RoutingStats.from_topk(random_topk(2, 2000, 3, 16, 0), 16)
    stats.save(tmp_path / "stats.npz")
    size = ["--nodes", 2, "--gpus", 2, "--slots", 5]
    done = run(tmp_path / "stats.npz", *size, "--out", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "2 layers x 16 experts on 2 nodes, 4 GPUs x 5 slots" in done.stdout
    assert "grouped" in done.stdout
    assert "eplb" in done.stdout
    ours = solve(stats, topology("h100", nodes=2, gpus_per_node=2), 5)
    assert np.array_equal(Plan.load(tmp_path / "plan.json").physical_to_logical, ours.physical_to_logical)

    again = run(tmp_path / "stats.npz", *size, "--current", tmp_path / "plan.json", "--json", "--traffic", 0)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert set(summary["plans"]) == {"balanced", "eplb"}
    assert summary["note"].startswith("traffic=0")
    assert set(summary["moves"]) == {"intra", "inter", "bytes"}

    wrong = run(tmp_path / "plan.json", *size)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("moec place: ")
    assert "has format 'moec.placement_plan'; expected 'moec.routing_stats'" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stats = RoutingStats.from_topk(random_topk(2, 500, 3, 16, 0), 16)
    plan = solve(stats, topology("h100", nodes=2, gpus_per_node=2), 5)
    heat_map(plan, stats, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlacementError, match="pass those of one model"):
        heat_map(plan, RoutingStats.from_topk(random_topk(3, 50, 3, 16, 0), 16), tmp_path / "plan.png")
