"""Replicas: which experts get the spare slots of which node.

    copies = choose(loads, coactivation, node_of_expert, slots, gpus, traffic=0.5)      # [L, E, N] copies on each node

Two reasons to copy an expert. *Balance*: the expert with the most load per copy is copied, as EPLB does. *Traffic*: a
copy of e on node n saves a send whenever a token of e is on n anyway and has no other business on the nodes that hold e
now. With pairwise statistics only, other visits are taken as independent: a token of e visits x experts of a set on
average, so it misses the set with probability exp(-x) (Poisson). The share `traffic` of the spare slots is chosen for
traffic, the rest for balance; balance goes first, and on for as long as a single copy has more than RIGID of what one
GPU should do.

Shape letters: L layers, E experts, N nodes.
"""

from __future__ import annotations

import numpy as np

RIGID = 0.9


def choose(
    loads_LE: np.ndarray,
    coactivation_LEE: np.ndarray,
    node_of_expert_LE: np.ndarray,
    slots: np.ndarray,
    gpus: np.ndarray,
    traffic: float,
) -> np.ndarray:
    """Copies of each expert on each node, [L, E, N] int64; no node gets more than `slots` nor more copies of one expert
    than GPUs.

    slots, gpus  [N] int64, of each node; slots left over (every expert on every GPU) stay empty
    """
    layers, experts = loads_LE.shape
    nodes, rows = len(slots), np.arange(layers)
    together = coactivation_LEE.astype(np.float32)
    together[:, np.arange(experts), np.arange(experts)] = 0
    visits = np.maximum(np.diagonal(coactivation_LEE, axis1=1, axis2=2), 1).astype(np.float32)[..., None]
    copies = (node_of_expert_LE[..., None] == np.arange(nodes)).astype(np.int64)
    free = slots - copies.sum(axis=1)  # [L, N]
    # how many experts of node n a token of e visits besides e; the mean GPU's load is 1
    affinity = together @ copies.astype(np.float32) / visits
    loads = loads_LE / np.maximum(loads_LE.sum(axis=1, keepdims=True), 1e-30) * gpus.sum()
    spare = int(free.sum(axis=1).max(initial=0))
    for_balance = spare - round(traffic * spare) if nodes > 1 else spare
    for turn in range(spare):
        count = copies.sum(axis=2)
        room = (free[:, None] > 0) & (copies < gpus)
        per_copy = np.where(room.any(axis=2), loads / count, -1.0)
        if per_copy.max() < 0:
            break
        hottest = per_copy.argmax(axis=1)
        held = copies > 0
        elsewhere = 1 - 1 / nodes
        comes_anyway = 1 - elsewhere * np.exp(-affinity)
        only_for_it = np.exp(-np.where(held, affinity, 0).sum(axis=2)) * elsewhere ** held.sum(axis=2)
        saved = np.where(room, comes_anyway * np.where(held, 1e-6, only_for_it[..., None]) * loads[..., None], -1.0)
        for_traffic = saved.reshape(layers, -1).argmax(axis=1) // nodes
        balance = (turn < for_balance) | (per_copy[rows, hottest] > RIGID)
        expert = np.where(balance, hottest, for_traffic)
        node = saved[rows, expert].argmax(axis=1)
        able = room[rows, expert, node]
        copies[rows[able], expert[able], node[able]] += 1
        free[rows[able], node[able]] -= 1
        first = able & (copies[rows, expert, node] == 1)
        affinity[rows[first], :, node[first]] += together[rows[first], expert[first]] / visits[rows[first], :, 0]
    return copies


def hottest(loads_LE: np.ndarray, slots: int, gpus: int) -> np.ndarray:
    """Copies of each expert [L, E] int64, spare slots one by one to the most load per copy; at most one copy per GPU."""
    layers, experts = loads_LE.shape
    rows = np.arange(layers)
    copies = np.ones((layers, experts), dtype=np.int64)
    per_copy = loads_LE.astype(np.float64) if gpus > 1 else np.full(loads_LE.shape, -1.0)
    for _ in range(min(slots, experts * gpus) - experts):
        chosen = per_copy.argmax(axis=1)
        copies[rows, chosen] += 1
        count = copies[rows, chosen]
        per_copy[rows, chosen] = np.where(count < gpus, loads_LE[rows, chosen] / count, -1.0)
    return copies
