"""A plan as a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moec.scaling.costs import Costs, conventions
from moec.scaling.device import Device, Doubling
from moec.scaling.law import Coefficients, compute_ratio
from moec.scaling.optimum import Alternative, Plan
from moec.scaling.successors import Opinion

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def count(value: float) -> str:
    """28.8B, 1.50M, 640."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}" if value < 1e15 else f"{value:.3g}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """3.2 min, 12 h, 40 d."""
    for size, unit in ((86400 * 2, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'd' else size):.3g} {unit}"
    return f"{seconds:.3g} s"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def plan_lines(
    found: Plan,
    built: Plan,
    law: Coefficients,
    costs: Costs,
    opinions: Sequence[Opinion],
    steps: Sequence[Doubling],
    warnings: Sequence[str],
    device: Device | None,
) -> list[str]:
    """The page that `moec plan` prints."""
    names = conventions(found.d_model, found.d_expert)
    head = [f"moec plan: G = {found.granularity:g} at E = {found.expansion:g}", ""]
    bound = f"held back by {' and '.join(found.bound_by)}" if found.bound_by else ""
    lines = head + table(_columns(found, built))
    lines += [bound] * bool(bound)
    lines += [
        "",
        f"G = {names.paper:g} as 4 d_model / d_expert (here), {names.leverage:g} as 2 d_model / d_expert, "
        f"{names.sonic:g} as d_model / d_expert",
        f"law: {law.name} ({law.source}); c_f = {costs.per_param:g}, c_r = {costs.routing:g}",
        "",
        "Other granularities for the same budget:",
        *table(
            [
                ("G", "d_model", "tokens", "loss", "extra compute for the best loss"),
                *map(_alternative, found.alternatives),
            ]
        ),
    ]
    if device is not None:
        lines += ["", f"Measured on {device.machine}, a whole model of d_model {found.d_model:.0f}:", *_steps(steps)]
    else:
        lines += [
            "",
            "Break-even, if a token may take longer: a doubling of G pays while it takes less than this longer",
            *_allowed(law),
        ]
    lines += ["", "What later laws say:", *table([_OPINION_HEAD, *map(_opinion, opinions)])]
    lines += ["", "Be warned:", *(f"- {w}" for w in warnings)] if warnings else []
    return lines


def _columns(found: Plan, built: Plan) -> list[tuple[str, str, str]]:
    def pair(name: str, form: str, unit: str = "") -> tuple[str, str, str]:
        one, two = (format(getattr(p, name), form) + unit for p in (found, built))
        return name, one, two

    rows = [("", "optimum", "buildable"), pair("d_model", ".1f"), pair("n_blocks", ".2f"), pair("d_expert", ".1f")]
    rows += [pair("num_experts", "g"), pair("top_k", "g")]
    rows += [
        (n, count(getattr(found, n)), count(getattr(built, n))) for n in ("tokens", "active_params", "total_params")
    ]
    rows += [pair("flops", ".3e"), pair("loss", ".4f")]
    rows += [
        ("memory", f"{count(found.memory)}".replace("B", "G") + "B", f"{count(built.memory)}".replace("B", "G") + "B")
    ]
    if found.seconds is not None and built.seconds is not None:
        rows += [("time", duration(found.seconds), duration(built.seconds))]
    return rows


def _alternative(a: Alternative) -> tuple[str, ...]:
    extra = (
        "cannot be reached" if math.isinf(a.extra_compute) else f"{a.extra_compute:+.1%}" if a.extra_compute else "best"
    )
    return f"{a.granularity:g}", f"{a.d_model:.0f}", count(a.tokens), f"{a.loss:.4f}", extra


def _steps(steps: Sequence[Doubling]) -> list[str]:
    if not steps:
        return ["only one G was measured: nothing to compare"]
    rows = [("G", "a token takes longer by", "may take longer by", "")]
    rows += [
        (f"{s.before:g} -> {s.after:g}", f"{s.slowdown:+.1%}", f"{s.allowed:.1%}", "pays" if s.pays else "does not pay")
        for s in steps
    ]
    return table(rows)


def _allowed(law: Coefficients) -> list[str]:
    pairs = [(2.0**i, 2.0 ** (i + 1)) for i in range(6)]
    return ["  ".join(f"{a:g}->{b:g} {compute_ratio(law, a, b) - 1:.1%}" for a, b in pairs)]


_OPINION_HEAD = ("law", "its G is", "planned", "it advises", "as G here", "worth, in its eyes", "")


def _opinion(o: Opinion) -> tuple[str, ...]:
    worth = f"{o.worth:+.1%} {o.unit}" if o.unit.startswith("of") else f"{o.worth:+.4f} {o.unit}"
    return (
        o.law,
        o.convention,
        f"{o.planned:.3g}",
        f"{o.own:.3g}",
        f"{o.paper:.3g}",
        worth,
        "DISAGREES" if o.disagrees else "agrees",
    )
