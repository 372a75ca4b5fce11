"""What happened to a model, for people: `moec.explain(model, *args)`.

    report = moec.explain(model, input_ids)
    print(report)              # one line for each MoE layer, reasons for what was refused
    report.sites[0].before     # the original region as a GraphModule, .after the rewritten one
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
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
    """One forward under moec. `graphs` are the rewritten graphs, readable and runnable."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    graph_breaks: int = 0
    break_reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: Callable[..., object], *args: object, **kwargs: object) -> Report:
    """Runs `model(*args, **kwargs)` once under moec and says what was found and what was done.

    The rewritten graphs run without Inductor, so this takes about as long as tracing. The model keeps its state as after any
    forward. Options: those of the environment (`MOEC_DISABLE`); verification as by default ("sample").
    """
    from moec.backend import Backend  # the backend reports to this module

    kept: list = []
    compiled = torch.compile(model, backend=Backend({"moec.inner": "eager"}, kept))
    with _count_breaks() as breaks:
        compiled(*args, **kwargs)
    report = Report(graphs=[r.gm for r in kept], sites=[s for r in kept for s in r.sites])
    report.break_reasons = breaks
    report.graph_breaks = len(breaks)
    return report


@contextlib.contextmanager
def _count_breaks() -> Iterator[list[str]]:
    """The reasons of the graph breaks within, from Dynamo's own counters."""
    counters = torch._dynamo.utils.counters["graph_break"]
    before = dict(counters)
    found: list[str] = []
    yield found
    for reason, count in counters.items():
        found += [reason] * (count - before.get(reason, 0))


COLUMNS = ("layer", "status", "idiom", "experts", "top-k", "d_model", "d_expert", "G", "strategy", "where")


def _lines(report: Report) -> list[str]:
    rewritten = [s for s in report.sites if s.status == "rewritten"]
    refused = [s for s in report.sites if s.status == "refused"]
    graphs = f"{len(report.graphs)} graph{'s' if len(report.graphs) != 1 else ''}"
    breaks = f"{report.graph_breaks} graph break{'s' if report.graph_breaks != 1 else ''}"
    lines = [f"moec: {len(rewritten)} of {len(report.sites)} MoE sites rewritten ({graphs}, {breaks})"]
    if not report.sites:
        lines.append("No MoE dispatch was found: nothing was changed, the model compiles as under Inductor.")
    rows = [COLUMNS]
    for i, s in enumerate(report.sites):
        granularity = "" if s.granularity is None else f"{s.granularity:g}{'*' if s.granularity_assumed else ''}"
        cells = (i, s.status, s.idiom, s.num_experts, s.top_k, s.d_model, s.d_expert, granularity, s.strategy, _short(s.location))
        rows.append(tuple("" if c is None else str(c) for c in cells))
    if len(rows) > 1:
        widths = [max(len(r[c]) for r in rows) for c in range(len(COLUMNS))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
    if any(s.granularity is not None and s.granularity_assumed for s in report.sites):
        lines.append("* granularity G = d_ff / d_expert, assuming d_ff = 4 * d_model")
    lines += [f"refused: {s.reason}" for s in dict.fromkeys(refused)]
    checks = dict.fromkeys(s.verified for s in rewritten if s.verified)
    lines += [f"verify: {c}" for c in checks]
    lines += [f"graph break: {reason.splitlines()[0]}" for reason in dict.fromkeys(report.break_reasons)]
    return lines


def _short(location: str) -> str:
    path, _, line = location.rpartition(":")
    return f"{os.path.basename(path)}:{line}" if path else location
