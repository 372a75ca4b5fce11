"""Tensors to pointers: what `forward` and `backward` of the library are called with.

Shape letters as in `moec.ops.experts`, which says what a `Layer` holds. Tensors may lie anywhere in memory.

    pre_p = x[token] W_up.T + b     [S, F] or [S, 2F], in the order of the weight's outputs ("separate": gate first)
    h_p   = act(gate_p) * up_p, or act(pre_p)
    out_t = sum over the slots of t of scale * (h_p W_down.T + b)

All sums are in float32; h and out are rounded once to the dtype of x. A token's slots are added in the order of their
experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moec.ops.experts import Body, Layer

from .build import library

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
LARGE = 4 << 20  # bytes; larger results get large pages

Needs = bool | Sequence[bool]
Pointers = np.ndarray


class Operand(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("out_stride", ctypes.c_int64), ("in_stride", ctypes.c_int64)]


class Call(ctypes.Structure):
    """As in `call.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "activation", "gated", "interleaved")),
        *((name, ctypes.c_int64) for name in ("tokens", "slots_per_row", "experts", "d_model", "d_expert", "threads")),
        *((name, ctypes.c_void_p) for name in ("order", "offsets", "x", "scale")),
        ("scale_is_float", ctypes.c_int64),
        *((name, Operand) for name in ("gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("gate_bias", "up_bias", "down_bias")),
        ("bias_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pre", "out", "grad", "grad_x", "grad_scale")),
        *((name, Operand) for name in ("gate_grad", "up_grad", "down_grad")),
        *((name, ctypes.c_void_p) for name in ("gate_bias_grad", "up_bias_grad", "down_bias_grad", "scratch")),
    ]


def refuses(dtype: torch.dtype, d_model: int, d_expert: int, body: str | None = None) -> str | None:
    """Why this cannot be computed; None when it can. `body`: an activation's name, if known."""
    if dtype not in DTYPES:
        return f"takes bfloat16, float32 and float16, not {dtype}"
    if d_model < 1 or d_expert < 1:
        return f"takes widths of at least 1, not {d_model} and {d_expert}"
    if body is not None and body not in ACTIVATIONS:
        return f"knows the activations {', '.join(ACTIVATIONS)}, not {body}"
    return None


def forward(x: Tensor, layer: Layer, keep: bool) -> tuple[Tensor, Tensor]:
    """-> out [T, D], pre [S, F or 2F] (its tail is not written), or [0, F or 2F] without `keep`; both in the dtype of x.

    The scale of `layer` is float32 or in the dtype of x.
    """
    operands = Operands.of(x, layer)
    call = operands.call()
    out, pre = _fresh(x, x.shape), _fresh(x, (operands.order.shape[0] if keep else 0, layer.body.num_pre))
    call.out, call.pre = out.data_ptr(), pre.data_ptr() if keep else None
    _run("forward", call)
    return out, pre


def backward(
    grad: Tensor, x: Tensor, pre: Tensor, layer: Layer, needs: Sequence[Needs]
) -> tuple[Tensor | None | list[Tensor | None], ...]:
    """-> gradients of x, scale (None where not needed), and lists for gate, up, down, gate_bias, up_bias, down_bias.

    `grad` [T, D] is that of out, `pre` what `forward` kept. `needs`: for each of these eight whether it is needed, or for each
    tensor of the list. A stack has one gradient, separate weights have one each with storage of its own, or if they are
    bundled one for all of a list, in one tensor [E, ...]; zeros for an expert without rows.
    """
    operands, body = Operands.of(x, layer), layer.body
    call = operands.call()
    grad, pre = grad.contiguous(), pre.contiguous()
    call.grad, call.pre = grad.data_ptr(), pre.data_ptr()

    needs_x, needs_scale, *needs_lists = needs
    scale = layer.scale
    grad_x = _fresh(x, x.shape) if needs_x else None
    grad_scale = torch.zeros(operands.order.shape[0]) if needs_scale and scale is not None else None
    call.grad_x = None if grad_x is None else grad_x.data_ptr()
    call.grad_scale = None if grad_scale is None else grad_scale.data_ptr()

    results = [_like(tensors, need, body.bundled) for tensors, need in zip(body[:6], needs_lists)]
    at = [_targets(result, 3 if i < 3 else 2) for i, result in enumerate(results)]
    d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias = at
    if d_up is not None or d_gate is not None:
        up_strides = _contiguous(body.up[0], body.up_transposed)
        d_gate, d_up, up_strides = _split(d_gate, d_up, up_strides, body, x.element_size())
        call.gate_grad, call.up_grad = _operand(d_gate, up_strides), _operand(d_up, up_strides)
    if d_down is not None:
        call.down_grad = _operand(d_down, _contiguous(body.down[0], body.down_transposed))
    d_gate_bias, d_up_bias, _ = _split(d_gate_bias, d_up_bias, (1, 0), body, x.element_size())
    call.gate_bias_grad, call.up_bias_grad, call.down_bias_grad = map(_address, (d_gate_bias, d_up_bias, d_down_bias))
    _run("backward", call)
    if grad_scale is not None and scale is not None:
        grad_scale = grad_scale.to(scale.dtype).view(scale.shape)
    return grad_x, grad_scale, *results


@dataclass
class Operands:
    """What both directions read, by pointer; keeps alive what the pointers point at."""

    x: Tensor
    order: Tensor
    offsets: Tensor
    scale: Tensor | None
    layer: Layer
    gate: tuple[Pointers | None, tuple[int, int]]
    up: tuple[Pointers, tuple[int, int]]
    down: tuple[Pointers, tuple[int, int]]
    biases: list[Pointers | None]
    alive: list[object]

    @staticmethod
    def of(x: Tensor, layer: Layer) -> Operands:
        _check(x, layer)
        routing, scale, body = layer
        alive: list[object] = []
        size = x.element_size()
        at, strides = _weights(body.up, body.up_transposed, alive)
        gate_at, gate_strides = _weights(body.gate, body.up_transposed, alive) if body.gate else (None, strides)
        if gate_strides != strides:
            at, strides = _weights([w.contiguous() for w in body.up], body.up_transposed, alive)
            gate_at, _ = _weights([w.contiguous() for w in body.gate], body.up_transposed, alive)
        gate_at, up_at, strides = _split(gate_at, at, strides, body, size)
        assert up_at is not None
        biases = [_pointers([t.contiguous() for t in b], 2, alive) if b else None for b in body[3:6]]
        biases[0], biases[1], _ = _split(biases[0], biases[1], (1, 0), body, size)
        return Operands(
            x=x.contiguous(),
            order=routing.order.contiguous(),
            offsets=routing.offsets.contiguous(),
            scale=None if scale is None else scale.contiguous(),
            layer=layer,
            gate=(gate_at, strides),
            up=(up_at, strides),
            down=_weights(body.down, body.down_transposed, alive),
            biases=biases,
            alive=alive,
        )

    def call(self) -> Call:
        routing, _, body = self.layer
        call = Call(
            dtype=DTYPES.index(self.x.dtype),
            activation=ACTIVATIONS.index(body.activation),
            gated=body.gating != "none",
            interleaved=body.gating == "interleaved",
            tokens=self.x.shape[0],
            slots_per_row=routing.slots_per_row,
            experts=self.offsets.shape[0],
            d_model=self.x.shape[1],
            d_expert=body.d_expert,
            threads=torch.get_num_threads(),
            order=self.order.data_ptr(),
            offsets=self.offsets.data_ptr(),
            x=self.x.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            scale_is_float=self.scale is not None and self.scale.dtype == torch.float32,
            gate=_operand(*self.gate),
            up=_operand(*self.up),
            down=_operand(*self.down),
            bias_step=2 if body.gating == "interleaved" else 1,
        )
        call.gate_bias, call.up_bias, call.down_bias = map(_address, self.biases)
        return call


def _check(x: Tensor, layer: Layer) -> None:
    _, scale, body = layer
    if reason := refuses(x.dtype, x.shape[1], body.d_expert):
        raise ValueError(f"moec native: {reason}")
    for tensors in body[:6]:
        if tensors and tensors[0].dtype != x.dtype:
            raise ValueError(f"moec native: expected weights and biases of {x.dtype}, found {tensors[0].dtype}")
    if scale is not None and scale.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"moec native: expected a scale of float32 or {x.dtype}, found {scale.dtype}")
    if bool(body.gate) != (body.gating == "separate"):
        raise ValueError(
            f"moec native: gating {body.gating!r} with {len(body.gate)} tensors for gate; only 'separate' has them"
        )


def _weights(weights: Sequence[Tensor], transposed: bool, alive: list[object]) -> tuple[Pointers, tuple[int, int]]:
    """Pointers, and the strides (out, in) that all have. What has no stride of 1 in its last two dimensions is copied."""
    strides = {_strides(w, False) for w in weights}
    if len(strides) > 1 or not all(1 in s and 0 not in s for s in strides):
        weights = [w.contiguous() for w in weights]
    return _pointers(weights, 3, alive), _strides(weights[0], transposed)


def _strides(w: Tensor, transposed: bool) -> tuple[int, int]:
    """Of the last two dimensions, as (out, in). A dimension of size 1 gets the stride that a contiguous tensor has."""
    rows, columns = w.stride()[-2:]
    columns = 1 if w.shape[-1] == 1 else columns
    rows = columns * w.shape[-1] if w.shape[-2] == 1 else rows
    return (columns, rows) if transposed else (rows, columns)


def _contiguous(w: Tensor, transposed: bool) -> tuple[int, int]:
    return (1, w.shape[-1]) if transposed else (w.shape[-1], 1)


def _pointers(tensors: Sequence[Tensor], stacked_dim: int, alive: list[object]) -> Pointers:
    """One for each expert; a stack has `stacked_dim` dimensions, one expert's tensor has one less."""
    alive.extend(tensors)
    if tensors[0].dim() == stacked_dim:
        return _stack_pointers(tensors[0])
    return np.array([t.data_ptr() for t in tensors], dtype=np.uint64)


def _stack_pointers(stack: Tensor) -> Pointers:
    step = stack.stride(0) * stack.element_size()
    return np.arange(stack.shape[0], dtype=np.uint64) * np.uint64(step) + np.uint64(stack.data_ptr())


def _split(
    gate: Pointers | None, up: Pointers | None, strides: tuple[int, int], body: Body, size: int
) -> tuple[Pointers | None, Pointers | None, tuple[int, int]]:
    """A weight that holds gate and up is two, with other strides: (gate, up, strides (out, in))."""
    out_stride, in_stride = strides
    if up is None or body.gating in ("none", "separate"):
        return gate, up, strides
    step, strides = (body.d_expert, strides) if body.gating == "halves" else (1, (2 * out_stride, in_stride))
    return up, np.where(up == 0, up, up + np.uint64(step * out_stride * size)), strides


def _operand(at: Pointers | None, strides: tuple[int, int]) -> Operand:
    return Operand(_address(at), *strides)


def _address(at: Pointers | None) -> int | None:
    return None if at is None else at.ctypes.data


def _fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialized, in large pages if it is large: then writing it for the first time costs few page faults."""
    result = like.new_empty(tuple(shape))
    if (size := result.numel() * result.element_size()) >= LARGE:
        library().moec_large_pages(ctypes.c_void_p(result.data_ptr()), ctypes.c_int64(size))
    return result


def _like(tensors: Sequence[Tensor], need: Needs, stack: bool) -> list[Tensor | None]:
    if stack and tensors:
        (wanted,) = [need] if isinstance(need, bool) else need
        return [_fresh(tensors[0], (len(tensors), *tensors[0].shape)) if wanted else None]
    needs = [need] * len(tensors) if isinstance(need, bool) else need
    return [_fresh(t, t.shape) if wanted else None for t, wanted in zip(tensors, needs)]


def _targets(results: Sequence[Tensor | None], stacked_dim: int) -> Pointers | None:
    """Pointers to the result of each expert, 0 where none is needed; None if none is needed at all."""
    if all(r is None for r in results):
        return None
    if results[0] is not None and results[0].dim() == stacked_dim:
        return _stack_pointers(results[0])
    return np.array([0 if r is None else r.data_ptr() for r in results], dtype=np.uint64)


def _run(direction: str, call: Call) -> None:
    lib = library()
    scratch_size = getattr(lib, f"moec_{direction}_scratch")
    scratch_size.restype = ctypes.c_int64
    scratch = torch.empty(scratch_size(ctypes.byref(call)), dtype=torch.uint8)
    if scratch.numel() >= LARGE:
        lib.moec_large_pages(ctypes.c_void_p(scratch.data_ptr()), ctypes.c_int64(scratch.numel()))
    call.scratch = scratch.data_ptr()
    getattr(lib, f"moec_{direction}")(ctypes.byref(call))
