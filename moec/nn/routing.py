"""What a router decides, and the routed sum that follows from it.

    token choice      out[t] = sum over k of weights[t, k] * f(x[t]; ids[t, k])
    expert choice     out[tokens[e, c]] += weights[e, c] * f(x[tokens[e, c]]; e)

Both become rows sorted by expert, one call of the experts, and a sum in a fixed order, in `moec::` ops. Expert choice has its
slots sorted already, each expert has C of them; what must be sorted are the tokens they are added to. That sum is
`moec::expert_sums` with the tokens in the part of the experts, and the gather is its adjoint `moec::expert_rows`: no atomic
additions, so the result is the same in every run.

Shape letters: T tokens, K top-k, S slots, E experts, C slots of one expert, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import moec.kernels  # noqa: F401  (defines the ops, with fast kernels)

from .experts import Experts, Slots

ops = torch.ops.moec


class TokenRouting(NamedTuple):
    """Each token has chosen K experts.

    logits   [T, E] at least float32
    chosen   [T, K] int64, before capacity
    ids      [T, K] int64, E where the slot was dropped; `chosen` itself when dropless
    weights  [T, K] at least float32
    """

    logits: Tensor
    chosen: Tensor
    ids: Tensor
    weights: Tensor


class ExpertRouting(NamedTuple):
    """Each expert has chosen C tokens: logits [T, E] and weights [E, C], at least float32; tokens [E, C] int64."""

    logits: Tensor
    tokens: Tensor
    weights: Tensor


Routing = TokenRouting | ExpertRouting


def routed_sum(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """x [T, D] -> [T, D]: every slot's token through its expert, times the slot's weight in the dtype of x, summed per token.

    Dropped slots add nothing and have no gradient; a token without slots gets zeros.
    """
    if isinstance(routing, TokenRouting):
        return _by_token(x_TD, routing, experts)
    return _by_expert(x_TD, routing, experts)


def _by_token(x_TD: Tensor, routing: TokenRouting, experts: Experts) -> Tensor:
    top_k = routing.ids.shape[1]
    order, inverse, offsets = ops.route(routing.ids, routing.logits.shape[1])
    if experts.takes_tokens(x_TD):
        slots = Slots(order, inverse, routing.weights.to(x_TD.dtype).reshape(-1), top_k)
        summed: Tensor = experts(x_TD, offsets, slots)
        return summed
    y_SD = experts(ops.dispatch(x_TD, order, inverse, offsets, top_k), offsets)
    weights_S = ops.dispatch(routing.weights.to(x_TD.dtype).reshape(-1), order, inverse, offsets, 1)
    out: Tensor = ops.combine(y_SD * weights_S.unsqueeze(-1), order, inverse, offsets, top_k)
    return out


def _by_expert(x_TD: Tensor, routing: ExpertRouting, experts: Experts) -> Tensor:
    num_experts, slots = routing.tokens.shape
    offsets = torch.arange(1, num_experts + 1, device=x_TD.device) * slots
    weights_S1 = routing.weights.to(x_TD.dtype).reshape(-1, 1)
    if x_TD.shape[0] == 0:
        return experts(x_TD, offsets) * weights_S1
    by_token, order = routing.tokens.reshape(-1).sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    ends_T = torch.searchsorted(by_token, torch.arange(x_TD.shape[0], device=order.device), right=True)
    rows_SD = ops.expert_rows([x_TD], ends_T, order.shape[0]).index_select(0, inverse)
    y_SD = experts(rows_SD, offsets) * weights_S1
    out: Tensor = ops.expert_sums(y_SD.index_select(0, order), ends_T, None, y_SD.dtype)[0]
    return out


def within_capacity(ids_TK: Tensor, scores_TK: Tensor | None, num_experts: int, capacity: int) -> Tensor:
    """ids [T, K] with `num_experts` in place of every slot that finds its expert full.

    An expert takes `capacity` slots: those with the highest of `scores` [T, K], or without scores the first ones. The order of
    slots, which also breaks ties, is that of tokens, and of k within a token.
    """
    ids_S = ids_TK.reshape(-1)
    if scores_TK is None:
        return torch.where(_rank(ids_S, num_experts).view_as(ids_TK) < capacity, ids_TK, num_experts)
    best_first = scores_TK.detach().reshape(-1).sort(descending=True, stable=True).indices
    ranks = _rank(ids_S[best_first], num_experts)
    rank_TK = torch.empty_like(ranks).scatter(0, best_first, ranks).view_as(ids_TK)
    return torch.where(rank_TK < capacity, ids_TK, num_experts)


def count(ids: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how often each expert occurs among ids (int64, any shape); `num_experts` itself, a dropped slot, is left out."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.index_add(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1))[:num_experts]


def _rank(ids_S: Tensor, num_experts: int) -> Tensor:
    """How many earlier slots have the same expert."""
    _, inverse, ends = ops.route(ids_S, num_experts)
    return inverse - F.pad(ends[:-1], (1, 0))[ids_S]
