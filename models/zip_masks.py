"""All masks at once by comparison with `arange(E)`, then a loop over `zip(masks, experts)`: LitGPT's LLaMAMoE.

    masks = (topk_ids.unsqueeze(-1) == torch.arange(E)).permute(2, 0, 1)      # [E, T, K]
    for mask, expert in zip(masks, experts):
        token, slot = torch.where(mask)
        out[token] += topk_weights[token, slot, None] * expert(x[token])

`out[token] += ...` adds once per distinct token; correct because top-k never names an expert twice for a token.
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
        masks = topk_ids.unsqueeze(-1) == torch.arange(self.num_experts, device=x.device)
        masks = masks.permute(2, 0, 1)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out[token] += topk_weights[token, slot, None] * expert(x[token])
        return out
