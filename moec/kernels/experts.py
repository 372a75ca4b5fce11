"""A whole layer of experts, by the strategy that `moec.schedule` chooses for it; see `moec.ops.experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec import schedule
from moec.ir import Problem
from moec.ops import experts
from moec.ops.experts import Layer

from . import native


def experts_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(out [T, D], pre [S, F or 2F]); see `moec.ops.experts.forward`."""
    *args, out_dtype, keep, key = experts.with_key(args, "experts_forward")
    layer = experts.unpack(args, key)
    if _strategy(x, layer, training=keep) == "native":
        return native.forward(x, layer, out_dtype, keep)
    return experts.forward(torch.ops.moec, x, layer, out_dtype, keep)


def experts_backward(grad: Tensor, pre: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    """The gradients that are wanted; see `moec.ops.experts.backward`."""
    *args, wanted, key = experts.with_key(args, "experts_backward")
    layer = experts.unpack(args, key, unwritten=True)
    if _strategy(x, layer, training=True) == "native":
        return native.backward(grad, pre, x, layer, wanted)
    return experts.backward(torch.ops.moec, grad, pre, x, layer, wanted)


def _strategy(x: Tensor, layer: Layer, training: bool) -> str:
    routing, _, body = layer
    d_expert = body.down[0].shape[-2 if body.down_transposed else -1]
    problem = Problem(
        num_tokens=x.shape[0],
        top_k=routing.slots_per_row,
        num_experts=routing.offsets.shape[0],
        d_model=x.shape[1],
        d_expert=d_expert,
        dtype=x.dtype,
        device=x.device.type,
        training=training,
        stacked=body.up[0].dim() == 3,
        bias=bool(body.up_bias or body.down_bias),
        gating=body.gating,
    )
    return schedule.choose_layer(problem).name
