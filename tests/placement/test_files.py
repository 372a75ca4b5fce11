"""Statistics and plans on disk: what is written comes back, and what is damaged or for another model is an error that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moec.errors import MoecError
from moec.placement import PlacementError, Plan, RoutingStats, solve, topology

from .cases import random_topk

CLUSTER = topology("h100", nodes=2, gpus_per_node=2)
SUFFIXES = pytest.mark.parametrize("suffix", [".npz", ".json"])


@pytest.fixture
def stats() -> RoutingStats:
    return RoutingStats.from_topk(random_topk(3, 300, 3, 10, 0), 10, windows=2, model="a-model")


@pytest.fixture
def plan(stats: RoutingStats) -> Plan:
    return solve(stats, CLUSTER, 4)


def rewritten(path: Path, **change: object) -> Path:
    """The file at path with fields replaced, or removed where None."""
    with np.load(path, allow_pickle=False) as archive:
        fields = {key: archive[key] for key in archive.files} | change
    np.savez(path, **{key: np.asarray(value) for key, value in fields.items() if value is not None})
    return path


@SUFFIXES
def test_statistics_come_back(stats: RoutingStats, suffix: str, tmp_path: Path) -> None:
    stats.save(tmp_path / f"stats{suffix}")
    back = RoutingStats.load(tmp_path / f"stats{suffix}")
    assert np.array_equal(back.counts, stats.counts)
    assert np.array_equal(back.coactivation, stats.coactivation)
    assert np.array_equal(back.tokens, stats.tokens)
    assert (back.windows, back.model) == (("window0", "window1"), "a-model")
    assert [p.name for p in tmp_path.iterdir()] == [f"stats{suffix}"]


@SUFFIXES
@pytest.mark.parametrize("by_hand", [False, True])
def test_plans_come_back(plan: Plan, suffix: str, by_hand: bool, tmp_path: Path) -> None:
    plan = replace(plan, predicted=None) if by_hand else plan
    plan.save(tmp_path / f"plan{suffix}")
    back = Plan.load(tmp_path / f"plan{suffix}", num_experts=10, num_layers=3)
    for name in ("physical_to_logical", "node_of_gpu", "fractions"):
        assert np.array_equal(getattr(back, name), getattr(plan, name))
    for name in ("num_experts", "split", "slack", "method", "note", "window", "model"):
        assert getattr(back, name) == getattr(plan, name)
    assert back.window == "window0..window1"
    if plan.predicted is None:
        assert back.predicted is None
    else:
        assert back.predicted is not None
        assert np.array_equal(back.predicted.gap, plan.predicted.gap)


def test_another_suffix(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"end in \.npz or \.json"):
        plan.save(tmp_path / "plan.pt")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "nowhere.npz")


@SUFFIXES
def test_every_truncation_is_an_error(plan: Plan, stats: RoutingStats, suffix: str, tmp_path: Path) -> None:
    for thing, load in ((plan, Plan.load), (stats, RoutingStats.load)):
        path = tmp_path / f"whole{suffix}"
        thing.save(path)
        data = path.read_bytes()
        for cut in {0, 1, 10, len(data) // 3, len(data) // 2, len(data) - 30, len(data) - 1}:
            path.write_bytes(data[:cut])
            with pytest.raises(PlacementError, match="damaged"):
                load(path)


def test_flipped_bytes_are_an_error_or_harmless(plan: Plan, tmp_path: Path) -> None:
    """zip checks every member; what it does not check (names, dates) either does not matter or is noticed."""
    path = tmp_path / "plan.npz"
    plan.save(path)
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            back = Plan.load(path)
        except PlacementError:
            continue
        assert np.array_equal(back.physical_to_logical, plan.physical_to_logical)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"[1, 2]", b'{"format": "moec.placement_plan"', b"\x80\x04K\x01."]
)
@SUFFIXES
def test_not_such_a_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    for load in (Plan.load, RoutingStats.load):
        with pytest.raises(PlacementError, match=r"file\.(npz|json) is damaged or no moec"):
            load(path)


def test_one_array_and_pickles_are_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "array.npz"
    with open(path, "wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(PlacementError, match="one array, no archive"):
        Plan.load(path)
    plan.save(path)
    with np.load(path) as archive:
        fields = dict(archive)
    np.savez(path, **fields | {"note": np.array({"a": 1}, dtype=object)})  # numpy pickles it
    with pytest.raises(PlacementError, match="damaged.*allow_pickle=False"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "moec.routing_stats"}, "has format 'moec.routing_stats'; expected 'moec.placement_plan'"),
        ({"format": None}, "has format 'none'"),
        ({"version": 2}, "has version 2; this moec reads version 1"),
        ({"version": None}, "has version None"),
        ({"fractions": None}, "lacks the field 'fractions'"),
        ({"physical_to_logical": np.zeros((3, 16))}, "'physical_to_logical' is float64 with 2 dimensions"),
        ({"physical_to_logical": np.zeros(16, dtype=int)}, "with 1 dimensions; expected 2"),
        ({"physical_to_logical": np.zeros((3, 16), dtype=int)}, "layer 0 has no slot for expert 1"),
        ({"physical_to_logical": np.full((3, 16), 10)}, "with 10 experts they are -1..9"),
        ({"num_experts": 11}, "no slot for expert 10"),
        ({"num_experts": 9}, "with 9 experts they are"),
        ({"node_of_gpu": np.array([0, 0, 2, 2])}, "numbered 0, 1, ... without holes"),
        ({"node_of_gpu": np.zeros(5, dtype=int)}, "16.* slots on 5 GPUs"),
        ({"fractions": np.full((3, 16), 0.7)}, "do not sum to 1"),
        ({"fractions": np.full((3, 16), np.nan)}, "not finite"),
        ({"split": "by hand"}, "split is"),
        ({"slack": 7.0}, "slack 0..1"),
        ({"predicted": np.ones((3, 2))}, "one number per layer"),
        ({"predicted": np.ones((2, 3))}, "2 rows, not 3"),
    ],
)
def test_plans_that_are_not_sound(change: dict[str, object], reason: str, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    plan.save(path)
    with pytest.raises(MoecError, match=reason) as caught:
        Plan.load(rewritten(path, **change))
    assert str(path) in str(caught.value)


def test_two_copies_on_a_gpu() -> None:
    with pytest.raises(PlacementError, match="layer 0 has two copies of an expert on GPU 1"):
        Plan(np.array([[0, 1, 0, 0]]), 2, np.array([0, 0]))
    assert len(Plan(np.array([[0, 1, 0, 0]]), 2, np.array([0, 0]), method="eplb").duplicates) == 1


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [({"num_experts": 64}, "10 experts; the model has 64"), ({"num_layers": 4}, "3 layers; the model has 4")],
)
def test_a_plan_for_another_model(wanted: dict[str, int], reason: str, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlacementError, match=reason):
        Plan.load(tmp_path / "plan.json", **wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "moec.placement_plan"}, "expected 'moec.routing_stats'"),
        ({"version": 0}, "has version 0"),
        ({"counts": np.zeros((1, 3, 10), dtype=int)}, "2 names for 1 windows"),
        ({"counts": np.full((2, 3, 10), -1)}, "negative"),
        ({"counts": np.zeros((2, 3, 12), dtype=int)}, "coactivation has shape"),
        ({"counts": np.zeros((2, 0, 10), dtype=int)}, "none of them 0"),
        ({"tokens": np.zeros(3, dtype=int)}, "together more often"),
        ({"coactivation": np.arange(300).reshape(3, 10, 10)}, "not symmetric"),
        ({"coactivation": np.ones((3, 10, 10))}, "is float64"),
    ],
)
def test_statistics_that_are_not_sound(
    change: dict[str, object], reason: str, stats: RoutingStats, tmp_path: Path
) -> None:
    path = tmp_path / "stats.npz"
    stats.save(path)
    with pytest.raises(PlacementError, match=reason) as caught:
        RoutingStats.load(rewritten(path, **change))
    assert str(path) in str(caught.value)


def test_json_is_plain(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert (content["format"], content["version"], content["num_experts"]) == ("moec.placement_plan", 1, 10)
    assert np.array_equal(content["physical_to_logical"], plan.physical_to_logical)
