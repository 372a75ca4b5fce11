"""A loop over all experts that finds its rows with `torch.where(ids == e)`: the plainest, as in nanoGPT-style code.

    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, experts[e](x[token]) * topk_weights[token, slot, None])

An expert without tokens runs on zero rows, so every parameter gets a gradient.
"""

import torch
from torch import Tensor, nn

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
        for e in range(self.num_experts):
            token, slot = torch.where(topk_ids == e)
            rows = self.experts[e](x[token]) * topk_weights[token, slot, None]
            out.index_add_(0, token, rows)
        return out
