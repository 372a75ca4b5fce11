"""A declared module on its way through the compiler: was any dispatch of experts inside it rewritten?

    moec.declare(layer.mlp, granularity=8)
    torch.compile(model, backend="moec")(x)      # DeclarationError with the reason, if nothing in layer.mlp can be rewritten

Two hooks of the module tell where its call begins and ends. They are empty unless moec is compiling.

    traced, the whole call in one graph    the graph gets `returned(token)`; judged by the backend, once the graph is rewritten
    run by Python, as the graph broke      what is compiled in between is the module's; judged when the call returns

The second kind is why there are hooks: a forward that Dynamo leaves to eager altogether never reaches a backend, so that
nobody but the call itself can tell that it ended without experts. Other backends trace the hooks to nothing, and in eager code
they cost a few microseconds a call.

A promise is kept if one site inside the module was rewritten. A call that Python runs and that compiles nothing (warm code) is
judged, by what was compiled last, only if no earlier call kept the promise. Not noticed: a `forward` that is called without
`__call__`, which runs no hooks; a promise made after its module was compiled (until it is compiled again).
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined"
from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.decorators import skip_code
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import counters
from torch._dynamo.variables import UserFunctionVariable, VariableTracker

from moec.config import Options, split
from moec.errors import DeclarationError, DeclarationWarning
from moec.ir import Declaration, Site

from . import frames, markers
from .seams import wrap

log = logging.getLogger("moec")

ATTRIBUTE = "_moec_declaration"  # of the module; copied and pickled with it, as its hooks are

_modules: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()  # by token: those called so far
_kept: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# What was last compiled in a module that Python runs, for calls of warm code; and what was in the way, by class: code that Dynamo
# has once given up is not traced, and tells nothing, the next time.
_compiled: weakref.WeakKeyDictionary[nn.Module, list[Site]] = weakref.WeakKeyDictionary()
_in_the_way: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


class BrokenPromise(DeclarationError, ShortenTraceback):
    """A DeclarationError that Dynamo hands to the user as it is, although a backend raises it."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call that Python runs; `sites` collects what is compiled until it returns."""

    module: nn.Module
    token: str
    breaks: Mapping[str, int]
    sites: list[Site] = field(default_factory=list)


