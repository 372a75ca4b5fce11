"""The experts: E small feed-forward networks in one stack of weights, applied to rows sorted by expert.

    plain    down(act(up(x)))                        up_proj.weight [E, F, D],  down_proj.weight [E, D, F]
    gated    down(act(gate(x)) * up(x))              up_proj.weight [E, 2F, D], gate in the first F rows

Weights lie as `nn.Linear` keeps them, out before in. Each is read in the forward of the module that owns it and nowhere else, so
that whatever reparametrizes a module while it runs (LoRA on `target_parameters`) sees all uses; where nothing does, on CPU, the
whole layer from the tokens to their sums is one op, `moec::experts`. Elsewhere the activation stays outside the products, for
Inductor to fuse.

Shape letters: S rows, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec.kernels  # noqa: F401  (defines the ops, with fast kernels)
from moec import schedule

from .choices import choose
from .initialization import Init

ops = torch.ops.moec

Activation = Callable[[Tensor], Tensor]


def relu2(h: Tensor) -> Tensor:
    return F.relu(h).square()


def gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu2": relu2,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, if it is on for the device of x, gives to matrix products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@dataclass(frozen=True)
class Body:
    """What one expert is made of, whatever its sizes. `activation`: a name in ACTIVATIONS."""

    activation: str
    gated: bool
    bias: bool
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Slots(NamedTuple):
    """Where the rows of the slots lie (see `moec::route`), and what each is multiplied with, [S] in the order of slots."""

    order: Tensor
    inverse: Tensor
    weights: Tensor
    top_k: int


class GroupedLinear(nn.Module):
    """E linear maps in one stack: rows [S, D] sorted by expert, offsets [E] (where each expert's rows end) -> [S, F].

    Row by row what `nn.Linear` of the row's expert gives, under autocast in its dtype; zeros past the last offset.
    weight [E, F, D], bias [E, F] or None.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, body: Body) -> None:
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=body.device, dtype=body.dtype))

        self.weight = empty(out_features, in_features)
        self.bias = empty(out_features) if body.bias else None

    def reset_parameters(self, init: Init, fan_in: int, scale: float) -> None:
        init(self.weight, fan_in, scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, rows_SD: Tensor, offsets_E: Tensor) -> Tensor:
        biases = [] if self.bias is None else [self.bias]
        out: Tensor = ops.grouped_linear(rows_SD, [self.weight], biases, offsets_E, False, autocast_dtype(rows_SD))
        return out

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x ({in_features} -> {out_features}), bias={self.bias is not None}"


class Experts(nn.Module):
    """Maps rows [S, D], sorted by expert, and offsets [E] (where each expert's rows end) to [S, D].

    Raises ValueError for an activation that is not in ACTIVATIONS.
    """

    def __init__(self, d_model: int, d_expert: int, num_experts: int, body: Body) -> None:
        super().__init__()
        self.act, self.body = choose("activation", body.activation, ACTIVATIONS), body
        self.up_proj = GroupedLinear(num_experts, d_model, 2 * d_expert if body.gated else d_expert, body)
        self.down_proj = GroupedLinear(num_experts, d_expert, d_model, body)

    def reset_parameters(self, init: Init, scale: float, active_width: int) -> None:
        """Weights by `init`, biases zero. `active_width`: the sum of the widths of the experts that one token visits."""
        self.up_proj.reset_parameters(init, self.up_proj.weight.shape[2], scale)
        self.down_proj.reset_parameters(init, active_width, scale)

    def forward(self, rows_SD: Tensor, offsets_E: Tensor, slots: Slots | None = None) -> Tensor:
        """With `slots` x is [T, D], and the result is the sum over each token's slots, [T, D]."""
        if slots is not None:
            return self._whole(rows_SD, offsets_E, slots)
        h = self.up_proj(rows_SD, offsets_E)
        if not self.body.gated:
            return self.down_proj(self.act(h), offsets_E)
        gate, up = h.chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up, offsets_E)

    def takes_tokens(self, x: Tensor) -> bool:
        """Whether `forward` with slots can be asked for: on CPU, without autocast, as long as nobody has wrapped, parametrized,
        sharded or hooked the products, who would want them to run.
        """
        plain = all(type(m) is GroupedLinear and not any(map(m.__dict__.get, _HOOKS)) for m in self.children())
        return plain and not schedule.steps_only and x.device.type == "cpu" and autocast_dtype(x) is None

    def _whole(self, x_TD: Tensor, offsets_E: Tensor, slots: Slots) -> Tensor:
        up, down = self.up_proj, self.down_proj
        weights: tuple[list[Tensor], ...] = ([], [up.weight], [down.weight])
        biases = ([], *[[m.bias] if m.bias is not None else [] for m in (up, down)])
        routing = (slots.order, slots.inverse, offsets_E)
        kind = (slots.top_k, self.body.activation, "halves" if self.body.gated else "none", False, False)
        out: Tensor = ops.experts(x_TD, *routing, slots.weights, *weights, *biases, *kind, x_TD.dtype)
        return out

    def extra_repr(self) -> str:
        return self.body.activation + (", gated" if self.body.gated else "")


class SharedExpert(nn.Module):
    """The expert that every token visits beside the routed ones: `x [T, D] -> [T, D]`, one network of the given width."""

    def __init__(self, d_model: int, width: int, body: Body) -> None:
        super().__init__()
        self.act, self.gated = choose("activation", body.activation, ACTIVATIONS), body.gated
        up_width = 2 * width if body.gated else width
        self.up_proj = nn.Linear(d_model, up_width, body.bias, device=body.device, dtype=body.dtype)
        self.down_proj = nn.Linear(width, d_model, body.bias, device=body.device, dtype=body.dtype)

    def reset_parameters(self, init: Init, scale: float) -> None:
        for linear in (self.up_proj, self.down_proj):
            init(linear.weight, linear.in_features, scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        h = self.up_proj(x_TD)
        if not self.gated:
            return self.down_proj(self.act(h))
        gate, up = h.chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)
