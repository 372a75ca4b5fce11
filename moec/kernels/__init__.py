"""Faster kernels of the `moec::` ops, registered with the dispatcher when this module is imported.

The dispatcher picks by device; among several kernels of a product `moec.schedule.choose` picks by shape, dtype and device, all
known on the host: no synchronization, no recompile. Every kernel has the signature and the meaning of `moec.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from moec import schedule
from moec.ir import Problem
from moec.ops import implement

from . import cpu, cuda, eager, experts, gathered, grouped_mm

# The strategies of moec.schedule, by name. Only those that take problems with weight gradients need a grouped_outer.
PRODUCTS: dict[str, ModuleType] = {
    "reference": eager,
    "loop": cpu,
    "native_loop": grouped_mm,
    "grouped_mm": grouped_mm,
    "gathered": gathered,
}


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product by the strategy that `moec.schedule` chooses for it; see `moec.ops.reference.grouped_linear`."""
    w, compute_dtype = weights[0], dtype or x.dtype
    # On CPU a stack that must be cast is no stack: the loop casts the experts that have rows, one at a time.
    stacked = w.dim() == 3 and (w.dtype == compute_dtype or not x.is_cpu)
    in_features, out_features = x.shape[1], w.shape[-1 if transposed else -2]
    strategy = schedule.choose(
        Problem(
            num_tokens=x.shape[0],
            top_k=1,
            num_experts=offsets.shape[0],
            d_model=in_features,
            d_expert=out_features,
            dtype=compute_dtype,
            device=x.device.type,
            training=False,
            stacked=stacked,
            bias=bool(biases),
        )
    )
    product: Tensor = PRODUCTS[strategy.name].grouped_linear(x, weights, biases, offsets, transposed, dtype)
    return product


def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    """The gradient by the strategy that `moec.schedule` chooses for it; see `moec.ops.reference.grouped_outer`."""
    strategy = schedule.choose(
        Problem(
            num_tokens=left.shape[0],
            top_k=1,
            num_experts=offsets.shape[0],
            d_model=left.shape[1],
            d_expert=right.shape[1],
            dtype=left.dtype,
            device=left.device.type,
            training=True,
            stacked=experts is None,
        )
    )
    products: list[Tensor] = PRODUCTS[strategy.name].grouped_outer(left, right, offsets, experts, dtype)
    return products


# (op, dispatch key, kernel). What is not listed runs the reference, which reads nothing on the host for these ops on CUDA.
REGISTERED = (
    ("route", "CPU", cpu.route),
    ("dispatch", "CPU", cpu.dispatch),
    ("combine", "CPU", cpu.combine),
    ("expert_rows", "CPU", cpu.expert_rows),
    ("expert_sums", "CPU", cpu.expert_sums),
    ("grouped_linear", "CPU", grouped_linear),
    ("grouped_outer", "CPU", grouped_outer),
    ("experts_forward", "CPU", experts.experts_forward),
    ("experts_backward", "CPU", experts.experts_backward),
    ("route", "CUDA", cuda.route),
    ("expert_sums", "CUDA", cuda.expert_sums),
    ("grouped_linear", "CUDA", grouped_linear),
    ("grouped_outer", "CUDA", grouped_outer),
    ("experts_forward", "CUDA", experts.experts_forward),
    ("experts_backward", "CUDA", experts.experts_backward),
)

for _op, _key, _kernel in REGISTERED:
    implement(_op, _key, _kernel)
