"""Bodies of experts, as a module per expert or with all experts stacked in one parameter.

Shape letters: T rows of one expert, E experts, D model width, F expert width.

| body | formula | as modules | stacked |
|---|---|---|---|
| swiglu | down(silu(gate(x)) * up(x)) | yes | gate and up as halves of [E, 2F, D] |
| gelu | down(gelu(up(x))), with biases | yes | [E, F, D] and biases [E, F], [E, D] |
| relu2 | down(relu(up(x))**2) | yes | [E, F, D] |
| transposed | as swiglu | | weights stored [E, D, 2F] and [E, F, D] |
| interleaved | gpt-oss: clamped, columns gate, up, gate, up, ...; biases | | weights stored [E, D, 2F] and [E, F, D] |
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_expert, bias=False)
        self.up_proj = nn.Linear(d_model, d_expert, bias=False)
        self.down_proj = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class GELU(nn.Module):
    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_expert)
        self.down_proj = nn.Linear(d_expert, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_TD)))


class SquaredReLU(nn.Module):
    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_expert, bias=False)
        self.down_proj = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_TD)).square())


BODIES = {"swiglu": SwiGLU, "gelu": GELU, "relu2": SquaredReLU}
STACKED_BODIES = ("swiglu", "gelu", "relu2", "transposed", "interleaved")


def _check_body(body: str, known: Collection[str]) -> None:
    if body not in known:
        raise ValueError(f"unknown body {body!r}; choose one of {', '.join(known)}")


def expert_modules(body: str, d_model: int, d_expert: int, num_experts: int) -> nn.ModuleList:
    _check_body(body, BODIES)
    return nn.ModuleList(BODIES[body](d_model, d_expert) for _ in range(num_experts))


def shared_expert(enabled: bool, d_model: int, d_expert: int) -> nn.Module | None:
    """The expert that every token visits, beside the routed ones."""
    return SwiGLU(d_model, d_expert) if enabled else None


class StackedExperts(nn.Module):
    """The parameters of E experts. The idiom says how to project; `activate` lies between the two projections."""

    def __init__(self, body: str, d_model: int, d_expert: int, num_experts: int) -> None:
        super().__init__()
        _check_body(body, STACKED_BODIES)
        self.body, self.num_experts = body, num_experts
        self.is_transposed = body in ("transposed", "interleaved")
        width = d_expert if body in ("gelu", "relu2") else 2 * d_expert
        self.up_proj = nn.Parameter(self._weight(num_experts, d_model, width))
        self.down_proj = nn.Parameter(self._weight(num_experts, d_expert, d_model))
        has_bias = body in ("gelu", "interleaved")
        self.up_bias = nn.Parameter(torch.randn(num_experts, width) * 0.1) if has_bias else None
        self.down_bias = nn.Parameter(torch.randn(num_experts, d_model) * 0.1) if has_bias else None

    def _weight(self, num_experts: int, d_in: int, d_out: int) -> Tensor:
        weight_EIO = torch.randn(num_experts, d_in, d_out) / d_in**0.5
        return weight_EIO if self.is_transposed else weight_EIO.transpose(1, 2).contiguous()

    def activate(self, h: Tensor) -> Tensor:
        if self.body == "gelu":
            return F.gelu(h)
        if self.body == "relu2":
            return F.relu(h).square()
        if self.body == "interleaved":
            gate, up = h[..., ::2], h[..., 1::2]
            gate = gate.clamp(max=7.0)
            up = up.clamp(min=-7.0, max=7.0)
            return (up + 1) * gate * torch.sigmoid(gate * 1.702)
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
