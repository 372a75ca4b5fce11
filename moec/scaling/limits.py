"""Where a plan leaves what was measured. The law is a curve through about a hundred runs; outside them it is a guess.

The published runs (arXiv 2402.07871, Table 3, Appendix A): E = 64 or 16, G 1..16, context 256, N 129e6..3.7e9 total parameters,
D 16e9..130e9 tokens of C4, ReLU experts of two matrices, expert-choice routing. A fit of your own brings the ranges of its own
runs. A doubt is a line of text for people.
"""

from __future__ import annotations

import math

from moec.scaling.costs import FF_RATIO, WIDTH_PER_BLOCK
from moec.scaling.device import Device, matching_rows
from moec.scaling.law import Coefficients, Measured
from moec.scaling.optimum import Plan
from moec.scaling.successors import Opinion

_TILE = 64  # columns of a tile of a matrix unit: an expert whose width is no multiple of it pads


def doubts(plan: Plan, law: Coefficients, context: float | None = None) -> tuple[str, ...]:
    """Everything about a plan, and the law it rests on, that no run backs."""
    found = [
        _expansion(plan, law),
        _range("total parameters", plan.total_params, law.measured.total_params),
        _range("tokens", plan.tokens, law.measured.tokens),
        _range("G", plan.granularity, law.measured.granularity),
        _context(context, law.measured),
        _routers(plan),
        _unspent(plan),
        "the dense fit has no G: every granularity has the same loss, and only costs differ" * (law.g == 0),
    ]
    return tuple(text for text in found if text)


def device_doubts(plan: Plan, device: Device) -> tuple[str, ...]:
    """What the measured table does not cover."""
    rows = matching_rows(device, plan.expansion)
    widths = [row.d_model for row in rows]
    grains = sorted({row.granularity for row in rows})
    found = []
    if abs(math.log(rows[0].expansion / plan.expansion)) > 0.05:
        found.append(f"the table was measured at E = {rows[0].expansion:g}, not {plan.expansion:g}; measure that E")
    if not min(widths) * 0.99 <= plan.d_model <= max(widths) * 1.01:
        found.append(
            f"d_model {plan.d_model:.0f} is outside the widths measured ({min(widths)}..{max(widths)}): the rate of the "
            "nearest is used; measure that width"
        )
    if len(grains) == 1:
        found.append(f"only G = {grains[0]:g} was measured: the table cannot compare granularities; measure others")
    elif plan.granularity >= max(grains) * 0.99:
        found.append(f"G = {plan.granularity:g} is the finest in the table; finer ones were not considered")
    if any(abs(row.top_k * row.d_expert / (FF_RATIO * row.d_model) - 1) > 0.01 for row in rows):
        found.append(
            "some layers measured have an active width other than 4 * d_model; their rate stands for that of the law's shape"
        )
    return tuple(found)


def build_doubts(built: Plan) -> tuple[str, ...]:
    """About the run with whole numbers."""
    found = []
    if built.d_expert % _TILE:
        found.append(f"experts {built.d_expert:g} wide are no multiple of {_TILE}: tiles of matrix units pad")
    if built.n_blocks < 2:
        found.append(f"{built.n_blocks:g} block of d_model {WIDTH_PER_BLOCK}: too small for this law to mean much")
    return tuple(found)


def conflicts(plan: Plan, opinions: tuple[Opinion, ...]) -> tuple[str, ...]:
    """Where the successor laws would have chosen another G. They were fitted under token choice with balancing losses."""
    return tuple(
        f"{o.law} disagrees: G = {o.paper:.3g} here ({o.own:.3g} as {o.convention}), against {plan.granularity:g}"
        for o in opinions
        if o.disagrees
    )


def _expansion(plan: Plan, law: Coefficients) -> str:
    if law.expansion and abs(math.log(law.expansion / plan.expansion)) > 1e-6:
        return (
            f"E = {plan.expansion:g} was not fitted: the coefficients are those of E = {law.expansion:g}; moec sweep "
            "and moec fit give your own"
        )
    return ""


def _range(what: str, value: float, measured: tuple[float, float]) -> str:
    low, high = measured
    if low * 0.999 <= value <= high * 1.001:
        return ""
    far = value / high if value > high else low / value
    side = "above" if value > high else "below"
    return (
        f"{what} = {value:.3g} is extrapolated: {far:.3g} times {side} the runs behind the fit ({low:.3g}..{high:.3g})"
    )


def _context(context: float | None, measured: Measured) -> str:
    if measured.context is None or context == measured.context:
        return ""
    yours = "" if context is None else f", not {context:g}"
    return f"the runs had a context of {measured.context} tokens{yours}; attention over longer ones is not counted"


def _routers(plan: Plan) -> str:
    share = plan.num_experts / (2 * FF_RATIO * plan.d_model)
    if share <= 1:
        return ""
    return f"routers have {share:.2g} times the parameters of the active experts; at 2.0 the paper saw finer experts get worse"


def _unspent(plan: Plan) -> str:
    if set(plan.bound_by) != {"tokens", "memory"}:
        return ""
    return "tokens and memory both bind: compute that is left over is free and so is a finer G; cap it with --max-granularity"
