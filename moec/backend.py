"""The entry point: what `torch.compile(model, backend="moec")` calls for each graph that Dynamo captured.

Rewrite the graph, trace again if an assumption of capture is left over, give the rest to Inductor (or to `moec.inner`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import fx

import moec.kernels  # noqa: F401  (registers the kernels of the ops that the rewritten graph calls)
from moec import capture, report
from moec.config import Options, check_inner, check_mode, split
from moec.errors import MoecError, StrictError
from moec.fx import value
from moec.ir import Site
from moec.parallel.graphs import spread
from moec.passes.bundle import bundle
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
        self.backend_ctx_ctor = capture.backend_ctx_ctor

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[object],
        *,
        mode: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Compiled:
        """Compiles one graph. Raises `OptionError` for options nobody knows, `StrictError` with `moec.strict`, and
        `DeclarationError` for a declared module in which nothing could be rewritten.
        """
        ours, rest = split({**self._fixed, **(options or {})})
        check_inner(rest, ours.inner)
        check_mode(mode)
        result = self._rewrite(gm, ours)
        spread_out = spread(result, ours)
        ours, rest = (spread_out.options, {}) if spread_out.options is not ours else (ours, rest)
        left = capture.markers.marker_places(result.gm)
        if left:
            refused = [s for s in result.sites if s.status == "refused"]
            given_up = refused or [_unexplained(where) for where in sorted(left)]
            self._tell(Result(result.gm, given_up, superseded=True))
            capture.promises.note(given_up)
            if ours.strict:
                raise StrictError(f"assumptions of capture that no site explains: {', '.join(sorted(left))}")
            capture.retrace_without(left)  # does not return: Dynamo traces the frame again
        if capture.markers.borrowed(result.gm):
            capture.retrace_exactly()  # nor does this
        self._tell(result)
        capture.promises.note(result.sites)
        capture.promises.settle(result.returned, result.sites)
        unknown = has_unknown_sizes(result.gm)
        try:
            with nullcontext() if unknown else torch_defaults(result.gm):
                return compile_inner(result.gm, example_inputs, ours, mode, rest)
        except Exception as fault:
            if not unknown or ours.strict or spread_out.layouts:
                raise
            # a refused site whose sizes are unknown: without us the graph would have broken there
            capture.trace_plainly(f"{ours.inner} cannot compile it in one graph ({type(fault).__name__})")

    def _tell(self, result: Result) -> None:
        if self._keep is not None:
            self._keep.append(result)
        report.remember(result.sites)

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
        refused = [s for s in result.sites if s.status == "refused" and s.idiom != "switched off"]
        for site in refused:
            log.info("moec: refused %s: %s", site.location, site.reason)
        if options.strict and refused:
            raise StrictError(f"refused: {refused[0].reason}")
        return result


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[object], options: Options, mode: str | None, rest: Mapping[str, object]
) -> Compiled:
    """The rewritten graph through the inner backend, with torch's caches keyed by moec's own sources and options."""
    bundled = bundle(gm, example_inputs)
    if bundled is not None:
        gm, example_inputs = bundled.gm, bundled.example_inputs
    tag = hashlib.sha256(f"{torch.compiler.config.cache_key_tag}|{fingerprint()}|{options}".encode()).hexdigest()[:16]
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        if options.inner == "inductor":
            from torch._inductor import list_mode_options
            from torch._inductor.compile_fx import compile_fx

            patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **rest}
            compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[arg-type]
        else:
            inner = torch._dynamo.lookup_backend(options.inner)
            extra = {"options": dict(rest)} if rest else {}
            compiled = inner(gm, list(example_inputs), **extra)  # type: ignore[arg-type]
    result: Compiled = compiled if bundled is None else bundled.call(compiled)
    return result


def has_unknown_sizes(gm: fx.GraphModule) -> bool:
    """Whether the graph still holds sizes that only its data decides."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return any(
        free_unbacked_symbols(value(n)) for n in gm.graph.nodes if isinstance(value(n), (torch.Tensor, torch.SymInt))
    )


@contextlib.contextmanager
def torch_defaults(gm: fx.GraphModule) -> Iterator[None]:
    """While the inner backend runs, unknown sizes and scalars are allowed only if the user's own settings allow them."""
    fakes = (v for n in gm.graph.nodes if isinstance(v := value(n), torch._subclasses.FakeTensor))
    shape_env = getattr(getattr(next(fakes, None), "fake_mode", None), "shape_env", None)
    names = {
        "allow_scalar_outputs": "capture_scalar_outputs",
        "allow_dynamic_output_shape_ops": "capture_dynamic_output_shape_ops",
    }
    settings = getattr(shape_env, "settings", None)
    if settings is None or not all(hasattr(settings, n) for n in names):
        yield
        return
    before = {n: getattr(settings, n) for n in names}
    try:
        for name, users in names.items():
            object.__setattr__(settings, name, getattr(torch._dynamo.config, users))
        yield
    finally:
        for name, was in before.items():
            object.__setattr__(settings, name, was)


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
