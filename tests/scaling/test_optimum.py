"""The best width, tokens and G: the paper's tables, closed forms, and every kind of budget."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from moec.scaling import Budget, Costs, ScalingError, compute_ratio, plan, published
from moec.scaling.costs import blocks, flops_per_token, total_params
from moec.scaling.law import loss
from moec.scaling.limits import build_doubts, conflicts, doubts
from moec.scaling.optimum import buildable
from moec.scaling.successors import (
    active_experts_factor,
    active_experts_optimum,
    leverage,
    leverage_optimum,
    second_opinions,
)
from tests.scaling.paper import TABLE_2, Row

E64 = published("e64")


@pytest.mark.parametrize("row", TABLE_2, ids=lambda r: f"{r.active_params:g}")
@pytest.mark.parametrize(("name", "share", "nats"), [("e64", 0.015, 0.005), ("e64-rounded", 0.05, 0.02)])
def test_table_2_is_reproduced(row: Row, name: str, share: float, nats: float) -> None:
    found = plan(published(name), Budget(active_params=row.active_params), expansion=64)
    assert found.granularity == row.granularity
    assert found.tokens == pytest.approx(row.tokens, rel=share)
    assert found.flops == pytest.approx(row.flops, rel=share)
    assert found.loss == pytest.approx(row.loss, abs=nats)
    assert found.active_params == pytest.approx(row.active_params, rel=1e-5)
    assert row.tokens_range[0] <= found.tokens <= row.tokens_range[1]
    assert row.granularity_range[0] <= found.granularity <= row.granularity_range[1]


@pytest.mark.parametrize("row", TABLE_2, ids=lambda r: f"{r.active_params:g}")
def test_table_2_from_its_flops(row: Row) -> None:
    found = plan(E64, Budget(flops=row.flops), expansion=64)
    assert found.granularity == row.granularity
    assert found.tokens == pytest.approx(row.tokens, rel=0.015)
    assert found.flops == pytest.approx(row.flops)
    assert found.loss == pytest.approx(row.loss, abs=0.005)
    assert found.total_params == pytest.approx(43 * found.active_params)


@pytest.mark.parametrize("flops", [1e18, 1e20, 1e23])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 16), (4, 32)])
def test_with_free_routing_a_finer_g_saves_the_same_share_at_every_budget(
    flops: float, before: int, after: int
) -> None:
    costs = Costs(routing=0.0)
    fine = plan(E64, Budget(flops=flops), 64, costs, granularities=(float(after),))
    more = flops * compute_ratio(E64, before, after)
    coarse = plan(E64, Budget(flops=more), 64, costs, granularities=(float(before),))
    assert coarse.loss == pytest.approx(fine.loss, abs=1e-8)


def test_the_search_agrees_with_brent() -> None:
    """An independent witness: scipy over log d_model at the paper's 1B row."""
    row = TABLE_2[1]

    def at(log_d: float) -> float:
        d = np.exp(log_d)
        tokens = row.flops / flops_per_token(d, blocks(d), 64, 16, Costs())
        return float(loss(E64, total_params(d, blocks(d), 64), tokens, 16))

    best = minimize_scalar(at, bounds=(np.log(100), np.log(1e5)), method="bounded", options={"xatol": 1e-10})
    found = plan(E64, Budget(flops=row.flops), 64, granularities=(16.0,))
    assert found.loss == pytest.approx(best.fun, abs=1e-9)
    assert found.d_model == pytest.approx(np.exp(best.x), rel=1e-3)


def test_what_other_granularities_cost_at_1e20() -> None:
    extra = {a.granularity: a.extra_compute for a in plan(E64, Budget(flops=1e20), 64).alternatives}
    assert extra[16] == 0
    assert [extra[g] for g in (8, 32, 1)] == pytest.approx([0.036, 0.047, 0.89], abs=0.003)


def test_routing_costs_drive_the_best_g() -> None:
    best = {c: plan(E64, Budget(flops=1e20), 64, Costs(routing=c)).granularity for c in (0, 6, 14, 38)}
    assert best == {0: 256, 6: 32, 14: 16, 38: 8}


def test_a_token_budget_is_the_compute_whose_optimum_uses_it() -> None:
    found = plan(E64, Budget(tokens=3e9), 64)
    assert found.tokens == pytest.approx(3e9, rel=1e-5)
    assert found.bound_by == ("tokens",)
    again = plan(E64, Budget(flops=found.flops), 64)
    assert (again.granularity, again.d_model) == pytest.approx((found.granularity, found.d_model), rel=1e-3)


def test_tokens_and_flops_make_a_larger_model_of_the_data_there_is() -> None:
    free, short = plan(E64, Budget(flops=1e21), 64), plan(E64, Budget(flops=1e21, tokens=20e9), 64)
    assert short.tokens == pytest.approx(20e9)
    assert short.flops == pytest.approx(1e21, rel=1e-4)
    assert short.d_model > free.d_model
    assert short.loss > free.loss
    assert (free.bound_by, short.bound_by) == ((), ("tokens",))


