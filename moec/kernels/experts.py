"""A whole layer of experts, by the strategy that `moec.schedule` chooses for it; see `moec.ops.experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec import schedule
from moec.ir import Problem
from moec.ops import experts
from moec.ops.experts import Layer, Wanted

from . import native


def experts_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(out [T, D], pre [S, F or 2F]); see `moec.ops.experts.forward`."""
    *given, out_dtype, keep, key = experts.with_key(args, "experts_forward")
    layer = experts.unpack(given, key)
    if _strategy(x, layer, out_dtype, training=keep) == "native":
        return native.forward(x, layer, keep)
    return experts.forward(torch.ops.moec, x, layer, out_dtype, keep)


def experts_backward(grad: Tensor, pre: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    """The gradients that are wanted; see `moec.ops.experts.backward`."""
    *given, wanted, key = experts.with_key(args, "experts_backward")
    layer = experts.unpack(given, key, unwritten=True)
    if _strategy(x, layer, grad.dtype, training=True) == "native":
        return _native_backward(grad, pre, x, layer, Wanted(wanted, layer.body))
    return experts.backward(torch.ops.moec, grad, pre, x, layer, wanted)


def _native_backward(grad: Tensor, pre: Tensor, x: Tensor, layer: Layer, wanted: Wanted) -> list[Tensor]:
    found: list[Tensor] = []
    for grads in native.backward(grad, x, pre, layer, [wanted.x, wanted.scale, *wanted.needs.values()]):
        found += [g for g in (grads if isinstance(grads, list) else [grads]) if g is not None]
    return found


def _strategy(x: Tensor, layer: Layer, out_dtype: torch.dtype, training: bool) -> str:
    routing, _, body = layer
    one_sided = body.gating == "separate" and bool(body.gate_bias) != bool(body.up_bias)
    if out_dtype != x.dtype or body.d_model != x.shape[1] or one_sided:  # what the library does not know
        return "composed"
    problem = Problem(
        num_tokens=x.shape[0],
        top_k=routing.slots_per_row,
        num_experts=routing.offsets.shape[0],
        d_model=x.shape[1],
        d_expert=body.d_expert,
        dtype=x.dtype,
        device=x.device.type,
        training=training,
        stacked=body.up[0].dim() == 3,
        bias=bool(body.up_bias or body.down_bias),
        gating=body.gating,
    )
    return schedule.choose_layer(problem).name
