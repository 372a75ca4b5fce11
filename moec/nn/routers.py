"""The modules that choose: x [..., D] to logits, scores, and a `Routing`. What they can be told is in `settings`.

Logits and scores are computed in at least float32, also under autocast. Where a router keeps a bias, experts are chosen by
score + bias and weighted by score alone (arXiv 2408.15664); the load that the bias follows is counted in training, before
capacity. A forward that is recomputed (`torch.utils.checkpoint` in eager) counts twice, which the sign of the step does not see.

Letters: T tokens, K top-k, E experts, B sequences, L their length, G groups, M tokens of a group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .choices import choose
from .initialization import Init
from .routing import ExpertRouting, TokenRouting, count, within_capacity
from .settings import (
    GROUPS,
    ROUTERS,
    SCORES,
    ExpertChoice,
    RouterSettings,
    TokenChoice,
    check_capacity,
    check_token_choice,
)


class Router(nn.Module):
    """What both kinds share: one linear map without bias. `expert_bias` and `load` are None where no bias is kept.

    expert_bias   [E] float32, saved with the model; added to scores where experts are chosen, never to weights
    load          [E] int64, not saved; slots chosen in training since the bias was last updated, before capacity
    """

    chooses_tokens = False
    expert_bias: Tensor | None
    load: Tensor | None

    def __init__(
        self, d_model: int, num_experts: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.register_buffer("expert_bias", None)
        self.register_buffer("load", None, persistent=False)

    def reset_parameters(self, init: Init, scale: float) -> None:
        init(self.weight, self.weight.shape[1], scale)
        for buffer in self.buffers():
            buffer.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E] in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x.device.type):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [T, E] -> what the router thinks of every expert, summing to one per token: for losses and statistics."""
        return logits.softmax(dim=-1)


class TokenChoiceRouter(Router):
    """Maps x [..., D], T tokens, to a `TokenRouting`. Raises ValueError for settings that do not fit together."""

    def __init__(
        self,
        settings: TokenChoice,
        d_model: int,
        num_experts: int,
        top_k: int,
        capacity: Fraction | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(d_model, num_experts, device, dtype)
        check_token_choice(settings, num_experts, top_k)
        self.settings, self.top_k, self.capacity = settings, top_k, capacity
        self.score = choose("score", settings.score, SCORES)
        if settings.bias:
            self.register_buffer("expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))
            self.register_buffer("load", torch.zeros(num_experts, device=device, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> TokenRouting:
        logits_TE = self.logits(x.reshape(-1, x.shape[-1]))
        scores_TE = logits_TE if self.settings.after else self.score(logits_TE)
        weights_TK, ids_TK = self._choose(scores_TE)
        if self.settings.after:
            weights_TK = weights_TK.softmax(dim=-1)
        elif self.settings.normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.settings.scale != 1.0:
            weights_TK = weights_TK * self.settings.scale
        if self.load is not None and self.training:
            with torch.no_grad():
                self.load += count(ids_TK, self.num_experts)
        return TokenRouting(logits_TE, ids_TK, self._admit(logits_TE, ids_TK), weights_TK)

    def probabilities(self, logits: Tensor) -> Tensor:
        scores = self.score(logits)
        return scores if self.settings.score == "softmax" else scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def _choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        choice_TE = scores_TE
        if self.expert_bias is not None:
            choice_TE = choice_TE + self.expert_bias
        if self.settings.num_groups > 1:
            choice_TE = self._within_groups(choice_TE)
        if choice_TE is scores_TE:
            weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
            return weights_TK, ids_TK
        ids_TK = choice_TE.topk(self.top_k, dim=-1).indices
        return scores_TE.gather(-1, ids_TK), ids_TK

    def _within_groups(self, choice_TE: Tensor) -> Tensor:
        choice_TGE = choice_TE.unflatten(-1, (self.settings.num_groups, -1))
        best_TG = choice_TGE.topk(min(2, choice_TGE.shape[-1]), dim=-1).values.sum(dim=-1)
        groups = best_TG.topk(self.settings.top_groups, dim=-1).indices
        keep_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(-1, groups, True)
        return choice_TGE.masked_fill(~keep_TG.unsqueeze(-1), float("-inf")).flatten(-2)

    def _admit(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        if self.capacity is None:
            return ids_TK
        scores = self.score(logits_TE).gather(-1, ids_TK) if self.settings.drop == "score" else None
        return within_capacity(ids_TK, scores, self.num_experts, _slots(ids_TK.shape[0], self.capacity))


class ExpertChoiceRouter(Router):
    """Maps x [..., D], T tokens, to an `ExpertRouting`. Raises ValueError for a group that is not in GROUPS."""

    chooses_tokens = True

    def __init__(
        self,
        settings: ExpertChoice,
        d_model: int,
        num_experts: int,
        capacity: Fraction,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(d_model, num_experts, device, dtype)
        choose("group", settings.group, dict.fromkeys(GROUPS))
        self.settings, self.capacity = settings, capacity

    def forward(self, x: Tensor) -> ExpertRouting:
        logits_TE = self.logits(x.reshape(-1, x.shape[-1]))
        if self.settings.group == "all" or x.dim() < 3:
            batch, length = 1, logits_TE.shape[0]
        else:
            batch, length = logits_TE.shape[0] // max(x.shape[-2], 1), x.shape[-2]
        scores_BLE = logits_TE.softmax(dim=-1).view(batch, length, self.num_experts)
        by_position = self.settings.group == "position" and x.dim() >= 3
        # [E, groups, tokens of a group]: token i of group g is the token i * step + g * stride
        scores_EGM = scores_BLE.permute(2, 1, 0) if by_position else scores_BLE.permute(2, 0, 1)
        step, stride = (length, 1) if by_position else (1, length)
        weights, members = scores_EGM.topk(_slots(scores_EGM.shape[2], self.capacity), dim=-1)
        tokens = members * step + torch.arange(scores_EGM.shape[1], device=x.device).unsqueeze(-1) * stride
        return ExpertRouting(logits_TE, tokens.flatten(1), weights.flatten(1))


def make_router(
    router: str | RouterSettings,
    d_model: int,
    num_experts: int,
    top_k: int,
    capacity_factor: float | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TokenChoiceRouter | ExpertChoiceRouter:
    """The module of a router, by its name in ROUTERS or by its settings.

    Raises ValueError for an unknown name, and for a capacity factor or settings that no router can have.
    """
    settings = choose("router", router, ROUTERS) if isinstance(router, str) else router
    if not isinstance(settings, TokenChoice | ExpertChoice):
        raise ValueError(
            f"router is a name ({', '.join(ROUTERS)}) or settings (TokenChoice, ExpertChoice), not {router!r}"
        )
    check_capacity(settings, num_experts, top_k, capacity_factor)
    if isinstance(settings, ExpertChoice):
        factor = 1.0 if capacity_factor is None else capacity_factor
        capacity = _exact(factor) * top_k / num_experts
        return ExpertChoiceRouter(settings, d_model, num_experts, capacity, device, dtype)
    share = None if capacity_factor is None else _exact(capacity_factor) * top_k / num_experts
    return TokenChoiceRouter(settings, d_model, num_experts, top_k, share, device, dtype)


def _exact(factor: float) -> Fraction:
    return Fraction(factor).limit_denominator(10**6)


def _slots(tokens: int, capacity: Fraction) -> int:
    """ceil(tokens * capacity), where `tokens` may be symbolic."""
    return -(-tokens * capacity.numerator // capacity.denominator)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