class _State(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []  # outermost first
        self.listener: list[str] | None = None


_state = _State()


def attach(module: nn.Module, promise: Declaration) -> None:
    """Puts the promise, and the hooks if they are not there yet, on the module."""
    if not hasattr(module, ATTRIBUTE):
        module.register_forward_pre_hook(entered, prepend=True)
        module.register_forward_hook(left, always_call=True)
    setattr(module, ATTRIBUTE, promise)
    _kept.discard(module)
    _warned.discard(module)


# -- the hooks -----------------------------------------------------------------------------------------------------------


def entered(module: nn.Module, args: tuple[object, ...]) -> None:
    """The forward pre-hook of a declared module."""
    if not torch.compiler.is_dynamo_compiling() and (callback := get_eval_frame_callback()):
        _begin(module, callback)


def left(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    """The forward hook of a declared module, called also when its forward raises: then with None."""
    if not torch.compiler.is_dynamo_compiling() and (callback := get_eval_frame_callback()):
        _end(module, callback, output is None)


# Dynamo would compile a hook that Python calls as a frame of its own, and of all that it does nothing would be left.
skip_code(entered.__code__)
skip_code(left.__code__)


@torch.compiler.disable
def _begin(module: nn.Module, callback: object) -> None:
    if frames.is_ours(callback):
        _state.calls.append(Call(module, token_of(module), dict(counters["graph_break"])))


@torch.compiler.disable
def _end(module: nn.Module, callback: object, raised: bool) -> None:
    mine = [i for i, call in enumerate(_state.calls) if call.module is module]
    if not mine:
        return
    call = _state.calls[mine[-1]]
    del _state.calls[mine[-1] :]
    if raised or (not call.sites and module in _kept) or _options(callback).disable is True:
        return
    broken = [reason for reason, n in counters["graph_break"].items() if n > call.breaks.get(reason, 0)]
    if call.sites:
        _compiled[module] = [replace(s, before=None, after=None, facts=()) for s in call.sites]
    judge(module, call.sites or _compiled.get(module, []), broken)


def _options(callback: object) -> Options:
    """moec's options of the torch.compile call whose callback that is."""
    given: dict[str, object] = {}
    backend = callback
    while backend is not None:
        for name in ("kwargs", "keywords"):  # of torch.compile's wrapper, of a functools.partial
            if isinstance(kwargs := getattr(backend, name, None), dict):
                given |= kwargs.get("options") or {}
        given |= getattr(backend, "_fixed", {})
        backend = next((inner for n in frames._INNER if (inner := getattr(backend, n, None)) is not None), None)
    return split(given)[0]


# -- while compiling -----------------------------------------------------------------------------------------------------


def token_of(module: nn.Module) -> str:
    """The module's name in a graph. No two that live have the same, and none follows from that of another layer."""
    token = f"{type(module).__name__}@{id(module):x}"
    _modules[token] = module
    return token


def declaration_of(token: str) -> Declaration | None:
    """What was promised about the module of that name; None if it is no more."""
    return getattr(_modules.get(token), ATTRIBUTE, None)


def around(*nodes: fx.Node | None) -> tuple[str, ...]:
    """The declared modules in whose calls the nodes were traced, by token, outermost first."""
    tokens = {id(module): token for token, module in list(_modules.items())}
    found = dict.fromkeys(call.token for call in _state.calls)
    for node in nodes if tokens else ():
        for key in node.meta.get("nn_module_stack") or {} if node is not None else {}:
            number = key.split("@")[0]  # the module's id; "@2" says that it is its second call in this graph
            if number.isdigit() and int(number) in tokens:
                found[tokens[int(number)]] = None
    return tuple(found)


def note(sites: Iterable[Site]) -> None:
    """Sites of a graph that is compiled or given up now."""
    for call in _state.calls:
        call.sites.extend(sites)


def settle(returned: Iterable[str], sites: Sequence[Site]) -> None:
    """Judges the modules whose whole call is in a graph with these sites. Raises DeclarationError."""
    for token in dict.fromkeys(returned):
        module = _modules.get(token)
        if module is not None:
            mine = [s for s in sites if token in s.within]
            judge(module, mine or [s for s in sites if s.status == "refused" and not s.within])


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Within, broken promises are collected instead of raised."""
    before, _state.listener = _state.listener, []
    try:
        yield _state.listener
    finally:
        _state.listener = before


# -- the verdict ---------------------------------------------------------------------------------------------------------


def judge(module: nn.Module, sites: Sequence[Site], breaks: Sequence[str] = ()) -> None:
    """Raises DeclarationError, or warns, if none of a module's sites was rewritten, or if one contradicts what was promised."""
    promise: Declaration | None = getattr(module, ATTRIBUTE, None)
    rewritten = [s for s in sites if s.status == "rewritten"]
    if promise is None or (not rewritten and any(s.idiom == "switched off" for s in sites)):
        return
    contradiction = next((c for s in rewritten if (c := _contradiction(promise, s)) is not None), None)
    if rewritten and contradiction is None:
        if _state.listener is None:
            _kept.add(module)
        return
    message = contradiction or _unkept(promise, module, sites, breaks)
    if _state.listener is not None:
        _state.listener.append(message)
    elif promise.on_refusal == "error" or contradiction is not None:
        raise BrokenPromise(f"{message}\n{_remedy(promise, contradiction)}", first_useful_frame=inspect.currentframe())
    elif module not in _warned:
        _warned.add(module)
        log.warning("moec: %s", message)
        warnings.warn(f"moec: {message}", DeclarationWarning, stacklevel=2)


def _contradiction(promise: Declaration, site: Site) -> str | None:
    if promise.granularity is None or promise.d_ff is None or site.d_expert is None:
        return None
    if abs(promise.granularity * site.d_expert - promise.d_ff) < 1e-6 * promise.d_ff:
        return None
    return (
        f"{promise.name} was declared with granularity={promise.granularity:g} and d_ff={promise.d_ff} ({promise.location}), so "
        f"with experts of width {promise.d_ff / promise.granularity:g}, but those at {site.location} have width {site.d_expert}: "
        f"with this d_ff say granularity={promise.d_ff / site.d_expert:g}, with this granularity "
        f"d_ff={promise.granularity * site.d_expert:g}"
    )


def _unkept(promise: Declaration, module: nn.Module, sites: Sequence[Site], breaks: Sequence[str]) -> str:
    reasons = list(dict.fromkeys(f"refused: {s.reason}" for s in sites))
    reasons += [f"graph break: {reason.strip().splitlines()[0]}" for reason in breaks]
    if reasons:
        _in_the_way[type(module)] = reasons
    else:
        unseen = f"no dispatch of experts was found in what Dynamo traced of its forward ({_forward_of(module)})"
        reasons = _in_the_way.get(type(module), [unseen])
    told = "".join(f"\n  {reason}" for reason in reasons)
    return f"{promise.name} was declared to hold experts ({promise.location}), and none could be rewritten:{told}"


def _remedy(promise: Declaration, contradiction: str | None) -> str:
    if contradiction is not None:
        return "Nothing was compiled. Change the declaration."
    return (
        "Change the line that is named, or declare the module that does hold the experts; moec.explain(model, ...) shows all "
        'that was found. To go on as it is: moec.declare(..., on_refusal="warn"), or options={"moec.disable": True}.'
    )


def _forward_of(module: nn.Module) -> str:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(module).__name__


# -- the seam ------------------------------------------------------------------------------------------------------------


def install() -> None:
    wrap(UserFunctionVariable, "call_function", _mark)


def _mark(original: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    """Calls that are nothing at run time leave their sentence in a graph of ours."""

    def call_function(
        self: UserFunctionVariable,
        tx: InstructionTranslatorBase,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if self.fn in (markers.declared, entered, left) and frames.is_ours(tx.output.compiler_fn):
            if self.fn is markers.declared:
                given = {name: _constant(value) for name, value in kwargs.items()}
                tx.output.create_proxy("call_function", markers.declared, tuple(map(_constant, args)), given)
            else:
                token = token_of(args[0].realize().value)
                if self.fn is left:
                    tx.output.create_proxy("call_function", markers.returned, (token,), {})
        return original(self, tx, args, kwargs)

    return call_function


def _constant(value: VariableTracker) -> object:
    """A number or a text; a size that Dynamo made symbolic becomes the number that it is, with a guard."""
    value = value.realize()
    return value.as_python_constant() if value.is_python_constant() else value.evaluate_expr()
