"""FLOPs of the `moec::` products for `torch.utils.flop_counter`, under the names of the modules that call them.

    with FlopCounterMode() as counter:
        layer(x).sum().backward()
    counter.get_flop_counts()["MoE.experts"], counter.get_flop_counts()["MoE.router"]

Two per multiply-add, as for `mm`; activations and sums are not counted, as elsewhere in torch. Only shapes are looked at, so the
rows of dropped slots count as well, though no kernel computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def experts_forward_flops(
    x: Shape, order: Shape, inverse: Shape, offsets: Shape, scale: Shape | None, *args: object, **kwargs: object
) -> int:
    """order [S], weights for each expert [F, D] -> 2*S times the elements of all weights of one expert."""
    weights: list[Sequence[Shape]] = [group for group in args[:3] if group]  # type: ignore[misc]
    return 2 * order[0] * sum(math.prod(group[0][-2:]) for group in weights)


def experts_backward_flops(grad: Shape, pre: Shape, x: Shape, order: Shape, *args: object, **kwargs: object) -> int:
    """Each product has two gradients. What is not wanted is counted all the same."""
    return 2 * experts_forward_flops(x, order, *args, **kwargs)  # type: ignore[arg-type]


FORMULAS: dict[str, Callable[..., int]] = {
    "grouped_linear": grouped_linear_flops,
    "grouped_outer": grouped_outer_flops,
    "experts_forward": experts_forward_flops,
    "experts_backward": experts_backward_flops,
}


def register() -> None:
    """Tell torch's counter, unless it knows already."""
    for op, formula in FORMULAS.items():
        target = getattr(torch.ops.moec, op)
        if target not in flop_registry:
            register_flop_formula(target)(formula)
