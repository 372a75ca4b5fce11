"""Placements to compare with: EPLB, linear and random, as plans.

    eplb(stats, topology, slots_per_gpu=5).evaluate(topk_LTK)

Linear is what nobody chose: expert e in slot e, spare slots filled by the first experts again, as frameworks do without
a plan. All three split evenly over copies.
"""

from __future__ import annotations

import numpy as np

from .cluster import Topology
from .plan import Plan
from .prediction import predicted
from .published import eplb_slots
from .stats import RoutingStats


def eplb(stats: RoutingStats, topology: Topology, slots_per_gpu: int, *, num_groups: int = 1) -> Plan:
    """The plan of the published algorithm; see `moec.placement.eplb_slots`. It may hold two copies of an expert on one GPU.

    num_groups  groups of experts that routers choose first (group-limited routing); 1: none, loads are balanced globally
    Raises PlacementError where sizes do not divide as the algorithm needs it.
    """
    slots = eplb_slots(
        stats.loads(), slots_per_gpu * topology.num_gpus, num_groups, topology.num_nodes, topology.num_gpus
    )
    return predicted(stats, Plan(slots, stats.num_experts, topology.node_of_gpu, split="even", method="eplb"))


def linear(stats: RoutingStats, topology: Topology, slots_per_gpu: int) -> Plan:
    """Expert s % E in slot s. Raises PlacementError where a GPU would get an expert twice."""
    slots = np.tile(np.arange(slots_per_gpu * topology.num_gpus) % stats.num_experts, (stats.num_layers, 1))
    return predicted(stats, Plan(slots, stats.num_experts, topology.node_of_gpu, split="even", method="linear"))


def random(stats: RoutingStats, topology: Topology, slots_per_gpu: int, seed: int = 0) -> Plan:
    """Linear with experts and GPUs shuffled, anew in every layer."""
    rng = np.random.default_rng(seed)
    plan = linear(stats, topology, slots_per_gpu)
    experts = rng.permuted(np.tile(np.arange(stats.num_experts), (stats.num_layers, 1)), axis=1)
    slots = np.take_along_axis(experts, plan.physical_to_logical, axis=1)
    return predicted(stats, Plan(slots, stats.num_experts, topology.node_of_gpu, split="even", method="random"))
