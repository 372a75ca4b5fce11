"""Slots sorted by expert, one slice per expert with sizes from `.tolist()`: DeepSeek's `moe_infer`, differentiable.

    counts = zeros(T, E).scatter_(1, topk_ids, 1).sum(0)
    order = topk_ids.view(-1).argsort()
    sorted_x = x[order // K]
    for e, n in enumerate(counts.tolist()):
        if n == 0: continue
        outputs.append(experts[e](sorted_x[start : start + n])); start += n
    new_x[order] = cat(outputs)                                # back to slot order
    out = (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(1)

Skipped experts get no gradient in eager. The original goes through numpy for its counts, which no tracer follows.
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
        counts = topk_ids.new_zeros((topk_ids.shape[0], self.num_experts)).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_ids.view(-1).argsort()
        sorted_x = x[order // topk_ids.shape[1]]

        outputs, start = [], 0
        for e, num_tokens in enumerate(counts.tolist()):
            end = start + num_tokens
            if num_tokens == 0:
                continue
            outputs.append(self.experts[e](sorted_x[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if outputs else sorted_x.new_empty(0, x.shape[-1])

        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(*topk_ids.shape, x.shape[-1]) * topk_weights.unsqueeze(dim=-1)).sum(dim=1)
