"""Slots sorted by expert, cut by `torch.split` with sizes from `bincount(...).tolist()`: Megatron-style code.

    sizes = torch.bincount(topk_ids.flatten(), minlength=E).tolist()
    order = topk_ids.flatten().argsort(stable=True)
    token = order // K
    rows = cat([expert(part) for expert, part in zip(experts, torch.split(x[token], sizes))])
    out = zeros_like(x).index_add(0, token, rows * topk_weights.flatten()[order, None])

An expert without tokens runs on zero rows.
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
        flat_ids = topk_ids.flatten()
        sizes = torch.bincount(flat_ids, minlength=self.num_experts).tolist()
        order = flat_ids.argsort(stable=True)
        token = order // self.top_k
        parts = torch.split(x[token], sizes)
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        rows = rows * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, rows)
