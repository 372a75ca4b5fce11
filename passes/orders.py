"""The orders in which slot rows can stand, and the exception that says which fact is missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.passes import facts
from moec.passes.terms import Arg, Term


class Refused(Exception):
    """A fact is missing. `term` is where."""

    def __init__(self, missing: str, term: Arg) -> None:
        super().__init__(missing)
        self.missing = missing
        self.term = term


@dataclass(frozen=True)
class TokenMajor:
    """Slot (t, k) stands at row t*K + k."""


@dataclass(frozen=True)
class Sorted:
    """Row p holds slot `order[p]`; the order sorts the slots by expert."""

    order: Term


@dataclass(frozen=True)
class LoopRows:
    """The rows of the expert of this iteration: the true entries of a mask, in row-major order."""

    mask: facts.Mask


@dataclass(frozen=True)
class LoopSlice:
    """The rows of the expert of this iteration: `sorted[start:end]`."""

    order: Term


@dataclass(frozen=True)
class Pairs:
    """Every pair of a token and an expert, in row-major order of (token, expert), or of (expert, token)."""

    token_first: bool


@dataclass(frozen=True)
class EveryToken:
    """Inside a rolled loop: all tokens in order, for the expert of this iteration."""


Order = TokenMajor | Sorted | LoopRows | LoopSlice | Pairs | EveryToken


def static(sizes: tuple[int | torch.SymInt, ...], term: Arg) -> tuple[int, ...]:
    if not all(isinstance(s, int) for s in sizes):
        raise Refused("a feature size that is not static", term)
    return sizes  # type: ignore[return-value]
