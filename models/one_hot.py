"""A loop over all experts that reads its rows from a permuted one-hot mask: transformers v4 (Mixtral, Qwen-MoE, OLMoE).

    mask = one_hot(topk_ids, E).permute(2, 1, 0)               # [E, K, T]
    for e in range(E):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, experts[e](x[None, token].reshape(-1, D)) * topk_weights[token, slot, None])

Slots come out slot-major, (k, t), not token-major.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import expert_modules, shared_expert
from .routers import make_router


class MoE(nn.Module):
    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        top_k: int,
        *,
        router: str = "softmax",
        body: str = "swiglu",
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.router = make_router(router, d_model, num_experts, top_k)
        self.experts = expert_modules(body, d_model, d_expert, num_experts)
        self.shared_expert = shared_expert(shared, d_model, d_expert)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_ids, topk_weights = self.router(x)
        out = self.routed(x, topk_ids, topk_weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out.view(hidden_states.shape)

    def routed(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(topk_ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            expert = self.experts[e]
            slot, token = torch.where(expert_mask[e])
            current = x[None, token].reshape(-1, x.shape[-1])
            current = expert(current) * topk_weights[token, slot, None]
            out.index_add_(0, token, current.to(x.dtype))
        return out
