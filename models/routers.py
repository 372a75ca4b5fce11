"""Routers: which K of the E experts a token visits, and with what weight.

Every router maps x [T, D] to `topk_ids` [T, K] (int64) and `topk_weights` [T, K] (dtype of x). Scores are computed in
at least float32, as the models they are taken from do.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class SoftmaxTopK(nn.Module):
    """Softmax over all experts, then the K largest; rescaled to sum to one (Mixtral) or not (Qwen2-MoE, OLMoE)."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, normalize: bool = True) -> None:
        super().__init__()
        self.top_k, self.normalize = top_k, normalize
        self.weight = nn.Parameter(torch.randn(num_experts, d_model) / d_model**0.5)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = F.linear(x_TD, self.weight).softmax(dim=-1, dtype=_score_dtype(x_TD))
        topk_weights, topk_ids = torch.topk(probs_TE, self.top_k, dim=-1)
        if self.normalize:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_ids, topk_weights.to(x_TD.dtype)


class TopKSoftmax(nn.Module):
    """The K largest logits, then a softmax over those alone (gpt-oss, LitGPT)."""

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.proj = nn.Linear(d_model, num_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        topk_logits, topk_ids = torch.topk(self.proj(x_TD), self.top_k, dim=-1)
        return topk_ids, topk_logits.softmax(dim=-1, dtype=_score_dtype(x_TD)).to(x_TD.dtype)


class SigmoidGroupTopK(nn.Module):
    """DeepSeek-V3: sigmoid scores say how much; with a bias, and limited to the best groups, they say which expert."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, num_groups: int = 2, top_groups: int = 1) -> None:
        super().__init__()
        if num_experts % num_groups or top_k > top_groups * (num_experts // num_groups):
            raise ValueError(
                f"{num_experts} experts in {num_groups} groups, the best {top_groups} of them kept: "
                f"cannot choose top_k={top_k}"
            )
        self.top_k, self.num_groups, self.top_groups = top_k, num_groups, top_groups
        self.scale = 2.5
        self.weight = nn.Parameter(torch.randn(num_experts, d_model) / d_model**0.5)
        self.correction_bias: Tensor
        self.register_buffer("correction_bias", torch.randn(num_experts) * 0.1)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _score_dtype(x_TD)
        scores_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype)).sigmoid()
        choice_TE = scores_TE + self.correction_bias
        choice_TGE = choice_TE.unflatten(-1, (self.num_groups, -1))
        group_scores = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
        group_ids = group_scores.topk(self.top_groups, dim=-1, sorted=False).indices
        keep_TG = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, group_ids, True)
        choice_TE = choice_TGE.masked_fill(~keep_TG.unsqueeze(-1), float("-inf")).flatten(-2)
        topk_ids = choice_TE.topk(self.top_k, dim=-1, sorted=False).indices
        topk_weights = scores_TE.gather(-1, topk_ids)
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        return topk_ids, topk_weights.to(x_TD.dtype)


def _softmax_raw(d_model: int, num_experts: int, top_k: int) -> nn.Module:
    return SoftmaxTopK(d_model, num_experts, top_k, normalize=False)


# name -> make(d_model, num_experts, top_k)
ROUTERS = {
    "softmax": SoftmaxTopK,
    "softmax_raw": _softmax_raw,
    "topk_softmax": TopKSoftmax,
    "sigmoid_group": SigmoidGroupTopK,
}


def make_router(name: str, d_model: int, num_experts: int, top_k: int) -> nn.Module:
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; choose one of {', '.join(ROUTERS)}")
    return ROUTERS[name](d_model, num_experts, top_k)
