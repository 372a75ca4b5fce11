"""The pictures: matplotlib, loaded only when one is asked for (`pip install moec[scaling]`). Each function writes one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.scaling.advise import Advice
from moec.scaling.costs import Costs
from moec.scaling.errors import extra
from moec.scaling.fit import Estimate, Fit
from moec.scaling.law import Coefficients, loss
from moec.scaling.optimum import Budget, Plan, plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 2  # each side of the budget, in the picture of G against compute


def figure(columns: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Axes side by side, without a display."""
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    made, axes = pyplot.subplots(1, columns, figsize=(4.8 * columns, height), squeeze=False, layout="constrained")
    return made, list(axes[0])


def save(made: Figure, path: str) -> None:
    made.savefig(path, dpi=120)
    extra("matplotlib.pyplot").close(made)


def by_granularity(axes: Axes) -> None:
    """G on the horizontal axis, in powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("granularity G = 4 d_model / d_expert")


def plot_plan(path: str, law: Coefficients, found: Plan, costs: Costs) -> None:
    """Loss against G for this budget, with the compute that other G cost; and the best G against compute, routing charged."""
    made, (left, right) = figure(2)
    others = found.alternatives
    left.plot([a.granularity for a in others], [a.loss for a in others], "o-")
    left.axvspan(
        law.measured.granularity[1],
        max(a.granularity for a in others) * 1.1,
        alpha=0.12,
        color="gray",
        label="extrapolated",
    )
    for a in others:
        if 0 < a.extra_compute < 10:
            left.annotate(
                f"+{a.extra_compute:.0%}",
                (a.granularity, a.loss),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
            )
    by_granularity(left)
    left.set(ylabel="loss, nats per token", title="this budget")
    left.legend()
    budgets = np.logspace(np.log10(found.flops) - _DECADES, np.log10(found.flops) + _DECADES, 17)
    best = [plan(law, Budget(flops=float(f)), found.expansion, costs).granularity for f in budgets]
    right.step(budgets, best, where="mid")
    right.plot([found.flops], [found.granularity], "o", label="this plan")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.set(
        xscale="log",
        xlabel="FLOPs",
        ylabel="best G",
        title=f"{law.name}, E = {found.expansion:g}, c_r = {costs.routing:g}",
    )
    right.legend()
    save(made, path)


def draw_runs(axes: Axes, fit: Fit) -> None:
    """Loss against G: the runs of every size with the most tokens, and the fitted curves through them."""
    by_granularity(axes)
    axes.set(ylabel="loss, nats per token", title="most tokens of each size")
    grains = np.geomspace(*fit.coefficients.measured.granularity, 50)
    for n in sorted({r.total_params for r in fit.runs}):
        tokens = max(r.tokens for r in fit.runs if r.total_params == n)
        some = [r for r in fit.runs if r.total_params == n and r.tokens == tokens]
        (curve,) = axes.plot(grains, loss(fit.coefficients, n, tokens, grains), label=f"N = {n:.3g}, D = {tokens:.3g}")
        axes.plot([r.granularity for r in some], [r.loss for r in some], "o", color=curve.get_color())
    axes.legend()


def plot_fit(path: str, fit: Fit) -> None:
    """The runs with the fitted curves; and what is left of every run against what the law says."""
    made, (left, right) = figure(2)
    draw_runs(left, fit)
    said = np.array([r.loss for r in fit.runs]) - fit.residuals
    for g in sorted({r.granularity for r in fit.runs}):
        rows = [i for i, r in enumerate(fit.runs) if r.granularity == g]
        right.plot(said[rows], 1000 * fit.residuals[rows], "o", label=f"G = {g:g}")
    right.axhspan(-1000 * fit.noise, 1000 * fit.noise, alpha=0.12, color="gray", label="noise")
    right.set(xlabel="loss that the law says", ylabel="run - law, thousandths of a nat", title=f"{len(said)} runs")
    right.legend()
    save(made, path)


def plot_advice(path: str, advice: Advice) -> None:
    """What each G is worth, with intervals; the runs with the fitted curves; measured slowdown against what may be."""
    made, axes = figure(3 if advice.steps else 2)
    grains = list(advice.worth)
    for label, estimates, shift in (("routing free", advice.gain, 0.98), ("as charged", advice.worth, 1.02)):
        values = [estimates[g].value for g in grains]
        errors = [[abs(estimates[g].value - bound(estimates[g])) for g in grains] for bound in (_low, _high)]
        axes[0].errorbar([g * shift for g in grains], values, yerr=errors, fmt="o", capsize=3, label=label)
    axes[0].axhline(1, color="gray")
    by_granularity(axes[0])
    axes[0].set(
        ylabel=f"compute that G = {min(advice.best_share):g} needs for the same loss", title=advice.verdict.decision
    )
    axes[0].legend()
    draw_runs(axes[1], advice.fit)
    if advice.steps:
        places = np.arange(len(advice.steps))
        axes[2].bar(places - 0.2, [100 * s.slowdown for s in advice.steps], 0.4, label="a token takes longer by")
        axes[2].bar(places + 0.2, [100 * s.allowed for s in advice.steps], 0.4, label="and may, to break even")
        axes[2].set_xticks(places, [f"{s.before:g} to {s.after:g}" for s in advice.steps])
        axes[2].set(xlabel="G doubled", ylabel="%", title="this machine")
        axes[2].legend()
    save(made, path)


def _low(e: Estimate) -> float:
    return e.low


def _high(e: Estimate) -> float:
    return e.high
