"""`moec.explain`: one forward under moec, and a report of it. (A module called `explain` would hide the function.)"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from moec import capture
from moec.backend import Backend
from moec.pipeline import Result
from moec.report import Report


def explain(model: Callable[..., object], *args: object, **kwargs: object) -> Report:
    """Runs `model(*args, **kwargs)` once under moec and says what was found and what was done.

    The rewritten graphs run without Inductor, so this takes about as long as tracing. The model keeps its state as after any
    forward. A promise (`moec.declare`) that cannot be kept is told, not raised. Options: those of the environment
    (`MOEC_DISABLE`); verification as by default ("sample").
    """
    kept: list[Result] = []
    compiled = torch.compile(model, backend=Backend({"moec.inner": "eager"}, kept))
    with _count_breaks() as breaks, capture.promises.listening() as broken:
        compiled(*args, **kwargs)
    report = Report(graphs=[r.gm for r in kept if not r.superseded])
    told = set()
    for site in (s for r in kept for s in r.sites):
        # a refusal is heard once, though the frame was traced twice
        if site.status != "refused" or (site.location, site.reason) not in told:
            report.sites.append(site)
        told.add((site.location, site.reason))
    report.break_reasons = breaks
    report.graph_breaks = len(breaks)
    report.broken_promises = list(dict.fromkeys(broken))
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
