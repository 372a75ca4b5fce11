"""Slots sorted by expert, one grouped GEMM per projection: transformers v5, implementation "grouped_mm".

    ids, order = torch.sort(topk_ids.reshape(-1))
    offsets = histc(ids, bins=E).cumsum(0)
    sentinel = (ids >= E).unsqueeze(-1)                        # slots that belong to another rank; sorted to the tail
    h = grouped_mm(x[order // K].masked_fill_(sentinel, 0), up_proj, offsets).masked_fill(sentinel, 0)
    ...
    out = (h * topk_weights.reshape(-1)[order, None])[inverse].view(T, K, D).sum(1)

torch's grouped GEMM leaves rows past the last offset uninitialized, which is why the masks are there. It is used for
bfloat16 (widths must be multiples of 8); other dtypes, which it refuses under compile, take one slice per expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import StackedExperts, shared_expert
from .routers import make_router


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows `offsets[e-1]:offsets[e]` of x [S, I] times weight[e] of [E, I, O]."""
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=offsets)
    outputs, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        outputs.append(x[start:end] @ weight[e])
        start = end
    outputs.append(x.new_zeros(x.shape[0] - start, weight.shape[-1]))
    return torch.cat(outputs)


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
        topk_weights = topk_weights.reshape(-1)
        sorted_ids, order = torch.sort(topk_ids.reshape(-1))
        current = x[order // self.top_k]

        histc_input = sorted_ids.float() if x.device.type == "cpu" else sorted_ids.int()
        counts = torch.histc(histc_input, bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        sentinel_mask = (sorted_ids >= self.num_experts).unsqueeze(-1)
        sorted_ids = sorted_ids.clamp(max=self.num_experts - 1)

        current.masked_fill_(sentinel_mask, 0.0)
        h = self.project(current, experts.up_proj, experts.up_bias, sorted_ids, offsets)
        h = experts.activate(h.masked_fill(sentinel_mask, 0.0))
        h = self.project(h, experts.down_proj, experts.down_bias, sorted_ids, offsets)
        h = h.masked_fill(sentinel_mask, 0.0) * topk_weights[order].unsqueeze(-1)

        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=x.device)
        return h[inverse].view(-1, self.top_k, x.shape[-1]).sum(dim=1).to(x.dtype)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, sorted_ids: Tensor, offsets: Tensor) -> Tensor:
        weight = weight if self.experts.is_transposed else weight.transpose(-2, -1)
        out = grouped_mm(x, weight, offsets)
        return out if bias is None else out + bias[sorted_ids]
