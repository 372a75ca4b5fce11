"""Every slot fetches the weights of its expert, then one batched GEMM: transformers v5, implementation "batched_mm".

    ids = topk_ids.reshape(-1).clamp(0, E - 1)                 # sentinels: their weight is zero already
    h = bmm(up_proj[ids], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    ...
    out = (h * topk_weights.reshape(-1, 1)).view(T, K, D).sum(1)

Moves S * F * D weights: for a handful of tokens only.
"""

import torch
from torch import Tensor, nn

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
        ids = topk_ids.reshape(-1).clamp(0, self.num_experts - 1)
        h = x.repeat_interleave(self.top_k, dim=0)
        h = self.project(h, experts.up_proj, experts.up_bias, ids)
        h = self.project(experts.activate(h), experts.down_proj, experts.down_bias, ids)
        h = h * topk_weights.reshape(-1).unsqueeze(-1)
        return h.view(-1, self.top_k, x.shape[-1]).sum(dim=1).to(x.dtype)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        if self.experts.is_transposed:
            out = torch.bmm(x.unsqueeze(1), weight[ids]).squeeze(1)
        else:
            out = torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)
        return out if bias is None else out + bias[ids]
