"""Packing: copies of experts onto GPUs of equal room, never two of one expert on the same GPU.

    items = first_fit(experts, weights, bins)        longest first, to the least loaded bin that may take it
    items = improve(items, experts, weights)         swaps between two bins, as long as one lowers the sum of squared loads
    items = polish(items, experts, weights)          exchanges with the busiest bin, as long as one lowers the larger of two loads

Everything is done for a batch of problems at once (all layers, and all nodes of one size): a step is a few array
operations whatever the number of layers. An item has two weights, since two things are to be level: what a bin has to
do if loads come as predicted, and how much of it is rigid, that is, belongs to experts with a single copy, which no
split can move elsewhere.

Not handled: bins of different room; moves of more than two items at once.

Shape letters: B problems, n items, P bins, C room of a bin (n = P * C), 2 the two weights.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

PAIR_ROOM = (
    8  # bins with more items level so well by single exchanges that pairs, of which there are room ** 4 / 4, do not pay
)
EMPTY = -1  # the expert of an item that only fills a slot; may lie anywhere, any number of times


def first_fit(experts_Bn: np.ndarray, weights_2Bn: np.ndarray, bins: int) -> np.ndarray:
    """Items by falling weight, each to the bin that is then lightest among those with room and without the same expert.

    experts_Bn   int64, the expert of each item or EMPTY; at most `bins` items of one expert
    weights_2Bn  float64; order and load are by their sum
    Returns the items in each bin [B, P, C] int64.
    """
    problems, n = experts_Bn.shape
    room, rows = n // bins, np.arange(problems)
    weight = weights_2Bn.sum(axis=0)
    items = np.empty((problems, bins, room), dtype=np.int64)
    load = np.zeros((problems, bins))
    filled = np.zeros((problems, bins), dtype=np.int64)
    held = np.zeros((problems, experts_Bn.max(initial=0) + 2, bins), dtype=bool)  # EMPTY, -1, is the last row
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        expert = experts_Bn[rows, item]
        full = filled == room
        # a bin that has the expert already comes after all others, a full one never: `part` mends what this cannot
        # avoid
        chosen = (load + np.where(held[rows, expert], 1e300, 0.0) + np.where(full, np.inf, 0.0)).argmin(axis=1)
        items[rows, chosen, filled[rows, chosen]] = item
        load[rows, chosen] += weight[rows, item]
        filled[rows, chosen] += 1
        held[rows, expert, chosen] = expert != EMPTY
    return _part(items, experts_Bn, weight)


def _part(items: np.ndarray, experts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Swaps apart two items of one expert in one bin.

    One swap parts a pair and makes no other: take the bin p with the most pairs, and any bin q without the expert. q
    has no more pairs than p, so it has at least as many different experts as p, one of which is not in p.
    """
    sorted_experts = np.sort(np.take_along_axis(experts[:, None], items, axis=2), axis=2)
    pairs = (sorted_experts[..., 1:] == sorted_experts[..., :-1]) & (sorted_experts[..., 1:] != EMPTY)
    for b in np.flatnonzero(pairs.any(axis=(1, 2))):
        while True:
            held = [[int(e) for e in experts[b, bin_]] for bin_ in items[b]]
            twice = [[i for i, e in enumerate(row) if e != EMPTY and e in row[:i]] for row in held]
            p = max(range(len(held)), key=lambda i: len(twice[i]))
            if not twice[p]:
                break
            i = twice[p][0]
            _, q, j = min(
                (abs(weight[b, items[b, p, i]] - weight[b, items[b, q, j]]), q, j)
                for q, row in enumerate(held)
                if held[p][i] not in row
                for j, e in enumerate(row)
                if e == EMPTY or e not in held[p]
            )
            items[b, p, i], items[b, q, j] = items[b, q, j], items[b, p, i]
    return items


