"""Experts across GPUs: which expert lives where, which are copied, and which copy computes a token.

    stats = RoutingStats.from_topk(topk_LTK, num_experts=64)
    plan = solve(stats, topology("h100", nodes=4, gpus_per_node=4), slots_per_gpu=5)
    plan.evaluate(topk_LTK).remote_node_sends

A token that visits experts on three other nodes is sent three times; a layer ends when its busiest GPU does. So experts
that are visited together should share a node, and loads should be level, and the two pull against each other. Replicas
help both, as long as each batch decides anew which copy gets which token.

| file | holds |
|---|---|
| `stats` | `RoutingStats`, `Recorder`: counts and co-activation |
| `cluster` | `topology`: the graph of GPUs, links and levels |
| `solver` | `solve`, from statistics to a plan; `grouping`, `replicas`, `balance` are its steps, `bounds` what it cannot beat |
| `published`, `baselines` | EPLB, our own implementation; `eplb`, `linear`, `random` as plans |
| `plan`, `files`, `prediction` | `Plan`, its files, what statistics say of it |
| `naming` | `relabel`: as little as possible moves from the plan in force |
| `batch`, `flow` | `prefer`, `split`, `settle`: which copy computes which token of a batch |
| `metrics`, `picture` | `plan.evaluate`: imbalance and sends on recorded tokens; `heat_map` |

Not handled: GPUs that differ in speed or memory, experts that differ in size, affinity between layers (a combine
returns tokens home).
"""

from __future__ import annotations

from .baselines import eplb, linear, random
from .batch import Tables, prefer, settle, split
from .cluster import PRESETS, Link, Topology, topology
from .errors import PlacementError
from .metrics import Evaluation, evaluate
from .naming import relabel
from .picture import heat_map
from .plan import Moves, Plan, Prediction
from .prediction import predicted
from .published import eplb_slots
from .solver import solve
from .stats import Recorder, RoutingStats

__all__ = [
    "PRESETS",
    "Evaluation",
    "Link",
    "Moves",
    "PlacementError",
    "Plan",
    "Prediction",
    "Recorder",
    "RoutingStats",
    "Tables",
    "Topology",
    "eplb",
    "eplb_slots",
    "evaluate",
    "heat_map",
    "linear",
    "predicted",
    "prefer",
    "random",
    "relabel",
    "settle",
    "solve",
    "split",
    "topology",
]
