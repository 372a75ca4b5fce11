"""FLOPs of the `moec::` products for `torch.utils.flop_counter`, under the names of the modules that call them.

    with FlopCounterMode() as counter:
        layer(x).sum().backward()
    counter.get_flop_counts()["MoE.experts"], counter.get_flop_counts()["MoE.router"]

Two per multiply-add, as for `mm`; activations and sums are not counted, as elsewhere in torch. Only shapes are looked at, so the
rows of dropped slots count as well, though no kernel computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

import moec.kernels  # noqa: F401  (defines the ops)

Shape = Sequence[int]


def grouped_linear_flops(
    x: Shape, weights: Sequence[Shape], biases: Sequence[Shape], offsets: Shape, *args: object, **kwargs: object
) -> int:
    """x [S, D], weights [E, F, D] or E of [F, D] -> 2*S*D*F."""
    return 2 * x[0] * math.prod(weights[0][-2:])


def grouped_outer_flops(left: Shape, right: Shape, *args: object, **kwargs: object) -> int:
    """left [S, M], right [S, N] -> 2*S*M*N."""
    return 2 * left[0] * left[1] * right[1]


def register() -> None:
    """Tell torch's counter, unless it knows already."""
    for op, formula in (("grouped_linear", grouped_linear_flops), ("grouped_outer", grouped_outer_flops)):
        target = getattr(torch.ops.moec, op)
        if target not in flop_registry:
            register_flop_formula(target)(formula)
