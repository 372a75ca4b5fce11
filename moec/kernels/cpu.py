"""Kernels for CPU tensors. Offsets are read on the host, so only experts that have rows are ever touched.

The products are a loop of `torch.mm(..., out=)` into slices of one result: no allocation per expert, and bit for bit what
`F.linear` gives for each expert. The loop also serves CUDA tensors where nothing better is legal; it then synchronizes once.
It takes any dtype, width, bias and list. Where the loop that torch has in C++ is legal, `moec.schedule` prefers it if many
experts have rows: it saves 2-5 us for each (one core of an EPYC 9004, bf16, [2048, 256] x [256, 1024], E=256: 27.1 against
28.5 ms).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moec.ops import reference
from moec.ops.reference import accumulation_dtype, cast, per_expert, segments


def route(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """numpy sorts 16-bit keys by radix: 16384 slots in 0.2 ms where torch takes 0.6 ms to 6 ms, by the state of its threads."""
    if num_experts >= np.iinfo(np.uint16).max:
        return reference.route(topk_ids, num_experts)
    ids = topk_ids.reshape(-1).to(torch.int64).numpy()
    keys = np.where((ids < 0) | (ids >= num_experts), num_experts, ids).astype(np.uint16)
    order = np.argsort(keys, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    offsets = np.bincount(keys, minlength=num_experts + 1)[:num_experts].cumsum()
    return torch.from_numpy(order), torch.from_numpy(inverse), torch.from_numpy(offsets)


def dispatch(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    rows = x.index_select(0, order if slots_per_row == 1 else order // slots_per_row)
    rows[_end(offsets) :].zero_()
    return rows


def combine(y: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    """`embedding_bag` adds gathered rows without storing them, in order, with float32 sums for 16-bit rows."""
    if y.numel() == 0 or not y.is_floating_point():
        return reference.combine(y, order, inverse, offsets, slots_per_row)
    end = _end(offsets)
    starts = torch.arange(0, inverse.numel(), slots_per_row)
    if end < inverse.numel():
        valid = inverse < end
        kept = valid.view(-1, slots_per_row).sum(1)
        inverse, starts = inverse[valid], kept.cumsum(0) - kept
    rows = y.reshape(y.shape[0], -1).contiguous()
    total = torch.embedding_bag(rows, inverse.contiguous(), starts)[0]
    return total.view(-1, *y.shape[1:])


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x = _row_major(cast(x, dtype))
    out = x.new_empty((x.shape[0], weights[0].shape[-1 if transposed else -2]))
    hit, sizes, end = _hit(offsets)
    out[end:].zero_()
    if not hit:
        return out
    b = per_expert(biases, 2)
    for e, w, x_e, out_e in zip(hit, _weights(weights, transposed, hit), x[:end].split(sizes), out[:end].split(sizes)):
        if dtype is not None:
            w = cast(w, dtype)
        if biases:
            torch.addmm(cast(b[e], dtype), x_e, w, out=out_e)
        else:
            torch.mm(x_e, w, out=out_e)
    return out


def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    left, right = _row_major(left), _row_major(right)
    num_experts, shape = offsets.shape[0], (left.shape[1], right.shape[1])
    if experts is None:
        stack = left.new_empty((num_experts, *shape), dtype=dtype)
        products = list(enumerate(stack.unbind(0)))
    else:
        products = [(e, left.new_empty(shape, dtype=dtype)) for e in experts]
    spans = {e: slice(begin, end) for e, begin, end in segments(offsets)}
    for e, out in products:
        if e not in spans:
            out.zero_()
        elif dtype == left.dtype:
            torch.mm(left[spans[e]].t(), right[spans[e]], out=out)
        else:
            out.copy_(left[spans[e]].t() @ right[spans[e]])
    return [stack] if experts is None else [out for _, out in products]


def expert_rows(values: Sequence[Tensor], offsets: Tensor, rows: int) -> Tensor:
    """One gather from a stack; a loop over the experts that have rows where values are separate."""
    out = values[0].new_empty((rows, *values[0].shape[1 if len(values) == 1 else 0 :]))
    end = _end(offsets)
    if len(values) == 1 and end:
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        owner = torch.arange(offsets.numel()).repeat_interleave(counts, output_size=end)
        torch.index_select(values[0], 0, owner, out=out[:end])
    else:
        for e, begin, stop in segments(offsets):
            out[begin:stop] = values[e]
    out[end:].zero_()
    return out


def expert_sums(rows: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
    """`embedding_bag` for many experts with few rows each, where a loop is all overhead. It adds one row after the other, which
    errs more than the pairwise `sum` once there are many.
    """
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    few = rows.numel() > 0 and counts.numel() > 0 and int(counts.max()) <= 32
    if few and rows.is_floating_point() and dtype == rows.dtype:
        starts = offsets - counts
        flat = rows.reshape(rows.shape[0], -1).contiguous()
        sums = torch.embedding_bag(flat, torch.arange(_end(offsets)), starts)[0].view(-1, *rows.shape[1:])
    else:
        accumulate = accumulation_dtype(rows.dtype)
        sums = rows.new_zeros((offsets.shape[0], *rows.shape[1:]), dtype=dtype)
        for e, begin, end in segments(offsets):
            sums[e] = rows[begin:end].sum(0, dtype=accumulate)
    return [sums] if experts is None else [sums[e].clone() for e in experts]


def _end(offsets: Tensor) -> int:
    return int(offsets[-1]) if offsets.numel() else 0


def _hit(offsets: Tensor) -> tuple[list[int], list[int], int]:
    """The experts that have rows, how many rows each, and where the tail starts."""
    counts = np.diff(offsets.numpy(force=True), prepend=0)
    (hit,) = counts.nonzero()
    return hit.tolist(), counts[hit].tolist(), int(counts.sum())


def _weights(weights: Sequence[Tensor], transposed: bool, hit: Sequence[int]) -> Sequence[Tensor]:
    """[D, F] for every expert that has rows, as views; the loop around it should do nothing but multiply."""
    if weights[0].dim() == 3:
        stack = weights[0] if transposed else weights[0].mT
        views = stack.unbind(0) if 4 * len(hit) > stack.shape[0] else stack
        return [views[e] for e in hit]
    shape = weights[0].shape
    for e in hit:
        if weights[e].shape != shape:  # out= would only warn
            raise ValueError(
                f"moec::grouped_linear: expert {e} has a weight of {tuple(weights[e].shape)}, others of {tuple(shape)}"
            )
    return [weights[e] if transposed else weights[e].t() for e in hit]


def _row_major(x: Tensor) -> Tensor:
    """GEMMs read rows at any distance, but not expanded or transposed ones without a copy for each expert."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
