"""What an idiom gives to detection: candidates, and what a proven one says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from moec.ir import Expr
from moec.passes.body import Body
from moec.passes.terms import Term


@dataclass(frozen=True, eq=False)
class Found:
    """A proven routed sum: the body, and the name of the idiom as the report shows it."""

    idiom: str
    expr: Expr


@dataclass(frozen=True, eq=False)
class Candidate:
    """`root` may be a routed sum, complete after node `at`. `prove` walks it with a fresh `Body`, or raises `Refused`.

    `returns None` from `prove` means "no MoE here after all": nothing is reported.
    """

    root: Term
    at: fx.Node
    prove: Callable[[Body], Found | None]
