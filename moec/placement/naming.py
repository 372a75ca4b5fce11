"""Relabeling: the same plan, GPUs and slots renamed so that little must be moved from the plan in force.

Equal GPUs of a node can change names, and so can nodes of equal size. For every pair (new node, old node) the best
naming of GPUs inside is an assignment problem; their costs make one more, of nodes to nodes: exact, since the two
levels do not interfere. All problems of one size are solved as a batch, by shortest augmenting paths (Hungarian method;
R. Jonker, A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems", 1987).
Inside a GPU an expert keeps its slot.

Shape letters: L layers, E experts, G GPUs, B problems, n rows and columns.
"""

from __future__ import annotations

import numpy as np

from .plan import Plan, check_comparable, on_gpu, with_slots

INTER = 9.0  # what a copy from another node costs, in copies inside a node: 450 over 50 GB/s


def relabel(plan: Plan, current: Plan, *, inter: float = INTER) -> Plan:
    """`plan` with the names of `current` kept where that saves moves; raises PlacementError where the two cannot be
    compared.

    inter  cost of a slot filled from another node, where one filled inside the node costs 1
    """
    check_comparable(plan, current)
    layers, gpus, room = plan.num_layers, plan.num_gpus, plan.slots_per_gpu
    has = on_gpu(current)  # [L, G, E]
    cost = np.empty((layers, gpus, plan.num_experts))
    for node in range(plan.num_nodes):
        mine = plan.node_of_gpu == node
        near = has[:, mine].any(axis=1, keepdims=True)
        cost[:, mine] = np.where(has[:, mine], 0.0, np.where(near, 1.0, inter))
    cost = np.pad(cost, ((0, 0), (0, 0), (0, 1)))  # an empty slot, -1, costs nothing
    new = plan.physical_to_logical.reshape(layers, gpus, room)
    # [L, new GPU, old GPU]
    fit = np.stack([np.take_along_axis(cost, new[:, [g]].repeat(gpus, 1), axis=2).sum(-1) for g in range(gpus)], axis=1)
    name = _name_gpus(fit, plan.node_of_gpu)
    slots, fractions = np.full_like(new, -1), np.zeros((layers, gpus, room))
    rows = np.arange(layers)[:, None]
    slots[rows, name], fractions[rows, name] = new, plan.fractions.reshape(layers, gpus, room)
    old = current.physical_to_logical.reshape(layers, gpus, -1)
    order = _keep_slots(slots.reshape(layers * gpus, room), old.reshape(layers * gpus, -1)).reshape(layers, gpus, room)
    return with_slots(
        plan,
        np.take_along_axis(slots, order, axis=2).reshape(layers, -1),
        np.take_along_axis(fractions, order, axis=2).reshape(layers, -1),
    )


def _name_gpus(fit: np.ndarray, node_of_gpu: np.ndarray) -> np.ndarray:
    """[L, G]: the name, an old GPU, that each new GPU gets."""
    layers, gpus, _ = fit.shape
    members = [np.flatnonzero(node_of_gpu == n) for n in range(int(node_of_gpu.max()) + 1)]
    found = np.empty((layers, gpus), dtype=np.int64)
    for size in sorted({len(m) for m in members}):
        equal = np.stack([m for m in members if len(m) == size])  # [nodes of this size, size]
        pairs = fit[:, equal[:, None, :, None], equal[None, :, None, :]]  # [L, new node, old node, size, size]
        inside = assign(pairs.reshape(-1, size, size)).reshape(pairs.shape[:-1])
        between = np.take_along_axis(pairs, inside[..., None], axis=-1).sum(axis=(-1, -2))
        outside = assign(between)  # [L, new node] -> old node
        rows = np.arange(layers)[:, None]
        chosen = inside[rows, np.arange(len(equal)), outside]  # [L, new node, size]
        found[rows, equal.reshape(-1)] = np.take_along_axis(equal[outside], chosen, axis=-1).reshape(layers, -1)
    return found


def _keep_slots(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The order [B, C] of new slots in which an expert that the GPU has already stays where it is."""
    problems, room = new.shape
    same = (new[:, :, None] == old[:, None, :room]) & (new[:, :, None] >= 0)
    stays, target = same.any(axis=2), same.argmax(axis=2)
    taken = same.any(axis=1)
    taken = np.pad(taken, ((0, 0), (0, room - taken.shape[1])))
    order = np.empty((problems, room), dtype=np.int64)
    b, i = np.nonzero(stays)
    order[b, target[b, i]] = i
    order[~taken] = np.nonzero(~stays)[1]  # both by rows, equally many in each
    return order


def assign(cost_Bnn: np.ndarray) -> np.ndarray:
    """The column of each row [B, n] int64 such that the sum of costs is least, for every problem of the batch."""
    problems, n, _ = cost_Bnn.shape
    cost = np.pad(cost_Bnn.astype(np.float64), ((0, 0), (1, 0), (1, 0)))  # row and column 0 stand for "none"
    row_price, column_price = np.zeros((problems, n + 1)), np.zeros((problems, n + 1))
    row_of = np.zeros((problems, n + 1), dtype=np.int64)
    for row in range(1, n + 1):
        row_of[:, 0] = row
        column = np.zeros(problems, dtype=np.int64)
        came_by = np.zeros((problems, n + 1), dtype=np.int64)
        distance = np.full((problems, n + 1), np.inf)
        used = np.zeros((problems, n + 1), dtype=bool)
        live = np.arange(problems)
        while len(live):
            at = column[live]
            used[live, at] = True
            here = row_of[live, at]
            reduced = cost[live, here] - row_price[live, here][:, None] - column_price[live]
            closer = (reduced < distance[live]) & ~used[live]
            distance[live] = np.where(closer, reduced, distance[live])
            came_by[live] = np.where(closer, at[:, None], came_by[live])
            open_ = np.where(used[live], np.inf, distance[live])
            nearest = open_[:, 1:].argmin(axis=1) + 1
            step = np.take_along_axis(open_, nearest[:, None], axis=1)
            grown = np.where(used[live], step, 0.0)
            row_price[live[:, None], row_of[live]] += grown  # rows of used columns are distinct; the others get nothing
            column_price[live] -= grown
            distance[live] -= np.where(used[live], 0.0, step)
            column[live] = nearest
            live = live[row_of[live, nearest] != 0]
        while (left := np.flatnonzero(column)).size:
            before = came_by[left, column[left]]
            row_of[left, column[left]] = row_of[left, before]
            column[left] = before
    found = np.empty((problems, n + 1), dtype=np.int64)
    np.put_along_axis(found, row_of, np.arange(n + 1)[None], axis=1)
    return found[:, 1:] - 1
