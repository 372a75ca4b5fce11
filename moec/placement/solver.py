"""The solver: from statistics and a cluster to a plan.

    thin statistics?      -> plain balancing, and the plan says so
    group                 -> every expert gets a node: those that tokens visit together, under a limit on imbalance
    choose                -> the spare slots of every node: copies that save sends, copies that level loads
    first_fit, improve    -> copies onto the GPUs of their node, never two of one expert on one
    polish                -> without replicas, where nothing can be split: the busiest GPU against all others, from several starts
    relabel               -> names of GPUs and slots kept from the plan in force

With traffic=0 the cluster is one node: copies lie wherever they level the load, and the split moves tokens between all
of them.

Shape letters: L layers, E experts, N nodes, G GPUs, S slots.
"""

from __future__ import annotations

import numpy as np

from . import balance
from .bounds import lower_bound
from .cluster import Topology
from .errors import PlacementError
from .grouping import group
from .naming import relabel
from .plan import Plan
from .prediction import predicted
from .replicas import choose, hottest
from .stats import RoutingStats

# Co-activated pairs per pair of experts below which co-activation is noise.
THIN_PAIRS = 2.0
# By how much a node may exceed its share of the load of experts' first copies, and the share of the spare slots that is
# chosen for traffic: of 0.005..0.1 and 0..1 these gave the least sends at every imbalance, see docs/placement.md.
GROUP_SLACK, TRAFFIC_SHARE = 0.05, 0.25
# What traffic=1 allows the split of a batch: GPUs that exceed the mean load by 8 %.
SPLIT_SLACK = 0.08
# Rounds of swaps; more of them level the predicted load at the cost of what a split can still move.
ROUNDS = 8
# Without replicas: how near the bound is near enough, and the restarts where it is not reached.
NEAR, RESTARTS, NOISE = 0.004, 32, 0.3


def solve(
    stats: RoutingStats,
    topology: Topology,
    slots_per_gpu: int,
    current: Plan | None = None,
    seed: int = 0,
    *,
    traffic: float = 0.5,
) -> Plan:
    """A plan for all layers, the same for the same arguments.

    slots_per_gpu  slots of each GPU; all GPUs together need at least one per expert, what is above that holds replicas
    current        the plan in force: names are chosen so that little has to move from it
    seed           of the restarts that look for a better packing where nothing is replicated
    traffic        the weight of traffic against balance, 0..1: the split of a batch may load a GPU traffic * 8 % above
                   the mean to save sends. 0 balances alone: nodes are not looked at.

    Raises PlacementError where the experts do not fit, or where `current` is for another model or cluster.
    """
    gpus, experts = topology.num_gpus, stats.num_experts
    if slots_per_gpu * gpus < experts:
        raise PlacementError(
            f"{experts} experts in {gpus} GPUs x {slots_per_gpu} slots; at least {-(-experts // gpus)} slots per GPU are needed"
        )
    if not 0 <= traffic <= 1:
        raise PlacementError(f"traffic={traffic}; pass a weight from 0 (balance alone) to 1 (most for traffic)")
    note = _thin(stats, traffic, topology.num_nodes)
    grouped = traffic > 0 and not note
    loads = stats.loads() + 1  # every expert once more than it was seen: what was never seen is rare, not impossible
    node_of_gpu = topology.node_of_gpu if grouped else np.zeros(gpus, dtype=np.int64)
    copies = _copies(stats, loads, node_of_gpu, slots_per_gpu)
    slots = _pack(loads, copies, node_of_gpu, slots_per_gpu, seed)
    plan = predicted(
        stats,
        Plan(
            physical_to_logical=slots,
            num_experts=experts,
            node_of_gpu=topology.node_of_gpu,
            slack=traffic * SPLIT_SLACK if grouped else 0.0,
            method="grouped" if grouped else "balanced",
            note=note,
        ),
    )
    return plan if current is None else relabel(plan, current)


def _thin(stats: RoutingStats, traffic: float, nodes: int) -> str:
    """Why co-activation is not used; "" where it is."""
    if traffic == 0:
        return "traffic=0: balanced without regard to nodes"
    if nodes == 1:
        return "one node: there is no traffic between nodes to save"
    experts = stats.num_experts
    diagonal = np.trace(stats.coactivation, axis1=1, axis2=2)
    pairs = (stats.coactivation.sum(axis=(1, 2)) - diagonal) / max(experts * (experts - 1), 1)
    if pairs.min() >= THIN_PAIRS:
        return ""
    return (
        f"statistics are thin: layer {int(pairs.argmin())} has {pairs.min():.2f} co-activations per pair of experts, "
        f"grouping wants {THIN_PAIRS}; balanced without regard to nodes"
    )


