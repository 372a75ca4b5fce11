"""Does a finer granularity pay, on this data and this machine? From a fit, a budget and, if there is one, a measured table.

For every G that was trained (and measured), `worth` says how many times the compute the coarsest G would need to reach the same
loss in this budget, routing FLOPs or measured time charged to both; its interval comes from the resamples of the fit. Then

    go             the whole interval of the best G is above 1, on a measured machine, near the runs
    no-go          no finer G has an interval that reaches above 1.01
    measure more   anything else: the interval is too wide, nothing was timed, or the budget is far from the runs

Times are taken as exact: `measure` takes medians, and a busy machine can still be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moec.scaling.costs import Costs
from moec.scaling.device import Device, Doubling, doublings
from moec.scaling.errors import ScalingError
from moec.scaling.fit import LEVEL, Estimate, Fit, coefficients, gain
from moec.scaling.law import compute_ratio
from moec.scaling.optimum import Budget, Plan, plan, pose
from moec.scaling.problem import search, worth

GO, NO_GO, MEASURE_MORE = "go", "no-go", "measure more"
_TRIFLE = 1.01  # a finer G that cannot be worth more than this is not worth it
_FAR = 30.0  # a budget whose N or D is further than this factor outside the runs decides nothing
_SAMPLES = 60  # resamples that are planned with; each takes a few hundredths of a second


@dataclass(frozen=True)
class Verdict:
    """One of GO, NO_GO, MEASURE_MORE, why, and what would change it."""

    decision: str
    reasons: tuple[str, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """For one budget. By G: `worth`, of compute against the coarsest; `gain`, the same with routing free. `tokens` of `plan`.

    `best_share`: by G, in which share of the resamples it is the best. `steps`: the doublings, where a machine was measured.
    """

    fit: Fit
    budget: Budget
    plan: Plan
    worth: dict[float, Estimate]
    gain: dict[float, Estimate]
    tokens: Estimate
    best_share: dict[float, float]
    steps: tuple[Doubling, ...]
    verdict: Verdict


def advise(
    fit: Fit,
    budget: Budget,
    expansion: float,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    device: Device | None = None,
) -> Advice:
    """The best of the granularities trained, and whether to take it. Raises ScalingError for budgets as `plan` does."""
    grains = tuple(sorted({r.granularity for r in fit.runs}))
    problem, compute = pose(fit.coefficients, budget, expansion, costs, device, grains)
    grains = problem.granularities
    if len(grains) < 2:
        raise ScalingError(
            f"only G = {grains[0]:g} is left to compare; train (and measure) at least two granularities, powers of two"
        )
    found = plan(fit.coefficients, budget, expansion, costs, device, grains)
    picked = fit.samples[:: max(len(fit.samples) // _SAMPLES, 1)]
    laws = [coefficients(fit.design, sample, fit.runs, "") for sample in picked]
    draws = {g: [worth(replace(problem, law=law), compute, grains[0], g) for law in laws] for g in grains[1:]}
    values = {g: worth(problem, compute, grains[0], g) for g in grains[1:]}
    doubts = {g: gain(fit, grains[0], g) for g in grains[1:]}
    worths = {g: _estimate(values[g], draws[g], doubts[g].doubt) for g in grains[1:]}
    winners = [max(grains, key=lambda g: draws[g][i] if g in draws else 1.0) for i in range(len(laws))]
    needed = [search(replace(problem, law=law), compute, found.granularity).tokens for law in laws]
    tokens = _estimate(found.tokens, needed, "")
    steps = doublings(device, fit.coefficients, found.d_model, expansion, costs, grains) if device else ()
    verdict = decide(fit, found, worths, steps)
    share = {g: winners.count(g) / len(winners) for g in grains}
    return Advice(fit, budget, found, worths, doubts, tokens, share, steps, verdict)


def decide(fit: Fit, found: Plan, worths: dict[float, Estimate], steps: Sequence[Doubling]) -> Verdict:
    """The rule above, on numbers."""
    g, (coarsest, *_) = found.granularity, sorted(a.granularity for a in found.alternatives)
    changes = _changes(fit, g, coarsest, worths, steps)
    unclear = [e.doubt for e in worths.values() if e.doubt]
    if unclear:
        return Verdict(
            MEASURE_MORE, tuple(dict.fromkeys(f"the gain is not identifiable: {d}" for d in unclear)), changes
        )
    far = distance(fit, found)
    if far > _FAR:
        why = f"the plan is {far:.0f} times outside the runs in size or tokens: no fit carries that far"
        return Verdict(
            MEASURE_MORE, (why,), (f"larger or longer runs, within a factor of {_FAR:g} of the plan", *changes)
        )
    if max(e.high for e in worths.values()) < _TRIFLE:
        return Verdict(NO_GO, (f"no finer G is worth more than {_TRIFLE - 1:.0%} of compute here",), changes)
    if g == coarsest:
        return Verdict(MEASURE_MORE, (f"G = {g:g} looks best, but a finer one may still be worth it",), changes)
    estimate = worths[g]
    saved = f"G = {g:g} is worth {estimate.value:.2f} times the compute of G = {coarsest:g} ({_range(estimate)})"
    if estimate.low <= 1:
        return Verdict(MEASURE_MORE, (f"{saved}: it may be worth nothing",), changes)
    if not steps:
        why = f"{saved} in FLOPs, but no machine was asked what a token costs"
        return Verdict(
            MEASURE_MORE, (why,), ("a table from python -m moec.scaling.measure, given as --device", *changes)
        )
    return Verdict(GO, (f"{saved}, measured time included",), changes)


def distance(fit: Fit, found: Plan) -> float:
    """By what factor a plan is outside the runs, in N or in D, whichever is more; 1 inside."""
    ranges = fit.coefficients.measured
    pairs = ((found.total_params, ranges.total_params), (found.tokens, ranges.tokens))
    return max(max(value / high, low / value, 1.0) for value, (low, high) in pairs)


def _changes(
    fit: Fit, g: float, coarsest: float, worths: dict[float, Estimate], steps: Sequence[Doubling]
) -> tuple[str, ...]:
    found = []
    if steps and g > coarsest:
        slower = math.prod(1 + s.slowdown for s in steps if s.after <= g) - 1
        most = compute_ratio(fit.coefficients, coarsest, g) - 1
        found.append(
            f"tokens at G = {g:g} slower by {most:.0%} against G = {coarsest:g}, instead of {slower:.0%}: no gain is left"
        )
    elif g > coarsest:
        allowed = compute_ratio(fit.coefficients, coarsest, g) - 1
        found.append(
            f"a machine on which a token takes more than {allowed:.0%} longer at G = {g:g} than at G = {coarsest:g}"
        )
    found += [
        f"a kernel that makes {s.before:g} -> {s.after:g} cost less than {s.allowed:.1%} (now {s.slowdown:+.1%})"
        for s in steps
        if not s.pays
    ]
    estimate = worths[g] if g in worths else max(worths.values(), key=lambda e: e.high)
    half, lead = (estimate.high - estimate.low) / 2, abs(estimate.value - 1)
    if estimate.low <= 1 < estimate.high and math.isfinite(half) and lead > 0:
        more = math.ceil(len(fit.runs) * (half / lead) ** 2)
        found.append(
            f"about {more} runs of the same kind instead of {len(fit.runs)} would tell {estimate.value:.3f} from 1"
            if more < 100 * len(fit.runs)
            else "no affordable number of runs of this size would tell it from 1; larger models might"
        )
    if fit.seed_noise is None:
        found.append("runs with other seeds: how much of the scatter is chance was not measured")
    return tuple(found)


def _estimate(value: float, draws: Sequence[float], doubt: str) -> Estimate:
    finite = [d for d in draws if math.isfinite(d)]
    if not math.isfinite(value) or len(finite) < len(draws) / 2:
        return Estimate(
            value, math.nan, math.nan, doubt or "tokens and memory both bind, so compute makes up for nothing"
        )
    low, high = np.percentile(finite, LEVEL)
    return Estimate(value, float(low), float(high), doubt)


def _range(e: Estimate) -> str:
    return f"80 %: {e.low:.2f}..{e.high:.2f}"
