"""Getting the whole dispatch of an MoE layer into one FX graph, unedited.

Everything that leans on Dynamo's internals lives in this package, one file per kind of seam:

    frames      whose frame is traced, unbacked sizes on, tracing again without an assumption
    branches    `if idx.numel() == 0: continue`
    hits        `for e in hit.nonzero()`
    histogram   `torch.bincount(ids, minlength=E)`
    loops       equal iterations stamped instead of traced (with stamp, twins, fakes, indices, watch)
    markers     what the graph remembers of all this

A backend says that it is moec's by the attribute `_moec_backend = True`; nothing changes for other backends and eager code.
"""

from __future__ import annotations

import contextlib

from . import branches, frames, hits, histogram, loops, markers, watch
from .frames import forget_denied, is_ours, retrace_without
from .loops import stamping

__all__ = ["backend_ctx_ctor", "forget_denied", "install", "is_ours", "markers", "retrace_without", "stamping"]


def install() -> None:
    """Put the seams into Dynamo; once is enough, and more do no harm. Must run before the first frame is traced."""
    for seam in (frames, branches, hits, histogram, watch, loops):
        seam.install()


def backend_ctx_ctor() -> contextlib.AbstractContextManager[None]:
    """The context that Dynamo enters around calls of a backend that has this attribute: makes sure the seams are in."""
    install()
    return contextlib.nullcontext()
