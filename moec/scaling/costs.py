"""What a fine-grained MoE decoder is made of: parameters, FLOPs, bytes, and the names people give its granularity.

The shape of arXiv 2402.07871: d_ff = 4 * d_model, experts of two matrices, N_expert = G * E experts of width d_ff / G of which a
token visits G, and d_model = 64 * n_blocks. With a width d and n blocks:

    active parameters   12 d^2 n               attention 4 d^2, feed-forward 8 d^2
    total parameters    d^2 (8 E + 4) n        no embeddings, no routers; at E = 64 43 times the active ones
    FLOPs per token     (12 d^2 c_f + d E G c_r) n

c_f = 6 counts forward and backward of a multiply-add; c_r = 14 is the paper's count of seven 2-FLOP items for routing ("between 6
and 20", by implementation). No embeddings and no attention scores (section 6.1; `calculate_total_params` of llm-random).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.scaling.errors import ScalingError, positive
from moec.scaling.law import Floats, Real

WIDTH_PER_BLOCK = 64  # d_model = 64 * n_blocks
FF_RATIO = 4  # d_ff = 4 * d_model

# Training with AdamW, per parameter: float32 weight, gradient and two moments (4 * 4), or bfloat16 weight and gradient with
# float32 master weight and two moments (2 + 2 + 3 * 4). Activations come on top.
TRAINING_BYTES = 16.0


@dataclass(frozen=True)
class Costs:
    """FLOPs per parameter and token (`per_param`), and per d_model * E * G (`routing`)."""

    per_param: float = 6.0
    routing: float = 14.0


@dataclass(frozen=True)
class Granularity:
    """One layer under every convention: `paper` and SonicMoE's d/d_expert (Principled design too), and Efficiency Leverage's."""

    paper: float  # 4 d_model / d_expert
    leverage: float  # 2 d_model / d_expert
    sonic: float  # d_model / d_expert


def conventions(d_model: float, d_expert: float) -> Granularity:
    """Every convention of G of a layer, from what it is built of. Raises ScalingError for a width that is not positive."""
    ratio = positive(d_model, "d_model") / positive(d_expert, "d_expert")
    return Granularity(paper=4 * ratio, leverage=2 * ratio, sonic=ratio)


def blocks(d_model: Real) -> Floats:
    """n_blocks that goes with a width; not rounded."""
    return _array(d_model) / WIDTH_PER_BLOCK


def active_params(d_model: Real, n_blocks: Real) -> Floats:
    """N_act = 12 d^2 n."""
    return 12 * _array(d_model) ** 2 * n_blocks


def total_params(d_model: Real, n_blocks: Real, expansion: float) -> Floats:
    """N = d^2 (8 E + 4) n, the N of the law."""
    return (8 * expansion + 4) * _array(d_model) ** 2 * n_blocks


def router_params(d_model: Real, n_blocks: Real, expansion: float, g: Real) -> Floats:
    """d E G n: not part of N, but of memory."""
    return _array(d_model) * expansion * g * n_blocks


def flops_per_token(d_model: Real, n_blocks: Real, expansion: float, g: Real, costs: Costs) -> Floats:
    """(12 d^2 c_f + d E G c_r) n, forward and backward."""
    routed = costs.routing * router_params(d_model, n_blocks, expansion, g)
    return costs.per_param * active_params(d_model, n_blocks) + routed


def _array(value: Real) -> Floats:
    return np.asarray(value, dtype=np.float64)


def check_costs(costs: Costs) -> None:
    """Raises ScalingError unless c_f > 0 and c_r >= 0."""
    positive(costs.per_param, "c_f (--flops-per-param)")
    if not 0 <= costs.routing < float("inf"):
        raise ScalingError(
            f"c_r (--routing-cost) is {costs.routing:g}; give zero or a positive number, the paper's is 14"
        )
