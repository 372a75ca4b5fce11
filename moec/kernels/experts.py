"""A whole layer of experts, by the strategy that `moec.schedule` chooses for it; see `moec.ops.experts`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from moec import schedule
from moec.ir import Problem
from moec.ops import experts
from moec.ops.experts import Layer, Wanted

from . import native

_PARAMETERS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def experts_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(out [T, D], pre [S, F or 2F]); see `moec.ops.experts.forward`."""
    *given, out_dtype, keep, key = experts.with_key(args, "experts_forward")
    layer = experts.unpack(given, key)
    if _strategy(x, layer, out_dtype, training=keep) == "native":
        return _native_forward(x, layer, keep)
    return experts.forward(torch.ops.moec, x, layer, out_dtype, keep)


def experts_backward(grad: Tensor, pre: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    """The gradients that are wanted; see `moec.ops.experts.backward`."""
    *given, wanted, key = experts.with_key(args, "experts_backward")
    layer = experts.unpack(given, key, unwritten=True)
    if _strategy(x, layer, grad.dtype, training=True) == "native":
        return _native_backward(grad, pre, x, layer, Wanted(wanted, layer.body))
    return experts.backward(torch.ops.moec, grad, pre, x, layer, wanted)


def _native_forward(x: Tensor, layer: Layer, keep: bool) -> tuple[Tensor, Tensor]:
    run: Any = native.forward
    out, pre = run(x, *_arguments(layer), keep)
    return out, pre if keep else pre.new_empty((0, layer.body.num_pre))


def _native_backward(grad: Tensor, pre: Tensor, x: Tensor, layer: Layer, wanted: Wanted) -> list[Tensor]:
    needs = [wanted.x, wanted.scale, *map(wanted.needs, _PARAMETERS)]
    run: Any = native.backward
    grads = run(grad, x, pre, *_arguments(layer), needs, layer.body.bundled)
    return [g for g in (*grads[:2], *itertools.chain(*grads[2:])) if g is not None]


def _arguments(layer: Layer) -> tuple[Any, ...]:
    """From `order` to `down_transposed`."""
    routing, scale, body = layer
    kind = (routing.slots_per_row, body.activation, body.gating, body.up_transposed, body.down_transposed)
    return (*routing[:3], scale, *body[:6], *kind)


def _strategy(x: Tensor, layer: Layer, out_dtype: torch.dtype, training: bool) -> str:
    routing, _, body = layer
    width = body.down[0].shape[-1 if body.down_transposed else -2]
    one_sided = body.gating == "separate" and bool(body.gate_bias) != bool(body.up_bias)
    if out_dtype != x.dtype or width != x.shape[1] or one_sided:  # what the library does not know
        return "composed"
    problem = Problem(
        num_tokens=x.shape[0],
        top_k=routing.slots_per_row,
        num_experts=routing.offsets.shape[0],
        d_model=x.shape[1],
        d_expert=body.down[0].shape[-2 if body.down_transposed else -1],
        dtype=x.dtype,
        device=x.device.type,
        training=training,
        stacked=body.up[0].dim() == 3,
        bias=bool(body.up_bias or body.down_bias),
        gating=body.gating,
    )
    return schedule.choose_layer(problem).name
