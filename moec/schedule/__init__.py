"""Which kernel computes what: `choose(problem)`, the one rule that reports and the ops at run time both apply.

    choose(Problem(num_tokens=16, top_k=8, num_experts=64, ..., device="cuda")).name    ->  "gathered"      one product
    choose_layer(Problem(..., gating="halves", device="cpu")).name                      ->  "native"        a whole layer

A strategy refuses a problem, with a reason, or costs seconds; the cheapest that does not refuse is chosen, those that make the
host wait for the device last. Everything follows
from what the host knows: the number of slots S = T*K, sizes, dtype, device. The routing itself is never looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from moec.ir import Problem

from .layers import LAYERS, Composed, Native, choose_layer
from .strategies import STRATEGIES, Gathered, GroupedMM, Loop, NativeLoop, Reference, Strategy, choose

__all__ = [
    "LAYERS",
    "STRATEGIES",
    "Composed",
    "Gathered",
    "GroupedMM",
    "Loop",
    "Native",
    "NativeLoop",
    "Reference",
    "Strategy",
    "choose",
    "choose_by_tokens",
    "choose_layer",
    "describe",
    "in_one",
    "in_steps",
]

_TOKENS = tuple(2**i for i in range(17))  # 1 to 65536

Choose = Callable[[Problem], Strategy]


steps_only = False  # see `in_steps`


@contextlib.contextmanager
def in_steps() -> Iterator[None]:
    """Layers are written step by step meanwhile, for whoever has to come between the steps."""
    global steps_only  # noqa: PLW0603
    before, steps_only = steps_only, True
    try:
        yield
    finally:
        steps_only = before


def in_one(problem: Problem) -> bool:
    """Whether a layer is worth an op of its own: for the number of tokens, or for some if that is not known."""
    if problem.gating is None or steps_only:
        return False
    return any(strategy.name != "composed" for _, strategy in choose_by_tokens(problem, choose_layer))


def choose_by_tokens(problem: Problem, rule: Choose | None = None) -> tuple[tuple[int, Strategy], ...]:
    """(first number of tokens, strategy) for every change of strategy by a rule, `choose` unless another is given; one entry
    where the number of tokens is known."""
    rule = rule or choose
    if problem.num_tokens is not None:
        return ((problem.num_tokens, rule(problem)),)
    found: list[tuple[int, Strategy]] = []
    for tokens in _TOKENS:
        strategy = rule(replace(problem, num_tokens=tokens))
        if not found or found[-1][1] is not strategy:
            found.append((tokens, strategy))
    return tuple(found)


def describe(problem: Problem) -> str:
    """The choice in a line, for reports: "gathered, grouped_mm from 32 tokens"."""
    first, *rest = choose_by_tokens(problem, choose_layer if in_one(problem) else None)
    return ", ".join([first[1].name, *(f"{strategy.name} from {tokens} tokens" for tokens, strategy in rest)])
