"""Every expert is given every token, one expert after the other: the shortest MoE layer there is, and E/K times the work.

weights = zeros(T, E).scatter(1, topk_ids, topk_weights)
for e, expert in enumerate(experts):
    out = out + expert(x) * weights[:, e, None]            # zero for the tokens that did not choose e
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
        weights_TE = topk_weights.new_zeros(x.shape[0], self.num_experts).scatter(1, topk_ids, topk_weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * weights_TE[:, e, None]
        return out
