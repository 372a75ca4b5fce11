"""A loop over all experts that steps over those without tokens: most hand-written loops, much remote code.

    for e in range(E):
        slot, token = torch.where(mask[e])
        if token.shape[0] == 0:
            continue
        ...

Skipped experts get no gradient in eager (`None`, not zeros), and the branch is what breaks a traced graph.
`skip_by="counts"` asks a histogram instead: `if counts[e] == 0: continue`.
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
        skip_by: str = "shape",
    ) -> None:
        super().__init__()
        if skip_by not in ("shape", "counts"):
            raise ValueError(f"skip_by is 'shape' or 'counts', not {skip_by!r}")
        self.num_experts, self.top_k, self.skip_by = num_experts, top_k, skip_by
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
        counts = expert_mask.sum(dim=(1, 2))
        for e in range(self.num_experts):
            if self.skip_by == "counts" and counts[e] == 0:
                continue
            slot, token = torch.where(expert_mask[e])
            if self.skip_by == "shape" and token.shape[0] == 0:
                continue
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out
