"""The entry point: what `torch.compile(model, backend="moec")` calls for each graph that Dynamo captured.

Rewrite the graph, trace again if an assumption of capture is left over, give the rest to Inductor (or to `moec.inner`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

import moec.kernels  # noqa: F401  (registers the kernels of the ops that the rewritten graph calls)
from moec import capture, report
from moec.config import Options, check_inner, check_mode, split
from moec.errors import MoecError, StrictError
from moec.ir import Site
from moec.pipeline import Result, rewrite_graph

log = logging.getLogger("moec")

Compiled = Callable[..., object]


class Backend:
    """A Dynamo backend. There is one in the world, `backend`; `moec.explain` makes others that also keep a report."""

    _moec_backend = True  # what `moec.capture` acts on
    __name__ = "moec"

    def __init__(self, fixed: Mapping[str, object] | None = None, keep: list[Result] | None = None) -> None:
        self._fixed = dict(fixed or {})
        self._keep = keep
        self._carried: list[Site] = []  # refused in a trace that was then made again
        self.backend_ctx_ctor = capture.backend_ctx_ctor

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[object],
        *,
        mode: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Compiled:
        """Compiles one graph. Raises `OptionError` for options nobody knows, `StrictError` with `moec.strict`."""
        ours, rest = split({**self._fixed, **(options or {})})
        check_inner(rest, ours.inner)
        check_mode(mode)
        result = self._rewrite(gm, ours)
        left = capture.markers.marker_places(result.gm)
        refused = [s for s in result.sites if s.status == "refused"]
        if left:
            self._carried += refused or [_unexplained(where) for where in sorted(left)]
            if ours.strict:
                raise StrictError(f"assumptions of capture that no site explains: {', '.join(sorted(left))}")
            capture.retrace_without(left)  # does not return: Dynamo traces the frame again
        # the trace that is used now may hold less of a refused site than the one that was given up: keep what was said then
        told = {s.location for s in refused}
        result.sites[:0] = [s for s in self._carried if s.location not in told]
        self._carried = []
        if self._keep is not None:
            self._keep.append(result)
        report.remember(result.sites)
        return compile_inner(result.gm, example_inputs, ours, mode, rest)

    def _rewrite(self, gm: fx.GraphModule, options: Options) -> Result:
        try:
            result = rewrite_graph(gm, options)
        except MoecError:
            raise
        except Exception as fault:
            if options.strict:
                raise
            log.exception(
                "moec: internal fault; the graph is compiled as it is. Please report this with the traceback: %s", fault
            )
            return Result(gm)
        refused = [s for s in result.sites if s.status == "refused"]
        for site in refused:
            log.info("moec: refused %s: %s", site.location, site.reason)
        if options.strict and refused:
            raise StrictError(f"refused: {refused[0].reason}")
        return result


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[object], options: Options, mode: str | None, rest: Mapping[str, object]
) -> Compiled:
    """The rewritten graph through the inner backend, with torch's caches keyed by moec's own sources and options."""
    tag = hashlib.sha256(f"{torch.compiler.config.cache_key_tag}|{fingerprint()}|{options}".encode()).hexdigest()[:16]
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        if options.inner == "inductor":
            from torch._inductor import list_mode_options
            from torch._inductor.compile_fx import compile_fx

            patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **rest}
            return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[arg-type, return-value]
        inner = torch._dynamo.lookup_backend(options.inner)
        extra = {"options": dict(rest)} if rest else {}
        return inner(gm, list(example_inputs), **extra)  # type: ignore[arg-type]


def _unexplained(where: str) -> Site:
    reason = "tracing assumed here that every expert has tokens, and no routed sum was found for which that makes no difference"
    return Site(status="refused", idiom="capture", location=where, reason=f"{reason} ({where})")


@functools.cache
def fingerprint() -> str:
    """A hash of moec's sources. Torch's caches cannot see a changed autograd formula of a custom op; this does."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted([*root.rglob("*.py"), *(root / "passes").rglob("*.py")]):
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


capture.install()
backend = Backend()
