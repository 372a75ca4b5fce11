"""EPLB, the expert-parallel load balancer that DeepSeek published: the baseline of every table here.

    replicate   every expert once; then, slot by slot, one more copy of the expert with the highest load per copy
    pack        items by falling load, each to the least loaded pack that still has room; all packs get equally many

Where groups of experts divide among the nodes, groups are packed to nodes, experts replicated inside a node and the
copies packed to its GPUs; otherwise everything is one node with one group. Loads split evenly over copies. The
algorithm knows nothing of co-activation, of the plan in force, nor of two copies on one GPU.

Source: the description and the worked example of https://github.com/deepseek-ai/EPLB; this is an implementation of our
own.

Shape letters: L layers, E experts, S slots, N nodes, G GPUs.
"""

from __future__ import annotations

import numpy as np

from .errors import PlacementError


def replicate(loads: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Copies that make the largest load per copy as small as it can be.

    loads  [B, E]
    Returns (expert of each copy [B, slots] int64, the E originals first; copies of each expert [B, E] int64).
    """
    problems, experts = loads.shape
    rows = np.arange(problems)
    copies = np.ones((problems, experts), dtype=np.int64)
    expert_of = np.empty((problems, slots), dtype=np.int64)
    expert_of[:, :experts] = np.arange(experts)
    per_copy = loads.astype(np.float64)
    for slot in range(experts, slots):
        hottest = per_copy.argmax(axis=1)
        expert_of[:, slot] = hottest
        copies[rows, hottest] += 1
        per_copy[rows, hottest] = loads[rows, hottest] / copies[rows, hottest]
    return expert_of, copies


def pack(loads: np.ndarray, packs: int) -> np.ndarray:
    """Longest first to the least loaded pack with room: loads [B, n] -> items [B, packs, n // packs] int64."""
    problems, n = loads.shape
    room = n // packs
    if room == 1:
        return np.broadcast_to(np.arange(n)[None, :, None], (problems, n, 1))
    rows = np.arange(problems)
    items = np.empty((problems, packs, room), dtype=np.int64)
    total = np.zeros((problems, packs))
    filled = np.zeros((problems, packs), dtype=np.int64)
    for item in np.argsort(-loads, axis=1, kind="stable").T:
        chosen = np.where(filled < room, total, np.inf).argmin(axis=1)
        items[rows, chosen, filled[rows, chosen]] = item
        total[rows, chosen] += loads[rows, item]
        filled[rows, chosen] += 1
    return items


def eplb_slots(loads: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int) -> np.ndarray:
    """The published algorithm: loads [L, E] -> the expert in each slot [L, num_slots] int64.

    Raises PlacementError where sizes do not divide as the algorithm needs it.
    """
    layers, experts = loads.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if experts % num_groups or num_gpus % num_nodes or num_slots % num_gpus or num_slots < experts:
        raise PlacementError(
            f"EPLB wants experts % groups = gpus % nodes = slots % gpus = 0 and slots >= experts, not {experts} experts, "
            f"{num_groups} groups, {num_nodes} nodes, {num_gpus} GPUs, {num_slots} slots; solve() takes any of them"
        )
    width = experts // num_groups
    groups = pack(loads.reshape(layers, num_groups, width).sum(-1), num_nodes)  # [L, N, groups of a node]
    experts_of_node = (groups[..., None] * width + np.arange(width)).reshape(layers * num_nodes, -1)
    node_loads = np.repeat(loads, num_nodes, axis=0)
    node_loads = np.take_along_axis(node_loads, experts_of_node, axis=1)
    copy, copies = replicate(node_loads, num_slots // num_nodes)
    per_copy = np.take_along_axis(node_loads / copies, copy, axis=1)
    packed = pack(per_copy, num_gpus // num_nodes).reshape(layers * num_nodes, -1)
    chosen = np.take_along_axis(experts_of_node, np.take_along_axis(copy, packed, axis=1), axis=1)
    return chosen.reshape(layers, num_slots)