def test_memory_limits_all_parameters_with_routers() -> None:
    found = plan(E64, Budget(flops=1e21, memory=80e9), 64)
    assert found.bound_by == ("memory",)
    d, n, g = found.d_model, found.n_blocks, found.granularity
    assert 16 * (d**2 * (8 * 64 + 4) * n + d * 64 * g * n) == pytest.approx(80e9, rel=1e-6)
    assert found.memory == pytest.approx(80e9, rel=1e-6)
    lighter = plan(E64, Budget(flops=1e21, memory=80e9, bytes_per_param=6), 64)
    assert lighter.total_params > 2 * found.total_params


def test_memory_alone_is_the_largest_compute_optimal_model() -> None:
    found = plan(E64, Budget(memory=80e9), 64)
    assert found.memory == pytest.approx(80e9, rel=1e-4)
    assert plan(E64, Budget(flops=found.flops), 64).d_model == pytest.approx(found.d_model, rel=1e-3)


def test_where_tokens_and_memory_both_bind_the_plan_says_that_compute_is_left() -> None:
    found = plan(E64, Budget(flops=1e22, tokens=3e9, memory=8e9), 64)
    assert found.bound_by == ("tokens", "memory")
    assert found.flops < 1e22
    assert any("left over" in text for text in doubts(found, E64))


def test_buildable_has_whole_blocks_and_costs_the_same() -> None:
    budget = Budget(flops=1.93e20)
    found = plan(E64, budget, 64)
    built = buildable(E64, budget, found, Costs())
    assert built.d_model == 64 * built.n_blocks == 1728
    assert built.flops == pytest.approx(found.flops)
    assert found.loss <= built.loss < found.loss + 1e-3
    tight = Budget(flops=1e21, memory=80e9)
    assert buildable(E64, tight, plan(E64, tight, 64), Costs()).memory <= 80e9


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(), "no budget"),
        (Budget(flops=-1e20), "flops is -1e"),
        (Budget(tokens=0), "tokens is 0"),
        (Budget(memory=float("nan")), "memory is nan"),
        (Budget(flops=1e20, bytes_per_param=0), "bytes per parameter"),
        (Budget(flops=1e20, seconds=3), "keep one"),
        (Budget(seconds=3), "--device"),
        (Budget(flops=1e20, active_params=1e9), "leave out"),
        (Budget(flops=1e20, memory=10), "holds no model"),
        (Budget(flops=1e3), "too small"),
    ],
)
def test_a_budget_that_makes_no_sense(budget: Budget, reason: str) -> None:
    with pytest.raises(ScalingError, match=reason):
        plan(E64, budget, 64)


def test_an_expansion_or_cost_that_makes_no_sense() -> None:
    for expansion, costs, reason in (
        (-8, Costs(), "expansion"),
        (8, Costs(per_param=0), "c_f"),
        (8, Costs(routing=-1), "c_r"),
    ):
        with pytest.raises(ScalingError, match=reason):
            plan(E64, Budget(flops=1e20), expansion, costs)
    with pytest.raises(ScalingError, match="no granularity"):
        plan(E64, Budget(flops=1e20), 64, granularities=())


def test_efficiency_leverage_gives_the_two_figures_its_paper_states() -> None:
    assert leverage_optimum() == pytest.approx(11.3, abs=0.05)
    assert leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.02)


def test_zhao_advises_about_seven_active_experts() -> None:
    best = active_experts_optimum()
    assert best == pytest.approx(6.8, abs=0.03)
    assert active_experts_factor(best) == min(active_experts_factor(k) for k in (2.0, 4.0, best, 8.0, 16.0))


def test_successors_speak_in_their_own_g_and_disagreement_is_said() -> None:
    found = plan(E64, Budget(flops=4e23), 64)
    ling, zhao = second_opinions(found)
    assert found.granularity == 32
    assert (ling.planned, ling.own, ling.paper) == pytest.approx((16, 11.35, 22.7), abs=0.05)
    assert (zhao.planned, zhao.own, zhao.paper) == pytest.approx((32, 6.78, 6.78), abs=0.01)
    assert (ling.disagrees, zhao.disagrees) == (False, True)
    assert ling.worth > 0
    assert zhao.worth > 0
    assert "Zhao" in "".join(conflicts(found, (ling, zhao)))


def test_extrapolation_is_flagged() -> None:
    inside = replace(plan(E64, Budget(active_params=50e6), 64), tokens=17e9)
    assert doubts(inside, E64, context=256) == ()
    texts = " | ".join(doubts(plan(E64, Budget(flops=4e24), 32), E64, context=4096))
    for part in ("E = 32 was not fitted", "total parameters =", "tokens =", "G = 64 is extrapolated", "not 4096"):
        assert part in texts
    small = plan(E64, Budget(active_params=12 * 256**2 * 4), 64, granularities=(64.0,))
    assert "routers have 2 times" in " | ".join(doubts(small, E64))
    assert "no G" in " | ".join(doubts(inside, published("dense")))


def test_experts_that_do_not_fill_tiles_are_flagged() -> None:
    budget = Budget(flops=1.93e20)
    found = plan(E64, budget, 64)
    assert "432 wide" in " ".join(build_doubts(buildable(E64, budget, found, Costs())))
