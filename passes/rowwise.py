"""rowwise: which operations work row by row, and how to call them again.

A body runs on slot rows in an order of our choosing, so each operation in it has to treat the leading dim as a batch: point-wise
operations do (torch tags them), reductions and shape changes do when they keep to the feature dims. Anything else is refused by
the body, never assumed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch

# Reductions and normalisations over feature dims: name -> (position of the dim argument, its keyword)
OVER_DIMS = {
    "softmax": "dim", "log_softmax": "dim", "_softmax": "dim", "sum": "dim", "mean": "dim", "amax": "dim", "amin": "dim", "var": "dim", "std": "dim",
    "logsumexp": "dim", "norm": "dim", "linalg_vector_norm": "dim", "vector_norm": "dim", "normalize": "dim", "glu": "dim", "cumsum": "dim",
}  # fmt: skip
OPERATORS: dict[str, Callable[..., object]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow, "neg": operator.neg,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "bitwise_and": operator.and_, "bitwise_or": operator.or_, "floor_divide": operator.floordiv,
}  # fmt: skip
NOT_POINTWISE = {"bernoulli", "dropout", "rrelu", "native_dropout", "feature_dropout", "alpha_dropout"}
EXTRA_POINTWISE = {"cast", "relu6", "softsign", "tanhshrink", "logsigmoid", "selu", "celu", "quick_gelu", "masked_fill", "where", "hardswish", "mish"}


@functools.lru_cache(maxsize=None)
def is_pointwise(name: str) -> bool:
    """Whether the operation of that name maps corresponding elements only, by torch's own tag."""
    if name in NOT_POINTWISE:
        return False
    if name in EXTRA_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, o) for o in packet.overloads()]
    return any(torch.Tag.pointwise in o.tags for o in overloads) and not any(
        torch.Tag.nondeterministic_seeded in o.tags for o in overloads
    )


def callable_for(name: str) -> Callable[..., object] | None:
    """The torch function that computes the operation of that (functional) name."""
    if name in OPERATORS:
        return OPERATORS[name]
    for namespace in (torch, torch.nn.functional, torch.special, torch.linalg):
        found = getattr(namespace, name, None)
        if callable(found):
            return found
    packet = getattr(torch.ops.aten, name, None)
    return packet if packet is not None else None
