"""Collectives over rows, differentiable: plain functions around torch's functional collectives.

    gather_rows(x, rows, ranks, group)      [T, ...] -> [R * rows, ...]: every rank's rows, padded to `rows`
    scatter_sums(y, tokens, ranks, group)   [R * rows, ...] -> [T, ...]: this rank's rows, summed over the ranks; its adjoint
    swap_rows(x, received, sent, group)     rows to and from every rank, in uneven numbers

They are nodes of a graph until AOTAutograd traces through them; what Inductor sees are `_c10d_functional` nodes. Sums of 16-bit
values travel and add up in float32, and are rounded once, in both directions.

Shape letters: T tokens of this rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives  # noqa: F401  (fake kernels of the ops below)
from torch import Tensor
from torch.types import IntLikeType

from .reference import accumulation_dtype

_ops = torch.ops._c10d_functional


def gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """x [N, ...] -> [R * N, ...]; equal N on all ranks. Not differentiable."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), ranks, group))


def _reduce(y: Tensor, ranks: int, group: str) -> Tensor:
    wide = y.contiguous().to(accumulation_dtype(y.dtype))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(wide, "sum", ranks, group)).to(y.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: IntLikeType, fill: int, ranks: int, group: str) -> Tensor:
        ctx.tokens, ctx.ranks, ctx.group = x.shape[0], ranks, group
        return gather(torch.ops.moec.pad_rows(x, rows, fill), ranks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return scatter_sums(grad, ctx.tokens, ctx.ranks, ctx.group), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: IntLikeType, ranks: int, group: str) -> Tensor:
        ctx.rows, ctx.ranks, ctx.group = y.shape[0] // ranks, ranks, group
        return torch.ops.moec.trim_rows(_reduce(y, ranks, group), tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gather_rows(grad, ctx.rows, ctx.ranks, ctx.group), None, None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[Any], sent: list[Any], group: str) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return swap_rows(grad, ctx.sent, ctx.received, ctx.group), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shared: Tensor, spare: int, group: str) -> Tensor:
        ctx.save_for_backward(shared)
        ctx.spare, ctx.group = spare, group
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (shared,) = ctx.saved_tensors
        wide = grad.to(accumulation_dtype(grad.dtype))
        mine = wide.new_zeros((ctx.spare + 1, *grad.shape[1:])).index_copy(0, shared, wide)[: ctx.spare]
        total = _ops.wait_tensor(_ops.all_reduce(mine.contiguous(), "sum", ctx.group))
        copied = shared < ctx.spare
        summed = total.index_select(0, torch.where(copied, shared, 0))
        return torch.where(copied.view(-1, *[1] * (grad.dim() - 1)), summed, wide).to(grad.dtype), None, None, None


def share_gradients(local: Tensor, shared: Tensor, spare: int, group: str) -> Tensor:
    """local [n, ...], the experts of this rank, as it is; on the way back the gradients of an expert's copies are summed over the
    ranks that hold them, so that copies stay equal.

    shared [n]: the number, below `spare`, that all ranks give to an expert with copies; `spare` for an expert that is here alone.
    """
    return _Share.apply(local, shared, spare, group)


class _ShareEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: list[int], spare: int, group: str, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.numbers, ctx.spare, ctx.group = numbers, spare, group
        return tuple(w.view_as(w) for w in local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wide = accumulation_dtype(grads[0].dtype)
        at = {n: i for i, n in enumerate(ctx.numbers) if n < ctx.spare}
        empty = torch.zeros_like(grads[0], dtype=wide)
        mine = torch.stack([grads[at[n]].to(wide) if n in at else empty for n in range(ctx.spare)])
        total = _ops.wait_tensor(_ops.all_reduce(mine, "sum", ctx.group))
        summed = [total[n].to(g.dtype) if n < ctx.spare else g for n, g in zip(ctx.numbers, grads)]
        return None, None, None, *summed


def share_each(local: Sequence[Tensor], numbers: Sequence[int], spare: int, group: str) -> tuple[Tensor, ...]:
    """`share_gradients` for experts in tensors of their own; `numbers` are known when this is traced."""
    return _ShareEach.apply(list(numbers), spare, group, *local)


def gather_rows(x: Tensor, rows: IntLikeType, ranks: int, group: str, fill: int = 0) -> Tensor:
    """x [T, ...] -> [R * rows, ...]: the rows of rank r from r * rows on, `fill` below them; `rows` is equal on all ranks."""
    return _Gather.apply(x, rows, fill, ranks, group)


def scatter_sums(y: Tensor, tokens: IntLikeType, ranks: int, group: str) -> Tensor:
    """y [R * rows, ...] -> [T, ...]: the first T of this rank's rows, summed over all ranks."""
    return _Scatter.apply(y, tokens, ranks, group)


def swap_rows(x: Tensor, received: Sequence[IntLikeType], sent: Sequence[IntLikeType], group: str) -> Tensor:
    """x: `sent[r]` rows for every rank r in order -> `received[r]` rows of every rank r in order."""
    return _Swap.apply(x, list(received), list(sent), group)


def widest(x: Tensor, ranks: int, group: str) -> IntLikeType:
    """The largest number of rows that any rank has, on all ranks the same. Waits for the device."""
    sizes = gather(x.new_full((1,), x.shape[0], dtype=torch.int64), ranks, group)
    return _size(sizes.max())


def last(offsets: Tensor) -> IntLikeType:
    """The last entry of offsets [E], where the tail starts, as a number. Waits for the device."""
    return _size(offsets[-1])


def splits(ends: Tensor, ranks: int, group: str) -> tuple[list[IntLikeType], list[IntLikeType], IntLikeType]:
    """From `ends` [R], where the rows for each rank end: (rows received from each rank, rows sent to each, all rows sent).
    Waits for the device.
    """
    sent = ends.diff(prepend=ends.new_zeros(1))
    received = _ops.wait_tensor(_ops.all_to_all_single(sent, [1] * ranks, [1] * ranks, group))
    both = torch.cat([received, sent]).cpu()
    numbers = [_size(both[i]) for i in range(2 * ranks)]
    return numbers[:ranks], numbers[ranks:], sum(numbers[ranks:])


def _size(number: Tensor) -> IntLikeType:
    size: IntLikeType = number.item()  # type: ignore[assignment]
    torch._check(size >= 0)
    return size
