"""Layers whose experts are declared: `moec.nn.MoE(d_model, d_ff, expansion, granularity)`.

| file | holds |
|---|---|
| `moe` | the layer |
| `settings` | of routers: their table of names, capacity, expert choice |
| `routers` | the modules: x to logits to `Routing` |
| `routing` | what a router decides; capacity; the routed sum in `moec::` ops |
| `experts` | the stacked experts, activations, the shared expert |
| `stabilizers` | balance loss, z-loss, loss-free bias |
| `model` | all layers of a model: `aux_loss(model)`, `update_biases(model)` |
| `stats` | load, entropy, drop rate of a recorded forward |
| `initialization` | the paper's, and `nn.Linear`'s |
| `choices` | errors for settings |
| `flops` | formulas for `torch.utils.flop_counter` |
"""

from __future__ import annotations

from . import flops as _flops
from .experts import ACTIVATIONS, Experts
from .initialization import INITS
from .model import aux_loss, layers, update_biases
from .moe import MoE
from .routing import ExpertRouting, TokenRouting
from .settings import ROUTERS, ExpertChoice, TokenChoice
from .stats import Stats

_flops.register()

__all__ = [
    "ACTIVATIONS",
    "INITS",
    "ROUTERS",
    "Experts",
    "ExpertChoice",
    "ExpertRouting",
    "MoE",
    "Stats",
    "TokenChoice",
    "TokenRouting",
    "aux_loss",
    "layers",
    "update_biases",
]