def _copies(stats: RoutingStats, loads: np.ndarray, node_of_gpu: np.ndarray, slots_per_gpu: int) -> np.ndarray:
    """[L, E, N] int64: copies of each expert on each node."""
    gpus = np.bincount(node_of_gpu)
    slots = gpus * slots_per_gpu
    if len(gpus) == 1:
        return hottest(loads, int(slots[0]), int(gpus[0]))[..., None]
    rooms = np.minimum(slots, -(-stats.num_experts * slots // slots.sum()))
    node = group(loads, stats.coactivation, rooms, gpus / gpus.sum(), GROUP_SLACK)
    return choose(loads, stats.coactivation, node, slots, gpus, TRAFFIC_SHARE)


def _pack(loads: np.ndarray, copies: np.ndarray, node_of_gpu: np.ndarray, slots_per_gpu: int, seed: int) -> np.ndarray:
    """[L, S] int64: the copies of every node in the slots of its GPUs; -1 where there are fewer copies than slots."""
    layers, experts, nodes = copies.shape
    slots = np.full((layers, len(node_of_gpu), slots_per_gpu), balance.EMPTY, dtype=np.int64)
    count = copies.sum(axis=2)
    per_copy = loads / count
    weights = np.stack([per_copy, np.where(count == 1, loads, 0.0)])  # [2, L, E]
    weights = np.pad(weights, ((0, 0), (0, 0), (0, 1)))  # EMPTY, -1, weighs nothing
    sizes = np.bincount(node_of_gpu)
    for size in sorted(set(sizes.tolist())):
        equal = np.flatnonzero(sizes == size)
        held = _listed(copies[:, :, equal].transpose(0, 2, 1).reshape(-1, experts), size * slots_per_gpu)
        rows = np.repeat(np.arange(layers), len(equal))[:, None]
        items = balance.first_fit(held, weights[:, rows, held], size)
        items = balance.improve(items, held, weights[:, rows, held], ROUNDS)
        if copies.sum() == layers * experts:
            items = _restarted(items, weights[0, rows, held], seed)
        packed = np.take_along_axis(held[:, None], items, axis=2).reshape(layers, len(equal), size, slots_per_gpu)
        for k, node in enumerate(equal):
            slots[:, node_of_gpu == node] = packed[:, k]
    return slots.reshape(layers, -1)


def _restarted(items_BPC: np.ndarray, weights_Bn: np.ndarray, seed: int) -> np.ndarray:
    """Items without copies, polished; where that stays above the bound, the best of packings in a slightly wrong order."""
    items = balance.polish(items_BPC, weights_Bn)
    _, gpus, room = items.shape
    enough = lower_bound(weights_Bn, gpus, room) * weights_Bn.sum(axis=1) / gpus * (1 + NEAR)
    rng = np.random.default_rng(seed)
    for _ in range(RESTARTS if room > 1 else 0):
        far = np.flatnonzero(_busiest(items, weights_Bn) > enough)
        if not len(far):
            break
        weights = weights_Bn[far]
        wrong = weights * np.exp(NOISE * rng.standard_normal(weights.shape))
        tried = balance.polish(
            balance.first_fit(np.tile(np.arange(gpus * room), (len(far), 1)), wrong[None], gpus), weights
        )
        better = _busiest(tried, weights) < _busiest(items[far], weights)
        items[far[better]] = tried[better]
    return items


def _busiest(items_BPC: np.ndarray, weights_Bn: np.ndarray) -> np.ndarray:
    """[B]: the load of the fullest bin."""
    return np.take_along_axis(weights_Bn[:, None], items_BPC, axis=2).sum(axis=2).max(axis=1)


def _listed(copies_BE: np.ndarray, length: int) -> np.ndarray:
    """[B, length] int64: each expert as often as it has copies, then EMPTY."""
    ends = np.cumsum(copies_BE, axis=1)
    place = np.arange(length)
    expert = (place[None, :, None] >= ends[:, None]).sum(axis=2)
    return np.where(expert < copies_BE.shape[1], expert, balance.EMPTY)
