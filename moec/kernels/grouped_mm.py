"""`F.grouped_mm` on stacked weights: one kernel on CUDA, a loop in C++ on CPU; where it is legal is said by `moec.schedule`.

It leaves rows past the last offset uninitialized, so they are zeroed here, and takes no bias, so that its rows are added to the
rounded product: with a bias, a 16-bit result is rounded twice where `F.linear` rounds once. (On CPU the schedule refuses that.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.ops.reference import cast, expert_rows, zero_tail


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x, (stack,) = cast(x, dtype), weights
    stack = cast(stack, dtype)
    out = F.grouped_mm(_aligned(x), _aligned(stack if transposed else stack.mT), offs=offsets.to(torch.int32))
    if biases:
        bias = biases[0] if len(biases) == 1 and biases[0].dim() == 2 else torch.stack(list(biases))
        out += expert_rows([cast(bias, dtype)], offsets, x.shape[0])
    if out.is_cpu:
        out[int(offsets[-1]) :].zero_()
        return out
    return zero_tail(out, offsets)


def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    products = F.grouped_mm(_aligned(left).t(), _aligned(right), offs=offsets.to(torch.int32))
    # Nothing promises what an empty group leaves in the result.
    empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
    return [products.masked_fill_(empty.view(-1, 1, 1), 0).to(dtype)]


def _aligned(t: Tensor) -> Tensor:
    """The kernel wants one of the last two strides to be 1, the other a multiple of 16 bytes, and as much of the address."""
    unit = 16 // t.element_size()
    rows, columns = t.stride()[-2:]
    row_major = columns == 1 and rows % unit == 0 and rows >= t.shape[-1]
    column_major = rows == 1 and columns % unit == 0 and columns >= t.shape[-2]
    if (row_major or column_major) and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
