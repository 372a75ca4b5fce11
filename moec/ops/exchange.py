"""The ops of expert parallelism: what is local to one rank. Collectives are in `collectives`.

    logical(local, copies, shared, E, site)   a marker: the stack [E, ...] of which this rank holds only `local`
    resident(local, copies, shared, E, site)  a marker: one expert's tensor, which this rank may or may not hold
    assign(topk_ids, copies, first)           expert ids [T, K] -> slots [T, K] of the plan
    visits(slots, slots_per_rank, ranks)      -> [T, R]: r where the token has a slot on rank r, R elsewhere
    pad_rows(x, rows, fill)                   [T, ...] -> [rows, ...];   trim_rows(x, rows) is its adjoint

The markers exist so that a graph says which of its values are sharded: `passes.exchange` takes them out, and a run that meets one
stops. `pad_rows` and `trim_rows` are opaque on purpose: their sizes are compared by nobody while tracing.

Shape letters: T tokens, K top-k, E experts, C copies at most, R ranks.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.types import IntLikeType

from moec.errors import MoecError

from .schema import LIBRARY

SCHEMAS = {
    "logical": "(Tensor local, Tensor copies, Tensor shared, int num_experts, int site) -> Tensor",
    "resident": "(Tensor local, Tensor copies, Tensor shared, int num_experts, int site) -> Tensor",
    "assign": "(Tensor topk_ids, Tensor copies, int first) -> Tensor",
    "visits": "(Tensor slots, int slots_per_rank, int ranks) -> Tensor",
    "pad_rows": "(Tensor x, SymInt rows, int fill=0) -> Tensor",
    "trim_rows": "(Tensor x, SymInt rows) -> Tensor",
}


MISUSED = (
    "the experts of this model are spread over ranks (moec.parallelize), and this run is not moec's: "
    'call it through torch.compile(model, backend="moec")'
)


def _stop(local: Tensor, copies: Tensor, shared: Tensor, num_experts: int, site: int) -> NoReturn:
    raise MoecError(MISUSED)


def assign(topk_ids: Tensor, copies: Tensor, first: int) -> Tensor:
    """The slot of each choice, int64 of the shape of the ids; -1 for ids that are no expert's.

    copies [E, C]: the slots of each expert in order, padded with -1. Copies are taken in turn: token t takes copy
    (first + t) mod count.
    """
    experts = copies.shape[0]
    ids = topk_ids.to(torch.int64)
    valid = (ids >= 0) & (ids < experts)
    ids = torch.where(valid, ids, 0)
    count = (copies >= 0).sum(1).clamp(min=1)
    turn = torch.arange(ids.shape[0], device=ids.device).view(-1, *[1] * (ids.dim() - 1)) + first
    slots = copies[ids, turn % count[ids]]
    return torch.where(valid, slots, -1)


def visits(slots: Tensor, slots_per_rank: int, ranks: int) -> Tensor:
    """slots [T, K], -1 for none -> [T, R] int64."""
    rank = torch.where(slots < 0, ranks, slots // slots_per_rank)
    every = torch.arange(ranks, device=slots.device)
    hit = (rank.unsqueeze(-1) == every).any(1)
    return torch.where(hit, every, ranks)


def pad_rows(x: Tensor, rows: int, fill: int = 0) -> Tensor:
    """x [T, ...] and `fill` below it, [rows, ...]."""
    if rows < x.shape[0]:
        raise ValueError(f"moec::pad_rows: {x.shape[0]} rows do not fit in {rows}")
    out = x.new_empty((rows, *x.shape[1:]))
    out[: x.shape[0]] = x
    out[x.shape[0] :] = fill
    return out


def trim_rows(x: Tensor, rows: int) -> Tensor:
    """The first `rows` of x."""
    if rows > x.shape[0]:
        raise ValueError(f"moec::trim_rows: {rows} of {x.shape[0]} rows")
    return x[:rows].clone()


def _fake_logical(local: Tensor, copies: Tensor, shared: Tensor, num_experts: int, site: int) -> Tensor:
    return local.new_empty((num_experts, *local.shape[1:]))


def _fake_resident(local: Tensor, copies: Tensor, shared: Tensor, num_experts: int, site: int) -> Tensor:
    return local.new_empty(local.shape)


def _fake_assign(topk_ids: Tensor, copies: Tensor, first: int) -> Tensor:
    return topk_ids.new_empty(topk_ids.shape, dtype=torch.int64)


def _fake_visits(slots: Tensor, slots_per_rank: int, ranks: int) -> Tensor:
    return slots.new_empty((slots.shape[0], ranks))


def _fake_pad(x: Tensor, rows: IntLikeType, fill: int = 0) -> Tensor:
    return x.new_empty((rows, *x.shape[1:]))


def _fake_trim(x: Tensor, rows: IntLikeType) -> Tensor:
    return x.new_empty((rows, *x.shape[1:]))


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = inputs[0].shape[0]


def _pad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.trim_rows(grad, ctx.rows), None, None


def _trim_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.pad_rows(grad, ctx.rows), None


def _marker_backward(ctx: Any, grad: Tensor) -> NoReturn:
    raise MoecError(MISUSED)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any, Any, Any]] = {
    "logical": (_stop, _fake_logical, _marker_backward, None),
    "resident": (_stop, _fake_resident, _marker_backward, None),
    "assign": (assign, _fake_assign, None, None),
    "visits": (visits, _fake_visits, None, None),
    "pad_rows": (pad_rows, _fake_pad, _pad_backward, _save_rows),
    "trim_rows": (trim_rows, _fake_trim, _trim_backward, _save_rows),
}

for _name, _schema in SCHEMAS.items():
    _kernel, _fake, _backward, _save = _IMPLEMENTATIONS[_name]
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moec::{_name}", _fake, lib=LIBRARY)
    if _backward is not None:
        torch.library.register_autograd(f"moec::{_name}", _backward, setup_context=_save, lib=LIBRARY)
