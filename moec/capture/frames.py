"""Whose frame is being traced, and which assumptions it may make.

Dynamo traces one Python frame for one backend; everything in this package acts only if that backend is moec's
(`_moec_backend = True` on the callable, however torch has wrapped it). The test is made against the frame, not the call:
a scope entered around the call would also reach eager helpers and other backends' functions called from inside.

Unbacked sizes (`nonzero`) and scalars (`tolist`) are switched on in the one place where a frame reads these settings, the
construction of its OutputGraph, and in `Tensor.item`; the global configuration never changes while user code or a
backend runs.

`retrace_without` is the way back: it remembers the places a frame must not assume about, and makes Dynamo start over.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined"
from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch._dynamo.config as dynamo_config
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import CompileContext
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound

from . import collector
from .seams import log, wrap

# The ways torch and functools keep the callable that they wrap.
_INNER = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")

# Places denied so far, for the module whose forward is traced (or the code, for a plain function): a recompilation for
# another shape must not repeat an assumption that has already failed.
_denied: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()
# Frames that are traced without any of this, by the same key: the code objects, each for one compilation (another shape may do).
_plain: weakref.WeakKeyDictionary[object, dict[object, object]] = weakref.WeakKeyDictionary()
# Frames whose stamped iterations need example values of their own, by the same key.
_exact: weakref.WeakKeyDictionary[object, set[object]] = weakref.WeakKeyDictionary()


def is_ours(backend: object) -> bool:
    """Whether `backend` is moec's, seen through the wrappers of torch.compile, Dynamo and functools."""
    for _ in range(16):  # wrappers are few; the bound is against cycles
        if backend is None:
            return False
        if getattr(backend, "_moec_backend", False) is True:
            return True
        backend = next((inner for name in _INNER if (inner := getattr(backend, name, None)) is not None), None)
    return False


def ours(tx: InstructionTranslatorBase) -> bool:
    """Whether the frame that `tx` belongs to is being traced for moec."""
    return getattr(tx.output, "_moec_ours", False)


def where(tx: InstructionTranslatorBase) -> str:
    """ "file:line" of the user's code that is being traced."""
    return f"{tx.f_code.co_filename}:{tx.lineno}"


def assume(tx: InstructionTranslatorBase, marker: Callable[..., None], *operands: object) -> None:
    """Put a marker into the graph for the line that is being traced."""
    assumptions(tx).append(where(tx))
    tx.output.create_proxy("call_function", marker, (*operands, where(tx)), {})


def assumptions(tx: InstructionTranslatorBase) -> list[str]:
    """The places of what was assumed in this frame so far, in order."""
    return vars(tx.output).setdefault("_moec_assumptions", [])


def may_assume(tx: InstructionTranslatorBase) -> bool:
    return ours(tx) and where(tx) not in _denied.get(_owner(tx.output.root_tx), ())


def retrace_without(wheres: Iterable[str], reason: str = "no rewritten region discharges it") -> NoReturn:
    """Have Dynamo trace the current frame again without the assumptions made at `wheres`; call it inside the backend.

    Does not return: the exception it raises must reach Dynamo. The places then break the graph as they do without moec.
    """
    root = InstructionTranslator.current_tx().output.root_tx
    denied = _denied.setdefault(_owner(root), set())
    new = set(wheres) - denied
    if not new:
        raise AssertionError(f"moec: already retraced without {sorted(set(wheres))}")
    denied |= new
    _exact.setdefault(_owner(root), set()).add(root.f_code)  # this loop will not be rewritten
    message = (
        "moec: traced again without the assumption that every expert has tokens, at "
        + ", ".join(sorted(new))
        + f" ({reason}); the graph breaks there as it does without moec"
    )
    log.warning(message)
    warnings.warn(message, stacklevel=2)
    # The second trace takes other branches than the first, so what the first one learnt about its own is void.
    root.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="moec: assumption not discharged")


