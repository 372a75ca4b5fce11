"""The gradients of the `moec::` ops, written with the ops themselves, so that they can be traced and have no rules of their own.

| op | gradient |
|---|---|
| dispatch, combine | each is the adjoint of the other |
| grouped_linear | x: `grouped_linear` on the weights the other way round; weights: `grouped_outer`; biases: `expert_sums` |
| expert_rows, expert_sums | each is the adjoint of the other |

Gradients may come out in the dtype of the product: autograd casts each to the dtype of its input.
An expert without rows gets zeros; a parameter that does not require a gradient gets None. The second derivative of an expert's
weight is not implemented and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .schema import LIBRARY

moec = torch.ops.moec


def _save_routing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse, offsets, ctx.slots_per_row = inputs
    ctx.save_for_backward(order, inverse, offsets)


def _dispatch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return moec.combine(grad, *ctx.saved_tensors, ctx.slots_per_row), None, None, None, None


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return moec.dispatch(grad, *ctx.saved_tensors, ctx.slots_per_row), None, None, None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, offsets, ctx.transposed, ctx.dtype = inputs
    # Flat here: x, every weight, every bias. Only what a gradient reads is kept alive.
    needs_x, *needs_parameters = ctx.needs_input_grad[: 1 + len(weights)]
    ctx.save_for_backward(offsets, x if any(needs_parameters) else None, *(weights if needs_x else ()))
    ctx.stacked, ctx.weight_dtype = weights[0].dim() == 3, weights[0].dtype
    ctx.biases_stacked, ctx.bias_dtype = (biases[0].dim() == 2, biases[0].dtype) if biases else (False, None)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, x, *weights = ctx.saved_tensors
    needs_x, needs_weights, needs_biases = ctx.needs_input_grad[:3]
    grads: list[Any] = [None] * len(ctx.needs_input_grad)
    if needs_x:
        grads[0] = moec.grouped_linear(grad, weights, [], offsets, not ctx.transposed, ctx.dtype)
    grads[1], grads[2] = [None] * len(needs_weights), [None] * len(needs_biases)
    if any(needs_weights):
        x = x.to(grad.dtype)
        left, right = (x, grad) if ctx.transposed else (grad, x)
        experts = _experts(needs_weights, ctx.stacked)
        grads[1] = _spread(moec.grouped_outer(left, right, offsets, experts, ctx.weight_dtype), needs_weights)
    if any(needs_biases):
        experts = _experts(needs_biases, ctx.biases_stacked)
        grads[2] = _spread(moec.expert_sums(grad, offsets, experts, ctx.bias_dtype), needs_biases)
    return tuple(grads)


def _save_expert_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.dtype = values[0].dtype


def _expert_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[0]
    sums = moec.expert_sums(grad, *ctx.saved_tensors, _experts(needs, len(needs) == 1), ctx.dtype)
    return _spread(sums, needs), None, None


def _save_expert_sums(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    rows, offsets, ctx.experts, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.rows, ctx.dtype = rows.shape[0], rows.dtype


def _expert_sums_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    values = list(grads)
    if ctx.experts is not None:
        values = [torch.zeros_like(grads[0])] * offsets.shape[0]
        for e, grad in zip(ctx.experts, grads):
            values[e] = grad
        values = [torch.stack(values)]
    return moec.expert_rows(values, offsets, ctx.rows).to(ctx.dtype), None, None, None


def _grouped_outer_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    raise NotImplementedError(
        "moec::grouped_outer: the second derivative of an expert's weight is not implemented. "
        "Run this model without moec where gradients are taken with create_graph=True"
    )


def _experts(needs: list[bool], stacked: bool) -> list[int] | None:
    return None if stacked else [e for e, need in enumerate(needs) if need]


def _spread(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    remaining = iter(grads)
    return [next(remaining) if need else None for need in needs]


def register() -> None:
    """Attach the gradients. `route` has none: ids and positions are integers."""
    for name, backward, save in (
        ("dispatch", _dispatch_backward, _save_routing),
        ("combine", _combine_backward, _save_routing),
        ("grouped_linear", _grouped_linear_backward, _save_linear),
        ("expert_rows", _expert_rows_backward, _save_expert_rows),
        ("expert_sums", _expert_sums_backward, _save_expert_sums),
        ("grouped_outer", _grouped_outer_backward, None),
    ):
        torch.library.register_autograd(f"moec::{name}", backward, setup_context=save, lib=LIBRARY)
