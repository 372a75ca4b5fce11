"""What happened to a model, for people: the report that `moec.explain(model, *args)` returns.

report = moec.explain(model, input_ids)
print(report)              # one line for each MoE layer, reasons for what was refused
report.sites[0].before     # the original region as a GraphModule, .after the rewritten one
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from torch import fx

from moec.ir import Site

_recent: list[Site] = []


def remember(sites: list[Site]) -> None:
    """Keeps the sites of the last compilations of this process, the newest 256, for `last_sites`."""
    _recent.extend(sites)
    del _recent[:-256]


def last_sites() -> list[Site]:
    """The sites of the last compilations of this process, oldest first."""
    return list(_recent)


@dataclass(eq=False)
class Report:
    """One forward under moec. `graphs` are the rewritten graphs, readable and runnable; `broken_promises` tells of each declared
    module in which nothing was rewritten, and why.
    """

    graphs: list[fx.GraphModule] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    graph_breaks: int = 0
    break_reasons: list[str] = field(default_factory=list)
    broken_promises: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


COLUMNS = ("layer", "status", "idiom", "experts", "top-k", "d_model", "d_expert", "G", "strategy", "where")


def _lines(report: Report) -> list[str]:
    rewritten = [s for s in report.sites if s.status == "rewritten"]
    refused = [s for s in report.sites if s.status == "refused"]
    graphs = f"{len(report.graphs)} graph{'s' if len(report.graphs) != 1 else ''}"
    breaks = f"{report.graph_breaks} graph break{'s' if report.graph_breaks != 1 else ''}"
    lines = [f"moec: {len(rewritten)} of {len(report.sites)} MoE sites rewritten ({graphs}, {breaks})"]
    if not report.graphs:
        lines.append("Dynamo captured no graph: a break inside a loop or a context left the whole frame to eager.")
    elif not report.sites:
        lines.append("No MoE dispatch was found: nothing was changed, the model compiles as under Inductor.")
    rows: list[tuple[str, ...]] = [COLUMNS]
    for i, s in enumerate(report.sites):
        granularity = "" if s.granularity is None else f"{s.granularity:g}{'*' if s.granularity_assumed else ''}"
        cells = (
            i,
            s.status,
            s.idiom,
            s.num_experts,
            s.top_k,
            s.d_model,
            s.d_expert,
            granularity,
            s.strategy,
            _short(s.location),
        )
        rows.append(tuple("" if c is None else str(c) for c in cells))
    if len(rows) > 1:
        widths = [max(len(r[c]) for r in rows) for c in range(len(COLUMNS))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
    if any(s.granularity is not None and s.granularity_assumed for s in report.sites):
        lines.append("* granularity G = d_ff / d_expert, assuming d_ff = 4 * d_model")
    lines += [f"refused{_declared(s)}: {s.reason}" for s in dict.fromkeys(refused)]
    checks = dict.fromkeys(s.verified for s in rewritten if s.verified)
    lines += [f"verify: {c}" for c in checks]
    lines += [f"graph break: {reason.splitlines()[0]}" for reason in dict.fromkeys(report.break_reasons)]
    lines += [f"promise not kept: {told}" for told in report.broken_promises]
    return lines


def _declared(site: Site) -> str:
    return f" in {site.declared}, declared to hold experts" if site.declared is not None else ""


def _short(location: str) -> str:
    path, _, line = location.rpartition(":")
    return f"{os.path.basename(path)}:{line}" if path else location
