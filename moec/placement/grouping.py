"""Grouping: experts that the same tokens visit go to the same node, under a limit on how uneven the nodes may get.

    rooms = [16, 16, 16, 16]; node = group(loads, coactivation, rooms, shares, slack=0.05)      # [L, E]

A token is sent once to every node that holds one of its experts, so every pair of its experts on one node saves up to
one send. Longest-first packing gives nodes of equal load; from there pairs of experts change places as long as the
co-activation kept inside nodes grows and no node exceeds (1 + slack) of its share. All nodes play a tournament: in a
round each has one partner and makes its best swap with it, which no other pair of that round can disturb.

Empty places count as experts nobody visits, so that a swap with one is a move.

Shape letters: L layers, E experts, N nodes, M places of a node, H pairs of nodes that play at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def group(
    loads_LE: np.ndarray,
    coactivation_LEE: np.ndarray,
    rooms: np.ndarray,
    shares: np.ndarray,
    slack: float,
    turns: int = 64,
) -> np.ndarray:
    """The node of each expert [L, E] int64.

    loads_LE          float64, slots per expert
    coactivation_LEE  tokens that visited both; the diagonal is not read
    rooms             [N] int64, experts a node takes at most; their sum is at least E
    shares            [N] float64, the part of the load that a node should have; sum 1
    slack             by which a node may exceed its share: 0.05 is 5 %
    turns             tournaments at most
    """
    layers, experts = loads_LE.shape
    nodes = len(rooms)
    loads = np.pad(loads_LE, ((0, 0), (0, 1)))  # expert E is the empty place
    together = np.zeros((layers, experts + 1, experts + 1), dtype=np.float32)
    together[:, :experts, :experts] = coactivation_LEE
    together[:, np.arange(experts), np.arange(experts)] = 0
    members, open_ = _longest_first(loads_LE, rooms, shares)
    node = np.zeros((layers, experts + 1, nodes), dtype=np.float32)
    np.put_along_axis(node, members.transpose(0, 2, 1), 1.0, axis=1)
    node[:, experts] = 0
    affinity = together @ node  # [L, E + 1, N]: how often an expert is visited together with those of a node
    load = np.take_along_axis(loads[:, None], members, axis=2).sum(-1) / shares
    limit = np.maximum(load.max(axis=1), loads.sum(axis=1) * (1 + slack))
    schedule = list(_tournament(nodes))
    for _ in range(turns):
        swaps = [_round(members, affinity, load, pairs, together, loads, shares, limit, open_) for pairs in schedule]
        if not any(swaps):
            break
    found = np.empty((layers, experts + 1), dtype=np.int64)
    np.put_along_axis(found, members.reshape(layers, -1), np.repeat(np.arange(nodes), members.shape[2])[None], axis=1)
    return found[:, :experts]


def _longest_first(loads: np.ndarray, rooms: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(experts on each node [L, N, M], empty places as E; which places may be used [N, M])."""
    layers, experts = loads.shape
    rows = np.arange(layers)
    members = np.full((layers, len(rooms), int(rooms.max())), experts, dtype=np.int64)
    total = np.zeros((layers, len(rooms)))
    filled = np.zeros((layers, len(rooms)), dtype=np.int64)
    for expert in np.argsort(-loads, axis=1, kind="stable").T:
        chosen = np.where(filled < rooms, total / shares, np.inf).argmin(axis=1)
        members[rows, chosen, filled[rows, chosen]] = expert
        total[rows, chosen] += loads[rows, expert]
        filled[rows, chosen] += 1
    return members, np.arange(members.shape[2]) < rooms[:, None]


def _tournament(nodes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rounds in which every node has at most one partner, and after which each has met every other (the circle method)."""
    ring = np.arange(nodes + nodes % 2)
    for _ in range(len(ring) - 1):
        left, right = ring[: len(ring) // 2], ring[len(ring) // 2 :][::-1]
        real = (left < nodes) & (right < nodes)
        yield left[real], right[real]
        ring = np.concatenate([ring[:1], np.roll(ring[1:], 1)])


def _round(
    members: np.ndarray,
    affinity: np.ndarray,
    load: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    together: np.ndarray,
    loads: np.ndarray,
    shares: np.ndarray,
    limit: np.ndarray,
    open_: np.ndarray,
) -> bool:
    """Makes the best swap of every pair of nodes, in place; whether there was one."""
    i, j = pairs
    rows = np.arange(len(members))[:, None, None]
    mine, theirs = members[:, i], members[:, j]  # [L, H, M]
    leave = affinity[rows, mine, j[:, None]] - affinity[rows, mine, i[:, None]]
    come = affinity[rows, theirs, i[:, None]] - affinity[rows, theirs, j[:, None]]
    gain = leave[..., :, None] + come[..., None, :]
    gain -= 2 * together[rows[..., None], mine[..., :, None], theirs[..., None, :]]
    moved = loads[rows, mine][..., :, None] - loads[rows, theirs][..., None, :]
    top = limit[:, None, None, None]
    fits = (load[:, i][..., None, None] - moved / shares[i][:, None, None] <= top) & (
        load[:, j][..., None, None] + moved / shares[j][:, None, None] <= top
    )
    fits &= (open_[i][:, :, None] & open_[j][:, None, :])[None]
    gain = np.where(fits, gain, 0.0).reshape(len(members), len(i), -1)
    best = gain.argmax(axis=-1)
    b, h = np.nonzero(np.take_along_axis(gain, best[..., None], axis=-1)[..., 0] > 0.5)  # counts are integers
    if not len(b):
        return False
    a, c = np.divmod(best[b, h], members.shape[2])
    out, in_, p, q = mine[b, h, a], theirs[b, h, c], i[h], j[h]
    members[b, p, a], members[b, q, c] = in_, out
    change = together[b, in_] - together[b, out]
    affinity[b, :, p] += change
    affinity[b, :, q] -= change
    moved_load = loads[b, out] - loads[b, in_]
    load[b, p] -= moved_load / shares[p]
    load[b, q] += moved_load / shares[q]
    return True
