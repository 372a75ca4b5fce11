"""One matrix-vector product for each row, with its expert's weight gathered: for a few rows, on CUDA.

Memory: S * F * D elements for the gathered weights. Nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.ops.reference import cast, zero_tail


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x, (stack,) = cast(x, dtype), weights
    rows = torch.arange(x.shape[0], device=x.device)
    # In the tail any expert will do.
    expert = torch.searchsorted(offsets, rows, right=True).clamp(max=offsets.shape[0] - 1)
    weight = cast(stack[expert], dtype)
    weight, column = weight.mT if transposed else weight, x.unsqueeze(-1)
    if not biases:
        return zero_tail(torch.bmm(weight, column).squeeze(-1), offsets)
    bias = biases[0] if len(biases) == 1 and biases[0].dim() == 2 else torch.stack(list(biases))
    return zero_tail(torch.baddbmm(cast(bias[expert], dtype).unsqueeze(-1), weight, column).squeeze(-1), offsets)
