"""Kernels for CUDA tensors where the reference would read on the host or do needless work. Plain torch, no synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.ops.reference import accumulation_dtype


def route(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with keys as narrow as E allows: a radix sort passes over every byte of them."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    keys = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    keys = keys.to(torch.uint8 if num_experts < 255 else torch.int16 if num_experts < 32767 else torch.int64)
    sorted_keys, order = torch.sort(keys, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    experts = torch.arange(num_experts, device=keys.device)
    return order, inverse, torch.searchsorted(sorted_keys.to(torch.int64), experts, right=True)


def expert_sums(rows: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
    """One deterministic pass: each thread adds one column of one segment."""
    shape = (offsets.shape[0], *rows.shape[1:])
    if rows.numel() == 0:
        sums = rows.new_zeros(shape, dtype=dtype)
    else:
        flat = rows.reshape(rows.shape[0], -1).to(accumulation_dtype(rows.dtype))
        bounds = torch.cat([offsets.new_zeros(1), offsets])
        sums = torch.segment_reduce(flat, "sum", offsets=bounds, axis=0, unsafe=True, initial=0).view(shape).to(dtype)
    return [sums] if experts is None else [sums[e].clone() for e in experts]
