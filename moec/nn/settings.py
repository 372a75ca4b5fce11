"""Who goes where: frozen settings of a router, and the table of their names.

    MoE(..., router="softmax")
    MoE(..., router=replace(ROUTERS["sigmoid"], num_groups=8, top_groups=4, scale=2.5))      # DeepSeek-V3

| name | the experts of a token | weights | as in |
|---|---|---|---|
| softmax | K largest of a softmax over all experts | those of the softmax | Switch, OLMoE |
| softmax_normalized | the same | rescaled to sum to one | Mixtral, Qwen3 |
| topk_softmax | K largest logits | a softmax over these K | gpt-oss |
| sigmoid | K largest of sigmoid + bias, within the best groups | sigmoids that sum to `scale` | DeepSeek-V3 |
| expert_choice | experts take tokens with the largest softmax over experts | those of the softmax | the paper |

Capacity, if given, is counted over all tokens of a call: an expert takes ceil(capacity_factor * T * K / E) slots. Slots over
that are dropped: `drop="order"` keeps the first in the order of tokens (and of k within a token), "score" those with the
highest score among all experts (softmax or sigmoid, without bias). What is dropped adds nothing, and the weights of a token's
other experts stay as they are.

Expert choice has a capacity by construction: of each group of M tokens every expert takes ceil(capacity_factor * M * K / E),
where capacity_factor defaults to 1. Which tokens make a group, for x [B, L, D] (dimensions before that count as B; x [T, D] is
one group): "position": the B tokens at one position, as in the paper; "sequence": the L tokens of one sequence; "all": all
tokens. The choice looks at other sequences, or at tokens that come later: good for training, not for decoding a token at a
time. Ties are broken as `torch.topk` does.

Not handled: noise on logits, a capacity for each device, routers with layers of their own.

Letters: T tokens, K top-k, E experts, B sequences, L their length, M tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .choices import choose, positive_int


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": torch.sigmoid}
DROPS = ("order", "score")
GROUPS = ("position", "sequence", "all")


@dataclass(frozen=True)
class TokenChoice:
    """Each token takes its K best experts.

    score        "softmax" over all experts, or "sigmoid"
    after        the softmax is over the K chosen logits instead
    normalize    rescale the K weights to sum to one
    scale        factor for the weights
    bias         experts are chosen by score + bias, weighted by score; `update_bias` balances them without a loss
    num_groups, top_groups   experts lie in groups; only those of the best groups (sum of its two best experts) can be chosen
    drop         what goes when an expert is full: "order" or "score", see the module
    """

    score: str = "softmax"
    after: bool = False
    normalize: bool = False
    scale: float = 1.0
    bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    drop: str = "order"


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes its best tokens. `group`: of which tokens, "position", "sequence" or "all"; see the module."""

    group: str = "position"


RouterSettings = TokenChoice | ExpertChoice

ROUTERS: dict[str, RouterSettings] = {
    "softmax": TokenChoice(),
    "softmax_normalized": TokenChoice(normalize=True),
    "topk_softmax": TokenChoice(after=True),
    "sigmoid": TokenChoice(score="sigmoid", normalize=True, bias=True),
    "expert_choice": ExpertChoice(),
}


def check_token_choice(settings: TokenChoice, num_experts: int, top_k: int) -> None:
    """Raises ValueError for settings that do not fit together, or not to so many experts."""
    choose("drop", settings.drop, dict.fromkeys(DROPS))
    choose("score", settings.score, SCORES)
    groups, kept = positive_int("num_groups", settings.num_groups), positive_int("top_groups", settings.top_groups)
    if settings.after and (settings.score != "softmax" or settings.normalize):
        raise ValueError(
            "after=True is a softmax over the chosen logits, which sums to one: leave score='softmax' and normalize=False"
        )
    if settings.after and settings.bias:
        raise ValueError("bias=True needs bounded scores to be added to: use after=False, or score='sigmoid'")
    if top_k == 1 and (settings.after or settings.normalize):
        use = "router='softmax'" if settings.score == "softmax" else f"router={replace(settings, normalize=False)}"
        raise ValueError(
            f"top_k=1 with weights that sum to one makes every weight 1, so the router would not learn; take {use}"
        )
    if num_experts % groups:
        raise ValueError(
            f"num_groups={groups} does not divide {num_experts} experts; take a divisor of {num_experts}, or 1 for no groups"
        )
    if kept > groups:
        raise ValueError(
            f"top_groups={kept} of num_groups={groups}: keep at most as many groups as there are; take top_groups <= {groups}"
        )
    if top_k > kept * (num_experts // groups):
        raise ValueError(
            f"top_k={top_k} experts out of {kept} groups of {num_experts // groups}: raise top_groups to at least "
            f"{-(-top_k // (num_experts // groups))}, or lower top_k"
        )


def check_capacity(settings: RouterSettings, num_experts: int, top_k: int, factor: float | None) -> None:
    """Raises ValueError for a capacity factor that this router cannot have."""
    if factor is None:
        return
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ValueError(
            f"capacity_factor is a positive number, such as 1.25, or None for no limit (dropless), not {factor!r}"
        )
    if isinstance(settings, ExpertChoice) and factor * top_k > num_experts:
        raise ValueError(
            f"capacity_factor={factor} would let each of {num_experts} experts take a token {factor * top_k / num_experts:.2f} "
            f"times; take at most {num_experts / top_k:g}"
        )
