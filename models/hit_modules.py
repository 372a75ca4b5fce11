"""A loop over the experts that were hit, each a module of its own: late transformers v4 (Mixtral, Qwen3-MoE).

    hit = (mask.sum(dim=(-1, -2)) > 0).nonzero()
    for e in hit:
        slot, token = torch.where(mask[e].squeeze(0))
        out.index_add_(0, token, experts[e](x[token]) * topk_weights[token, slot, None])

`experts[e]` indexes a ModuleList with a one-element tensor, which a tracer must read.
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
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert = self.experts[expert_idx]
            slot, token = torch.where(expert_mask[expert_idx].squeeze(0))
            current = x[None, token].reshape(-1, x.shape[-1])
            current = expert(current) * topk_weights[token, slot, None]
            out.index_add_(0, token, current.to(x.dtype))
        return out