def improve(items_BPC: np.ndarray, experts_Bn: np.ndarray, weights_2Bn: np.ndarray, rounds: int) -> np.ndarray:
    """Swaps items between bins while that lowers sum(load ** 2), both weights counted alike.

    In a round every bin has one partner and every pair makes its best swap. Bins meet by load, the heaviest with the
    lightest, then with a partner further in, and so on; a problem that is done stays as it is. Returns new items [B, P,
    C].
    """
    items = items_BPC.copy()
    problems, bins, _ = items.shape
    rows = np.arange(problems)[:, None]
    half = bins // 2
    weights = [np.take_along_axis(w[:, None], items, axis=2) for w in weights_2Bn]  # each [B, P, C]
    experts = np.take_along_axis(experts_Bn[:, None], items, axis=2)
    idle = 0
    for turn in range(rounds if half else 0):
        loads = [w.sum(axis=2) for w in weights]
        order = np.argsort(-sum(loads), axis=1, kind="stable")
        heavy, light = order[:, :half], np.roll(order[:, bins - half :][:, ::-1], turn % half, axis=1)
        mine, theirs = experts[rows, heavy], experts[rows, light]
        same = (mine[..., :, None] == theirs[..., None, :]) & (mine[..., :, None] != EMPTY)
        gain = np.where(
            same.any(axis=-1)[..., :, None] | same.any(axis=-2)[..., None, :], -np.inf, 0.0
        )  # [B, half, C, C]
        for w, load in zip(weights, loads):
            moved = w[rows, heavy][..., :, None] - w[rows, light][..., None, :]
            gain += moved * (
                (load[rows, heavy] - load[rows, light])[..., None, None] - moved
            )  # half the fall of the sum of squares
        flat = gain.reshape(problems, half, -1)
        best = flat.argmax(axis=-1)
        better = np.take_along_axis(flat, best[..., None], axis=-1)[..., 0] > 1e-9 * sum(loads).max() ** 2
        idle = 0 if better.any() else idle + 1
        if idle == half:
            break
        b, k = np.nonzero(better)
        i, j = np.divmod(best[b, k], items.shape[2])
        p, q = heavy[b, k], light[b, k]
        for array in (items, experts, *weights):
            array[b, p, i], array[b, q, j] = array[b, q, j], array[b, p, i].copy()
    return items


def polish(items_BPC: np.ndarray, weights_Bn: np.ndarray, rounds: int = 500) -> np.ndarray:
    """Lowers the load of the busiest bin, one exchange with another bin at a time, until none helps. For items without
    copies.

    One item is exchanged for one, and in bins of PAIR_ROOM or less also two for two: with up to five items in a bin
    that is every way to divide the items of two bins anew. Returns new items [B, P, C].
    """
    items = items_BPC.copy()
    problems, bins, room = items.shape
    weights = np.take_along_axis(weights_Bn[:, None], items, axis=2)
    subsets = [np.array(list(combinations(range(room), k))) for k in ((1, 2) if 2 <= room <= PAIR_ROOM else (1,))]
    live = np.arange(problems)
    for _ in range(rounds if bins > 1 else 0):
        load = weights[live].sum(axis=2)
        busiest, top = load.argmax(axis=1), load.max(axis=1)
        found = [_exchange(weights[live], load, busiest, subset) for subset in subsets]
        kind = np.stack([reached for reached, _ in found]).argmin(axis=0)
        better = np.stack([reached for reached, _ in found]).min(axis=0) < top * (1 - 1e-9)
        if not better.any():
            break
        for row in np.flatnonzero(better):
            subset = subsets[kind[row]]
            other, i, j = np.unravel_index(found[kind[row]][1][row], (bins, len(subset), len(subset)))
            b, p, mine, theirs = live[row], busiest[row], subset[i], subset[j]
            for array in (items, weights):
                array[b, p, mine], array[b, other, theirs] = array[b, other, theirs], array[b, p, mine].copy()
        live = live[better]
    return items


def _exchange(
    weights: np.ndarray, load: np.ndarray, busiest: np.ndarray, subset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the larger load of the two bins after the best exchange [B], where it is in [P, subsets, subsets], flat [B])."""
    rows = np.arange(len(load))
    sums = weights[:, :, subset].sum(axis=-1)  # [B, P, subsets]
    moved = sums[rows, busiest][:, None, :, None] - sums[:, :, None, :]
    after = np.maximum(load[rows, busiest][:, None, None, None] - moved, load[:, :, None, None] + moved)
    after[rows, busiest] = np.inf
    flat = after.reshape(len(load), -1)
    where = flat.argmin(axis=1)
    return flat[rows, where], where
