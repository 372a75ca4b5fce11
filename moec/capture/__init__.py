"""Getting the whole dispatch of an MoE layer into one FX graph, unedited.

Everything that leans on Dynamo's internals lives in this package, one file per kind of seam:

    frames      whose frame is traced, unbacked sizes on, tracing again without an assumption
    branches    `if idx.numel() == 0: continue`
    hits        `for e in hit.nonzero()`
    histogram   `torch.bincount(ids, minlength=E)`
    loops       equal iterations are stamped instead of traced (lesson, stamp, twins, fakes, watch, indices, liveness, trees)
    counters    Python numbers that depend on an assumption
    markers     what the graph remembers of all this
    promises    was a module given to moec.declare rewritten?

A backend says that it is moec's by the attribute `_moec_backend = True`; nothing changes for other backends and eager code.
A seam that this torch does not have stays off, and is logged once.
"""

from __future__ import annotations

import contextlib
import importlib

from . import markers, promises
from .frames import forget_denied, is_ours, retrace_exactly, retrace_without, trace_plainly
from .seams import log, stamping

__all__ = [
    "backend_ctx_ctor",
    "forget_denied",
    "install",
    "is_ours",
    "markers",
    "promises",
    "retrace_exactly",
    "retrace_without",
    "trace_plainly",
    "stamping",
]

_SEAMS = ("frames", "branches", "hits", "histogram", "watch", "loops", "counters", "promises")
_installed: set[str] = set()


def install() -> None:
    """Put the seams into Dynamo; once is enough, and more do no harm. Must run before the first frame is traced."""
    for name in _SEAMS:
        if name in _installed:
            continue
        _installed.add(name)
        try:
            importlib.import_module(f".{name}", __name__).install()
        except (ImportError, AttributeError) as missing:
            log.warning("moec.capture: the seam `%s` does not fit this torch and stays off: %s", name, missing)


def backend_ctx_ctor() -> contextlib.AbstractContextManager[None]:
    """The context that Dynamo enters around calls of a backend that has this attribute: makes sure the seams are in."""
    install()
    return contextlib.nullcontext()
