"""A loop over the experts that were hit, on stacked weights: transformers v5, implementation "eager".

    hit = (mask.sum(dim=(-1, -2)) > 0).nonzero()
    for e in hit:
        e = e[0]
        slot, token = torch.where(mask[e])
        ...F.linear(x[token], up_proj[e])...
        out.index_add_(0, token, rows)

The length of the loop depends on the data.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import StackedExperts, shared_expert
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
        self.experts = StackedExperts(body, d_model, d_expert, num_experts)
        self.shared_expert = shared_expert(shared, d_model, d_expert)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_ids, topk_weights = self.router(x)
        out = self.routed(x, topk_ids, topk_weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out.view(hidden_states.shape)

    def routed(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        experts = self.experts
        out = torch.zeros_like(x)
        with torch.no_grad():
            expert_mask = F.one_hot(topk_ids, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            slot, token = torch.where(expert_mask[expert_idx])
            h = self.project(x[token], experts.up_proj, experts.up_bias, expert_idx)
            h = self.project(experts.activate(h), experts.down_proj, experts.down_bias, expert_idx)
            out.index_add_(0, token, (h * topk_weights[token, slot, None]).to(out.dtype))
        return out

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert_idx: Tensor) -> Tensor:
        weight_e = weight[expert_idx]
        out = x @ weight_e if self.experts.is_transposed else F.linear(x, weight_e)
        return out if bias is None else out + bias[expert_idx]
