"""Leveling: the flow that moves tokens between copies of experts until no GPU has more than it must. Integers only.

    take = level(wanted, experts, gpus=16, slack=0.0)       # [B, S] tokens per slot -> [B, S], per expert as many as before

A GPU above the limit can hand tokens of an expert to any other GPU with a copy of it, which can hand on others in turn.
So: breadth first from all GPUs above the limit, through experts of which they have tokens, to the GPUs with copies;
that is a forest, and along its branches as much moves to GPUs below the limit as fits. Again until nothing is above the
limit. If no GPU below it is in reach, then the GPUs in reach hold only experts that no other GPU has: their mean load
is a lower bound for every split, and becomes the limit.

So with slack 0 the busiest GPU ends with exactly the optimum of the linear program, rounded up (flows between integers
are integers), and shortest paths keep the change to what was wanted small. All problems of a batch are one graph; a
step is a few array operations.

Shape letters: B problems, S slots, G GPUs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MILLION = 1_000_000


@dataclass(frozen=True)
class _Layer:
    """One depth of the forest: experts, by the slot that their tokens leave; GPUs, by the slot where these arrive."""

    leave: np.ndarray
    arrive: np.ndarray


def level(wanted_BS: np.ndarray, experts_BS: np.ndarray, gpus: int, slack: float = 0.0) -> np.ndarray:
    """Tokens per slot [B, S] int64, close to those wanted, such that no GPU has more than the limit.

    wanted_BS   integers, 0 in empty slots
    experts_BS  int64, -1 in an empty slot; slot s lies on GPU s // (S / G)
    slack       the limit is the mean of the GPUs times (1 + slack), or the least that is possible if that is more
    """
    take = np.where(experts_BS >= 0, wanted_BS, 0).astype(np.int64)
    slots = take.shape[1]
    total = take.sum(axis=1)
    limit = np.maximum(-(-total // gpus), total * (_MILLION + round(slack * _MILLION)) // (_MILLION * gpus))
    base = int(experts_BS.max(initial=0)) + 1
    while True:
        load = take.reshape(len(take), gpus, -1).sum(axis=2)
        live = np.flatnonzero((load > limit[:, None]).any(axis=1))
        if not len(live):
            return take
        # the live problems as one graph: GPUs g + b * G, experts e + b * base
        excess = (load[live] - limit[live, None]).reshape(-1)
        row, slot = np.nonzero(experts_BS[live] >= 0)
        gpu, expert = slot // (slots // gpus) + row * gpus, experts_BS[live[row], slot] + row * base
        flow = take[live[row], slot]
        reached, forest = _search(flow, gpu, expert, excess, len(live))
        stuck = ~(reached & (excess < 0)).reshape(len(live), gpus).any(axis=1)
        inside = reached.reshape(len(live), gpus)[stuck]
        limit[live[stuck]] = -(-(load[live[stuck]] * inside).sum(axis=1) // inside.sum(axis=1))
        _push(flow, gpu, expert, excess, forest)
        take[live[row], slot] = flow


def _search(
    take: np.ndarray, gpu: np.ndarray, expert: np.ndarray, excess: np.ndarray, problems: int
) -> tuple[np.ndarray, list[_Layer]]:
    """(which GPUs were reached, the forest). Of several ways to one place the first slot in order is taken.

    The search ends where there is nothing more in reach, or room enough for all excess.
    """
    reached = excess > 0
    known = np.zeros(int(expert.max()) + 1, dtype=bool)
    by_expert, by_gpu = np.empty(len(known), dtype=np.int64), np.empty(len(reached), dtype=np.int64)
    fresh = reached
    forest: list[_Layer] = []
    filled = take > 0
    while True:
        leave = _first(np.flatnonzero(filled & fresh[gpu] & ~known[expert]), expert, by_expert)
        new = np.zeros(len(known), dtype=bool)
        new[expert[leave]] = True
        known |= new
        arrive = _first(np.flatnonzero(new[expert] & ~reached[gpu]), gpu, by_gpu)
        if not len(arrive):
            return reached, forest
        fresh = np.zeros(len(reached), dtype=bool)
        fresh[gpu[arrive]] = True
        reached |= fresh
        forest.append(_Layer(leave, arrive))
        if ((excess * reached).reshape(problems, -1).sum(axis=1) <= 0).all():
            return reached, forest


def _first(slots: np.ndarray, place: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """The first of the slots for every place."""
    scratch[place[slots[::-1]]] = slots[::-1]
    return slots[scratch[place[slots]] == slots]


def _push(take: np.ndarray, gpu: np.ndarray, expert: np.ndarray, excess: np.ndarray, forest: list[_Layer]) -> None:
    """Moves along the forest, in place: demand is gathered from the leaves up, then met from the roots down."""
    need = np.maximum(-excess, 0)
    asked = need.copy()  # by each GPU, for itself and for those behind it
    asked_by_expert = np.zeros(int(expert.max()) + 1, dtype=np.int64)
    for layer in reversed(forest):
        np.add.at(asked_by_expert, expert[layer.arrive], asked[gpu[layer.arrive]])
        of = expert[layer.leave]
        asked_by_expert[of] = np.minimum(asked_by_expert[of], take[layer.leave])
        np.add.at(asked, gpu[layer.leave], asked_by_expert[of])
    budget = np.maximum(excess, 0)
    budget_of_expert = np.zeros_like(asked_by_expert)
    for layer in forest:
        of = expert[layer.leave]
        given = _in_order(budget, asked_by_expert[of], gpu[layer.leave])
        budget_of_expert[of] = given
        take[layer.leave] -= given
        at = gpu[layer.arrive]
        given = _in_order(budget_of_expert, asked[at], expert[layer.arrive])
        take[layer.arrive] += given
        budget[at] = np.maximum(given - need[at], 0)


def _in_order(budget: np.ndarray, asked: np.ndarray, of: np.ndarray) -> np.ndarray:
    """What each asker gets when the budget of its place `of` is handed out in order."""
    order = np.argsort(of, kind="stable")
    asked_sorted, of_sorted = asked[order], of[order]
    before = np.cumsum(asked_sorted) - asked_sorted
    first = np.searchsorted(of_sorted, of_sorted)
    given = np.empty_like(asked)
    given[order] = np.clip(budget[of_sorted] - (before - before[first]), 0, asked_sorted)
    return given
