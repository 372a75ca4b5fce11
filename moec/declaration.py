"""`moec.declare`: the promise that a module which someone else wrote holds experts.

    moec.declare(model.layers[3].mlp, granularity=8)
    torch.compile(model, backend="moec")(x)         # rewritten, with G = 8 in the report; or DeclarationError with the reason

Without it, a layer that moec does not recognize runs as it was, in silence unless one asks for `moec.explain`. The module gets
one attribute and two forward hooks, which do nothing in eager code and under other backends; parameters and state_dict stay as
they are, copies and pickles of the module carry the promise along. What the compiler does about it is in
`moec/capture/promises.py`.

Not handled: modules whose `forward` is called directly, since hooks run in `__call__`.
"""

from __future__ import annotations

import sys
from typing import TypeVar

from torch import nn

from moec.capture import promises
from moec.errors import DeclarationError
from moec.granularity.modules import looks_like_experts
from moec.ir import Declaration

M = TypeVar("M", bound=nn.Module)

ON_REFUSAL = ("error", "warn")


def declare(
    module: M,
    granularity: float | None = None,
    *,
    d_ff: int | None = None,
    on_refusal: str = "error",
    name: str | None = None,
) -> M:
    """Promises that `module` holds experts; returns it.

    granularity   G = d_ff / d_expert, for the schedule and the report. Without it G follows from `d_ff`, or is
                  assumed as for modules that nobody declared
    d_ff          width of the dense feed-forward block that the experts replace
    on_refusal    "error": compiling the module with backend="moec" raises DeclarationError if nothing in it can be rewritten;
                  "warn": DeclarationWarning instead, once
    name          what messages and the report call it; its class, unless given

    A second promise about a module replaces the first. Raises DeclarationError where the promise cannot be true: something that
    is no module, that has no parameters, that holds nothing like experts; a G that does not divide d_ff.
    """
    _check_module(module)
    _check_sizes(granularity, d_ff)
    if on_refusal not in ON_REFUSAL:
        raise DeclarationError(f"on_refusal is one of {', '.join(map(repr, ON_REFUSAL))}, not {on_refusal!r}")
    frame = sys._getframe(1)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    promise = Declaration(name or type(module).__name__, where, granularity, d_ff, on_refusal)
    promises.attach(module, promise)
    return module


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise DeclarationError(
            f"moec.declare takes the nn.Module that holds the experts, not {type(module).__name__}; "
            + (
                "declare an instance, not the class"
                if isinstance(module, type)
                else "for a function, declare the module it runs"
            )
        )
    kind = type(module).__name__
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise DeclarationError(f"a {kind} is never called; declare the module whose forward runs the experts in it")
    if next(module.parameters(), None) is None:
        raise DeclarationError(
            f"{kind} has no parameters, so no experts; declare the module that owns the experts' weights"
        )
    if not looks_like_experts(module):
        raise DeclarationError(
            f"nothing in {kind} looks like experts: no weight [E, ...] of three dimensions, no list of equal modules, no "
            "attribute num_experts. Declare the module that holds them; if it is this one, in a form of its own, give it an "
            "attribute num_experts"
        )


def _check_sizes(granularity: float | None, d_ff: int | None) -> None:
    if d_ff is not None and (isinstance(d_ff, bool) or not isinstance(d_ff, int) or d_ff < 1):
        raise DeclarationError(f"d_ff is a whole number of at least 1, the width of the dense block; not {d_ff!r}")
    if granularity is None:
        return
    if isinstance(granularity, bool) or not isinstance(granularity, (int, float)) or not 0 < granularity < float("inf"):
        raise DeclarationError(f"granularity is a positive number, d_ff / d_expert; not {granularity!r}")
    if d_ff is not None and abs(d_ff / granularity - round(d_ff / granularity)) > 1e-6:
        raise DeclarationError(
            f"granularity={granularity:g} does not divide d_ff={d_ff}: an expert would be {d_ff / granularity:g} wide. Give one "
            "of the two, and the other follows from the experts"
        )
