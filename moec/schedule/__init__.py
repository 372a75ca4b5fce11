"""Which kernel computes a product: `choose(problem)`, the one rule that reports and the ops at run time both apply.

    choose(Problem(num_tokens=16, top_k=8, num_experts=64, ..., device="cuda")).name    ->  "gathered"

A strategy refuses a problem, with a reason, or costs seconds; the cheapest that does not refuse is chosen, those that make the
host wait for the device last. Everything follows
from what the host knows: the number of slots S = T*K, sizes, dtype, device. The routing itself is never looked at.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from moec.ir import Problem

from .strategies import STRATEGIES, Gathered, GroupedMM, Loop, NativeLoop, Reference, Strategy

__all__ = [
    "STRATEGIES",
    "Gathered",
    "GroupedMM",
    "Loop",
    "NativeLoop",
    "Reference",
    "Strategy",
    "choose",
    "choose_by_tokens",
    "describe",
]

_TOKENS = tuple(2**i for i in range(17))  # 1 to 65536


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Strategy:
    """The cheapest strategy that neither refuses nor synchronizes, else the cheapest that does not refuse: `loop` never does."""
    able = (s for s in STRATEGIES if s.refuses(problem) is None)
    return min(able, key=lambda s: (s.synchronizes(problem), s.cost(problem)))


def choose_by_tokens(problem: Problem) -> tuple[tuple[int, Strategy], ...]:
    """(first number of tokens, strategy) for every change of strategy; one entry where the number of tokens is known."""
    if problem.num_tokens is not None:
        return ((problem.num_tokens, choose(problem)),)
    found: list[tuple[int, Strategy]] = []
    for tokens in _TOKENS:
        strategy = choose(replace(problem, num_tokens=tokens))
        if not found or found[-1][1] is not strategy:
            found.append((tokens, strategy))
    return tuple(found)


def describe(problem: Problem) -> str:
    """The choice in a line, for reports: "gathered, grouped_mm from 32 tokens"."""
    first, *rest = choose_by_tokens(problem)
    return ", ".join([first[1].name, *(f"{strategy.name} from {tokens} tokens" for tokens, strategy in rest)])
