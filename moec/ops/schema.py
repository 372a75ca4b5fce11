"""Schemas, checks and fake kernels of the `moec::` ops.

Registered with `torch.library.Library` rather than `custom_op`, whose wrapper costs more per call (an op that does nothing, CPU:
7 against 10 us). Sizes may be symbolic: a check looks only at what is a plain int, so that it never guards. That the tensors of a
list are alike is checked while tracing, not in every call: 256 of them would take 40 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.types import IntLikeType

from . import reference

# The last two are the gradients of grouped_linear and expert_rows for their parameters. `experts` None asks for one stacked
# tensor [E, ...], a list for one tensor, with storage of its own, for each of these experts.
OPS = {
    "route": "(Tensor topk_ids, int num_experts) -> (Tensor order, Tensor inverse, Tensor offsets)",
    "dispatch": "(Tensor x, Tensor order, Tensor inverse, Tensor offsets, int slots_per_row) -> Tensor",
    "combine": "(Tensor y, Tensor order, Tensor inverse, Tensor offsets, int slots_per_row) -> Tensor",
    "grouped_linear": "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor offsets, bool transposed=False,"
    " ScalarType? dtype=None) -> Tensor",
    "expert_rows": "(Tensor[] values, Tensor offsets, SymInt rows) -> Tensor",
    "grouped_outer": "(Tensor left, Tensor right, Tensor offsets, int[]? experts, ScalarType dtype) -> Tensor[]",
    "expert_sums": "(Tensor rows, Tensor offsets, int[]? experts, ScalarType dtype) -> Tensor[]",
}

LIBRARY = torch.library.Library("moec", "DEF")

R = TypeVar("R")


def implement(name: str, key: str, kernel: Callable[..., R]) -> None:
    """Register `kernel` for op `name` under a dispatch key ("CPU", "CUDA"); arguments are checked, autocast is off inside."""
    check = _CHECKS.get(name, _unchecked)

    def run(*args: object) -> R:
        check(*args)
        with torch._C._DisableAutocast():  # what autocast does was decided when the op was written: see its `dtype`
            return kernel(*args)

    LIBRARY.impl(name, run, key)


def _refuse(op: str, found: str, expected: str, remedy: str = "") -> None:
    raise ValueError(f"moec::{op}: expected {expected}, found {found}" + (f"; {remedy}" if remedy else ""))


def _differ(a: IntLikeType, b: IntLikeType) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _check_route(topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
        _refuse("route", str(topk_ids.dtype), "integer topk_ids")
    if num_experts < 1:
        _refuse("route", str(num_experts), "num_experts >= 1")


def _check_rows(op: str, rows: Tensor, row_slots: int, inverse: Tensor, slots_per_row: int) -> None:
    if rows.dim() < 1 or slots_per_row < 1:
        _refuse(op, f"{tuple(rows.shape)} and {slots_per_row}", "a tensor of rows and slots_per_row >= 1")
    if _differ(rows.shape[0] * row_slots, inverse.shape[0]):
        _refuse(op, f"{tuple(rows.shape)}", f"{inverse.shape[0]} slots / {row_slots} rows in dimension 0")
    if isinstance(inverse.shape[0], int) and inverse.shape[0] % slots_per_row:
        _refuse(op, f"{inverse.shape[0]} slots", f"a multiple of slots_per_row={slots_per_row}")


def _check_dispatch(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> None:
    _check_rows("dispatch", x, slots_per_row, inverse, slots_per_row)


def _check_combine(y: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> None:
    _check_rows("combine", y, 1, order, 1)
    if isinstance(inverse.shape[0], int) and inverse.shape[0] % slots_per_row:
        _refuse("combine", f"{inverse.shape[0]} slots", f"a multiple of slots_per_row={slots_per_row}")


def _check_experts(op: str, what: str, tensors: Sequence[Tensor], stacked: bool, num_experts: IntLikeType) -> None:
    """E tensors, or one stacked tensor with E entries."""
    first = tensors[0]
    if _differ(first.shape[0] if stacked else len(tensors), num_experts):
        count = f"a stack of {first.shape[0]}" if stacked else f"{len(tensors)} tensor(s) of shape {tuple(first.shape)}"
        _refuse(op, count, f"{what} for {num_experts} experts: one stacked tensor, or one for each")


def _check_alike(op: str, tensors: Sequence[Tensor]) -> None:
    for e, t in enumerate(tensors):
        first = tensors[0]
        alike = t.dtype == first.dtype and t.dim() == first.dim()
        if not alike or any(_differ(a, b) for a, b in zip(t.shape, first.shape)):
            found = f"{t.dtype} {tuple(t.shape)} for expert {e}"
            _refuse(op, found, f"all experts alike: {first.dtype} {tuple(first.shape)}")


def _check_grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    op = "grouped_linear"
    if x.dim() != 2 or not weights or weights[0].dim() not in (2, 3):
        shapes = f"x {tuple(x.shape)} and weights {[tuple(w.shape) for w in weights[:1]]}"
        _refuse(op, shapes, "x [S, D] and weights [E, F, D], or E of [F, D]", "reshape x to two dimensions")
    _check_experts(op, "weights", weights, weights[0].dim() == 3, offsets.shape[0])
    out_features, in_features = weights[0].shape[-2:][:: -1 if transposed else 1]
    if _differ(x.shape[1], in_features):
        _refuse(
            op, f"x {tuple(x.shape)}", f"{in_features} columns for weights {tuple(weights[0].shape)}, {transposed=}"
        )
    if biases:
        _check_experts(op, "biases", biases, biases[0].dim() == 2, offsets.shape[0])
        if _differ(biases[0].shape[-1], out_features):
            _refuse(op, f"biases {tuple(biases[0].shape)}", f"{out_features} columns")
    found = [_cast_dtype(t, dtype) for t in (x, weights[0], *biases[:1])]
    if len(set(found)) > 1:
        _refuse(op, f"{found}", "x, weights and biases of one dtype", "cast them, or pass dtype= as autocast would")


def _check_expert_rows(values: Sequence[Tensor], offsets: Tensor, rows: IntLikeType) -> None:
    if not values or (len(values) == 1 and values[0].dim() == 0):
        _refuse(
            "expert_rows",
            f"{len(values)} value(s)",
            "one stacked [E, ...], or E values",
            "stack a single expert's value",
        )
    _check_experts("expert_rows", "values", values, len(values) == 1, offsets.shape[0])


def _check_grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> None:
    if left.dim() != 2 or right.dim() != 2 or left.dtype != right.dtype or _differ(left.shape[0], right.shape[0]):
        found = f"{left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
        _refuse("grouped_outer", found, "left [S, M] and right [S, N] of one dtype")


def _check_expert_sums(rows: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype) -> None:
    if rows.dim() < 1:
        _refuse("expert_sums", f"{tuple(rows.shape)}", "rows [S, ...]")


_CHECKS: dict[str, Callable[..., None]] = {
    "route": _check_route,
    "dispatch": _check_dispatch,
    "combine": _check_combine,
    "grouped_linear": _check_grouped_linear,
    "expert_rows": _check_expert_rows,
    "grouped_outer": _check_grouped_outer,
    "expert_sums": _check_expert_sums,
}


def _unchecked(*args: object) -> None:
    """For ops that another op calls, which has checked."""


def _cast_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return t.dtype if dtype is None or not t.is_floating_point() or t.dtype == torch.float64 else dtype


def _fake_route(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def empty(size: IntLikeType) -> Tensor:
        return topk_ids.new_empty(size, dtype=torch.int64)

    return empty(topk_ids.numel()), empty(topk_ids.numel()), empty(num_experts)


def _fake_dispatch(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    return x.new_empty((order.shape[0], *x.shape[1:]))


def _fake_combine(y: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, slots_per_row: int) -> Tensor:
    return y.new_empty((inverse.shape[0] // slots_per_row, *y.shape[1:]))


def _fake_grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_alike("grouped_linear", weights)
    _check_alike("grouped_linear", biases)
    return x.new_empty((x.shape[0], weights[0].shape[-1 if transposed else -2]), dtype=_cast_dtype(x, dtype))


def _fake_expert_rows(values: Sequence[Tensor], offsets: Tensor, rows: IntLikeType) -> Tensor:
    _check_alike("expert_rows", values)
    return values[0].new_empty((rows, *values[0].shape[1 if len(values) == 1 else 0 :]))


def _fake_grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    return _fake_selected(left, offsets, (left.shape[1], right.shape[1]), experts, dtype)


def _fake_expert_sums(rows: Tensor, offsets: Tensor, experts: Sequence[int] | None, dtype: torch.dtype) -> list[Tensor]:
    return _fake_selected(rows, offsets, rows.shape[1:], experts, dtype)


def _fake_selected(
    like: Tensor,
    offsets: Tensor,
    shape: Sequence[IntLikeType],
    experts: Sequence[int] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    if experts is None:
        return [like.new_empty((offsets.shape[0], *shape), dtype=dtype)]
    return [like.new_empty(tuple(shape), dtype=dtype) for _ in experts]


_FAKES: dict[str, Callable[..., object]] = {
    "route": _fake_route,
    "dispatch": _fake_dispatch,
    "combine": _fake_combine,
    "grouped_linear": _fake_grouped_linear,
    "expert_rows": _fake_expert_rows,
    "grouped_outer": _fake_grouped_outer,
    "expert_sums": _fake_expert_sums,
}


def _checked(check: Callable[..., None], fake: Callable[..., R]) -> Callable[..., R]:
    def run(*args: object) -> R:
        check(*args)
        return fake(*args)

    return run


for _name, _schema in OPS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    implement(_name, "CompositeExplicitAutograd", getattr(reference, _name))
    torch.library.register_fake(f"moec::{_name}", _checked(_CHECKS[_name], _FAKES[_name]), lib=LIBRARY)