def trace_plainly(reason: str, root: InstructionTranslatorBase | None = None) -> NoReturn:
    """Have Dynamo trace the current frame again without any help of ours: as for a backend that is not moec's.

    Does not return: the exception it raises must reach Dynamo.
    """
    if root is None:
        root = InstructionTranslator.current_tx().output.root_tx
    _plain.setdefault(_owner(root), {})[root.f_code] = CompileContext.current_compile_id()
    message = f"moec: {root.f_code.co_name} is traced again as plain torch.compile would: {reason}"
    log.warning(message)
    warnings.warn(message, stacklevel=2)
    root.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="moec: tracing plainly")


def retrace_exactly() -> NoReturn:
    """Have Dynamo trace the current frame again, every stamped iteration with example values of its own (see `fakes`).

    Does not return: the exception it raises must reach Dynamo.
    """
    root = InstructionTranslator.current_tx().output.root_tx
    _exact.setdefault(_owner(root), set()).add(root.f_code)
    log.debug(
        "moec.capture: %s is traced again with exact sizes: a stamped loop was not rewritten", root.f_code.co_name
    )
    root.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="moec: exact sizes")


def may_borrow(tx: InstructionTranslatorBase) -> bool:
    """Whether stamped iterations of this frame may borrow example values."""
    root = tx.output.root_tx
    return root.f_code not in _exact.get(_owner(root), ())


def forget_denied() -> None:
    """Allow all assumptions again (after `torch._dynamo.reset()`, in tests)."""
    _denied.clear()
    _plain.clear()
    _exact.clear()


def _owner(root: InstructionTranslatorBase) -> object:
    module = root.f_locals.get("self")
    try:
        hash(module), weakref.ref(module)
    except TypeError:
        return root.f_code
    return module


def install() -> None:
    wrap(InstructionTranslator, "run", _give_way)
    wrap(OutputGraph, "__init__", _mark_and_allow_unbacked)
    wrap(CheckFunctionManager, "__init__", _guard_calmly)
    wrap(TensorVariable, "call_method", _allow_item)


def _mark_and_allow_unbacked(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    def __init__(self: OutputGraph, *args: object, **kwargs: object) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        self._moec_ours = is_ours(given.get("compiler_fn")) and not _is_plain(given)
        if not self._moec_ours:
            return original(self, *args, **kwargs)
        with dynamo_config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
            return original(self, *args, **kwargs)

    return __init__


def _is_plain(given: dict[str, object]) -> bool:
    """Whether the frame of an OutputGraph (by its constructor's arguments) was given up by `trace_plainly`."""
    code, scope = given.get("f_code"), given.get("local_scope")
    owners = (scope.get("self"), code) if isinstance(scope, dict) else (code,)
    for owner in owners:
        try:
            if code in (given_up := _plain.get(owner, {})) and given_up[code] == CompileContext.current_compile_id():
                return True
        except TypeError:  # not hashable, or no weak reference to it
            continue
    return False


def _give_way(original: Callable[..., None]) -> Callable[..., None]:
    """An unknown size that torch cannot trace on with is our doing: without our settings the graph would have broken before."""

    def run(self: InstructionTranslator) -> None:
        try:
            with collector.calm() if ours(self) else contextlib.nullcontext():
                return original(self)
        except (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound) as fault:
            if not ours(self):
                raise
            trace_plainly(f"torch cannot trace it in one graph ({type(fault).__name__})", self)

    return run


def _guard_calmly(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: CheckFunctionManager, *args: object, **kwargs: object) -> None:
        graph = kwargs.get("output_graph", args[1] if len(args) > 1 else None)
        with collector.calm() if getattr(graph, "_moec_ours", False) else contextlib.nullcontext():
            original(self, *args, **kwargs)

    return __init__


def _allow_item(original: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    def call_method(
        self: TensorVariable,
        tx: InstructionTranslatorBase,
        name: str,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if name != "item" or not ours(tx):
            return original(self, tx, name, args, kwargs)
        with dynamo_config.patch(capture_scalar_outputs=True):
            return original(self, tx, name, args, kwargs)

    return call_method
