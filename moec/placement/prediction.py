"""What statistics say of a plan: expected shares of copies, imbalance with its lower bound, pairs of experts kept on
one node.

    plan = predicted(stats, plan)

Shape letters: L layers, E experts, S slots, C copies at most, N nodes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .bounds import lower_bound
from .flow import level
from .plan import Plan, Prediction, on_gpu
from .stats import RoutingStats


def predicted(stats: RoutingStats, plan: Plan) -> Plan:
    """The plan with fractions and predictions from these statistics. Both must be for the same layers and experts."""
    counts = stats.counts.sum(axis=0)
    load = _in_turn(plan, counts)
    if plan.split == "flow":
        load = level(load, plan.physical_to_logical, plan.num_gpus)
    of_expert = np.take_along_axis(counts, np.maximum(plan.physical_to_logical, 0), axis=1)
    fractions = np.where(of_expert > 0, load / np.maximum(of_expert, 1), plan.fractions)
    fractions[plan.physical_to_logical < 0] = 0
    gpu = load.reshape(plan.num_layers, plan.num_gpus, -1).sum(axis=2)
    imbalance = np.where(gpu.any(axis=1), gpu.max(axis=1) / np.maximum(gpu.mean(axis=1), 1e-30), 1.0)
    return replace(
        plan,
        fractions=fractions,
        window=f"{stats.windows[0]}..{stats.windows[-1]}" if len(stats.windows) > 1 else stats.windows[0],
        model=stats.model,
        predicted=Prediction(
            imbalance=np.maximum(imbalance, 1 + plan.slack),
            bound=lower_bound(counts.astype(np.float64), plan.num_gpus, plan.slots_per_gpu),
            kept=_kept(stats, plan),
        ),
    )


def _in_turn(plan: Plan, counts: np.ndarray) -> np.ndarray:
    """[L, S] int64: tokens of each slot when copies are taken in turn."""
    copies = plan.logical_to_physical
    count, total = plan.replica_count[..., None], counts[..., None]
    place = np.arange(copies.shape[2])
    share = total * (place + 1) // count - total * place // count
    load = np.zeros((plan.num_layers, plan.physical_to_logical.shape[1]), dtype=np.int64)
    layer, expert, copy = np.nonzero(copies >= 0)
    load[layer, copies[layer, expert, copy]] = share[layer, expert, copy]
    return load


def _kept(stats: RoutingStats, plan: Plan) -> np.ndarray:
    """[L] float64: share of the co-activated pairs that some node holds both of."""
    held = on_gpu(plan)
    on_node = np.stack([held[:, plan.node_of_gpu == n].any(axis=1) for n in range(plan.num_nodes)], axis=2).astype(
        np.float32
    )
    together = (on_node @ on_node.transpose(0, 2, 1)) > 0
    diagonal = np.trace(stats.coactivation, axis1=1, axis2=2)
    pairs = stats.coactivation.sum(axis=(1, 2)) - diagonal
    kept = np.einsum("lab,lab->l", stats.coactivation, together) - diagonal
    return np.where(pairs > 0, kept / np.maximum(pairs, 1), 0.0)
