"""The schedule: who refuses what and why, who is chosen, and that the ops do what the schedule says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec import schedule
from moec.ir import Problem
from moec.kernels import PRODUCTS
from moec.schedule import STRATEGIES, Gathered, GroupedMM, NativeLoop, Strategy, strategies

OLMOE = Problem(
    num_tokens=2048,
    top_k=8,
    num_experts=64,
    d_model=2048,
    d_expert=1024,
    dtype=torch.bfloat16,
    device="cuda",
    training=False,
    stacked=True,
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_capability", lambda device: (9, 0))
    schedule.choose.cache_clear()
    monkeypatch.setattr(schedule, "choose", schedule.choose.__wrapped__)


def test_every_strategy_has_a_kernel() -> None:
    assert [s.name for s in STRATEGIES] == list({s.name: None for s in STRATEGIES})
    assert {s.name for s in STRATEGIES} == set(PRODUCTS)
    for s in STRATEGIES:
        assert s.describe
        assert callable(PRODUCTS[s.name].grouped_linear)
        refusals = [str(s.refuses(replace(OLMOE, training=True, device=d))) for d in ("cpu", "cuda")]
        assert hasattr(PRODUCTS[s.name], "grouped_outer") or any("weight gradients" in r for r in refusals)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("strategy", "change", "reason"),
    [
        (GroupedMM(), {"device": "cpu"}, "not for cpu"),
        (NativeLoop(), {}, "not on cuda"),
        (NativeLoop(), {"device": "cpu", "bias": True}, "round before it adds the bias"),
        (NativeLoop(), {"device": "cpu", "dtype": torch.float64}, "not torch.float64"),
        (NativeLoop(), {"device": "cpu", "d_model": 2050}, "multiple of 16 bytes"),
        (NativeLoop(), {"device": "cpu", "stacked": False}, "stacked weights"),
        (NativeLoop(), {"device": "cpu", "training": True}, "weight gradients"),
        (GroupedMM(), {"dtype": torch.float16}, "bfloat16, not torch.float16"),
        (GroupedMM(), {"stacked": False}, "stacked weights"),
        (GroupedMM(), {"d_expert": 1028}, "multiple of 16 bytes, not rows of 2048 and 1028"),
        (GroupedMM(), {"d_model": 33}, "multiple of 16 bytes"),
        (GroupedMM(min_capability=(10, 0)), {}, r"capability \(10, 0\), not \(9, 0\)"),
        (Gathered(), {"num_tokens": 1, "device": "cpu"}, "on cpu"),
        (Gathered(), {"num_tokens": 1, "stacked": False}, "stacked weights"),
        (Gathered(), {"num_tokens": 1, "training": True}, "weight gradients"),
        (Gathered(), {}, "64.0 GiB of weights"),
    ],
)
def test_refusals_say_why(strategy: Strategy, change: dict[str, object], reason: str) -> None:
    problem = replace(OLMOE, **change)
    found = strategy.refuses(problem)
    assert found is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)
    assert schedule.choose(problem) is not strategy


def test_without_cuda_grouped_mm_is_not_for_it() -> None:
    if not torch.cuda.is_available():
        assert "compute capability" in str(GroupedMM().refuses(OLMOE))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "grouped_mm"),
        ({"training": True}, "grouped_mm"),
        ({"num_tokens": 1}, "gathered"),
        ({"num_tokens": 1, "dtype": torch.float32}, "gathered"),
        ({"dtype": torch.float32}, "loop"),
        ({"stacked": False}, "loop"),
        ({"device": "cpu"}, "native_loop"),
        ({"device": "cpu", "dtype": torch.float32}, "native_loop"),
        ({"device": "cpu", "dtype": torch.float64}, "loop"),
        ({"device": "cpu", "stacked": False}, "loop"),
        ({"device": "cpu", "bias": True}, "loop"),
        ({"device": "cpu", "training": True}, "loop"),
        ({"device": "cpu", "d_expert": 33}, "loop"),
        ({"device": "cpu", "num_tokens": 0}, "loop"),
        ({"device": "cpu", "d_model": 8, "d_expert": 8, "num_tokens": 1}, "loop"),
        ({"device": "mps"}, "loop"),
        ({"num_tokens": None, "top_k": None}, "grouped_mm"),
    ],
)
def test_choice(change: dict[str, object], name: str) -> None:
    assert schedule.choose(replace(OLMOE, **change)).name == name


@pytest.mark.usefixtures("hopper")
def test_the_report_names_the_changes_by_tokens() -> None:
    changes = schedule.choose_by_tokens(replace(OLMOE, num_tokens=None))
    assert [s.name for _, s in changes] == ["gathered", "grouped_mm"]
    assert changes[0][0] == 1
    assert schedule.describe(replace(OLMOE, num_tokens=None)) == f"gathered, grouped_mm from {changes[1][0]} tokens"
    assert schedule.describe(OLMOE) == "grouped_mm"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_costs_are_seconds_that_grow(strategy: Strategy, device: str) -> None:
    costs = [strategy.cost(replace(OLMOE, num_tokens=t, device=device)) for t in (0, 1, 16, 256, 4096, 65536)]
    assert costs == sorted(costs)
    assert 0 <= costs[0] < 1e-3
    assert costs[-1] < 1e4
    assert strategy.cost(OLMOE) == strategy.cost(replace(OLMOE, d_model=1024, d_expert=2048))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_op_which_knows_slots_only_chooses_as_the_report_does(tokens: int, dtype: torch.dtype) -> None:
    layer = replace(OLMOE, num_tokens=tokens, dtype=dtype)
    assert schedule.choose(layer) == schedule.choose(replace(layer, num_tokens=tokens * 8, top_k=1))


@pytest.mark.parametrize("training", [False, True])
def test_the_op_runs_what_is_chosen(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(problem: Problem) -> Strategy:
        asked.append(problem)
        return next(s for s in STRATEGIES if s.name == "reference")

    monkeypatch.setattr(schedule, "choose", choose)
    monkeypatch.setitem(PRODUCTS, "loop", None)  # the strategy of CPU must not run
    x, w = torch.randn(6, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=training)
    offsets = torch.tensor([2, 5])
    y = torch.ops.moec.grouped_linear(x, [w], [], offsets)
    expected = Problem(6, 1, 2, 3, 5, torch.float32, "cpu", False, True, False)
    assert asked == [expected]
    y.sum().backward()
    backward = [replace(expected, d_model=5, d_expert=3)]
    if training:
        backward += [replace(expected, d_model=5, d_expert=3, training=True)]
    assert asked[1:] == backward


def test_a_stack_that_autocast_casts_is_cast_by_expert_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCTS, "native_loop", None)
    x, w, offsets = torch.randn(160, 16), torch.randn(40, 8, 16), torch.arange(4, 164, 4)
    assert torch.ops.moec.grouped_linear(x, [w], [], offsets, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(AttributeError):
        torch.ops.moec.grouped_linear(x, [w], [], offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tokens", [None, 1, 2048])
def test_a_layer_where_every_product_synchronizes(dtype: torch.dtype, stacked: bool, tokens: int | None) -> None:
    """A layer costs what the products chosen for it cost, also where none of them is without a wait for the device."""
    problem = replace(OLMOE, dtype=dtype, stacked=stacked, num_tokens=tokens, training=True, gating="halves")
    assert schedule.choose_layer(replace(problem, num_tokens=16)).name == "composed"
    assert not schedule.in_one(problem)
    assert schedule.describe(problem)
