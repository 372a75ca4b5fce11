"""Every expert is given every token, all at once: einsum on stacked weights, or gpt-oss's bmm on repeated tokens.

    h = einsum("td,efd->tef", x, up_proj)
    y = einsum("tef,edf->ted", act(h), down_proj)
    out = einsum("ted,te->td", y, weights)                     # weights: zero for the experts that a token did not choose

    h = bmm(x.repeat(E, 1).view(E, T, D), up_proj)             # weights stored [E, D, F]
    out = (bmm(act(h), down_proj) * weights.t()[..., None]).sum(0)

T*E*F numbers are made, and most of them thrown away.
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
        weights_TE = topk_weights.new_zeros(x.shape[0], self.num_experts).scatter(1, topk_ids, topk_weights)
        if experts.is_transposed:
            x_ETD = x.repeat(self.num_experts, 1).view(self.num_experts, -1, x.shape[-1])
            h = torch.bmm(x_ETD, experts.up_proj)
            h = h if experts.up_bias is None else h + experts.up_bias[:, None]
            y_ETD = torch.bmm(experts.activate(h), experts.down_proj)
            y_ETD = y_ETD if experts.down_bias is None else y_ETD + experts.down_bias[:, None]
            return (y_ETD * weights_TE.t().unsqueeze(-1)).sum(0)
        h = torch.einsum("td,efd->tef", x, experts.up_proj)
        h = h if experts.up_bias is None else h + experts.up_bias
        y_TED = torch.einsum("tef,edf->ted", experts.activate(h), experts.down_proj)
        y_TED = y_TED if experts.down_bias is None else y_TED + experts.down_bias
        return torch.einsum("ted,te->td", y_TED, weights_TE)
