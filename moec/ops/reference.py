"""What the ops mean, in plain torch and for any device. Slow on purpose: nothing here is clever.

Shape letters: T tokens, K top-k, S = T*K slots, E experts, D model width, F expert width, R rows (T, or S).
A *segment* is the run of rows that belongs to one expert; the *tail* is what follows the last segment: slots without an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def route(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots by expert, stably. topk_ids: integers of any shape -> order [S], inverse [S], offsets [E], all int64."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    sorted_ids, order = torch.sort(ids, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    experts = torch.arange(num_experts, device=ids.device)
    return order, inverse, torch.searchsorted(sorted_ids, experts, right=True)


def dispatch(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    """x [R, ...] -> [S, ...]: row p is x[order[p] // slots_per_row], zeros in the tail."""
    return zero_tail(x[order // slots_per_row], offsets)


def combine(y: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    """y [S, ...] -> [R, ...]: row r is the sum over j of y[inverse[r*slots_per_row + j]], tail rows left out."""
    positions = inverse.view(-1, slots_per_row)
    valid = positions < offsets[-1]
    total = y.new_zeros((positions.shape[0], *y.shape[1:]), dtype=accumulation_dtype(y.dtype))
    if y.shape[0] < inverse.shape[0]:  # rows of the tail were left out
        y = torch.cat([y, y.new_zeros((1, *y.shape[1:]))])
        positions = positions.clamp(max=y.shape[0] - 1)
    for j in range(slots_per_row):
        rows = y[positions[:, j]]
        total += rows.masked_fill(~_column(valid[:, j], rows), 0)
    return total.to(y.dtype)


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [S, D] sorted by expert -> [S, F]: `F.linear(x_e, W_e, b_e)` on every segment, zeros in the tail."""
    x = cast(x, dtype)
    w, b = per_expert(weights, 3), per_expert(biases, 2)
    out = x.new_zeros((x.shape[0], w[0].shape[1 if transposed else 0]))
    for e, begin, end in segments(offsets):
        weight = cast(w[e], dtype)
        bias = cast(b[e], dtype) if biases else None
        out[begin:end] = F.linear(x[begin:end], weight.t() if transposed else weight, bias)
    return out


def expert_rows(values: Sequence[Tensor], offsets: Tensor, rows: int) -> Tensor:
    """values [E, ...], or E of [...] -> [rows, ...]: row p is the value of its expert, zeros in the tail."""
    stacked = values[0] if len(values) == 1 else torch.stack(list(values))
    expert = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True)
    return zero_tail(stacked[expert.clamp(max=offsets.numel() - 1)], offsets)


def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    """left [S, M], right [S, N] -> left_e.T @ right_e [M, N] for each of `experts`; None: for all of them, stacked.

    Rounded once to the dtype of `left`, then cast to `dtype`. The gradient of `grouped_linear` for its weights.
    """
    products = left.new_zeros((offsets.numel(), left.shape[1], right.shape[1]), dtype=dtype)
    for e, begin, end in segments(offsets):
        products[e] = (left[begin:end].t() @ right[begin:end]).to(dtype)
    return _selected(products, experts)


def expert_sums(rows: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
    """rows [S, ...] -> the sum of the rows of each of `experts`; None: of all of them, stacked [E, ...].

    Accumulated in float32 for 16-bit types, rounded once to `dtype`. The adjoint of `expert_rows`.
    """
    sums = rows.new_zeros((offsets.numel(), *rows.shape[1:]), dtype=dtype)
    for e, begin, end in segments(offsets):
        sums[e] = rows[begin:end].sum(0, dtype=accumulation_dtype(rows.dtype)).to(dtype)
    return _selected(sums, experts)


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of every expert that has rows. Reads `offsets` on the host, once."""
    ends = offsets.tolist()
    return ((e, begin, end) for e, (begin, end) in enumerate(pairwise([0, *ends])) if end > begin)


def zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """`rows` [S, ...], changed in place to hold zeros from `offsets[-1]` on; nothing is read on the host."""
    tail = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill_(_column(tail, rows), 0)


def cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As autocast casts an operand: floating tensors, except float64, to `dtype`; None leaves all as they are."""
    return t if dtype is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def per_expert(tensors: Sequence[Tensor], stacked_dim: int) -> Tensor | Sequence[Tensor]:
    """What `[e]` gives the tensor of expert e: a stack has `stacked_dim` dimensions, one expert's tensor has one less."""
    return tensors[0] if tensors and tensors[0].dim() == stacked_dim else tensors


def _column(mask: Tensor, rows: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (rows.dim() - 1))


def _selected(stacked: Tensor, experts: Sequence[int] | None) -> list[Tensor]:
    return [stacked] if experts is None else [stacked[e].clone() for e in experts]
