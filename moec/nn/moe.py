"""A Mixture-of-Experts layer declared by granularity: experts have a size of their own (arXiv 2402.07871).

    layer = moec.nn.MoE(d_model=1024, d_ff=4096, expansion=8, granularity=16)      # 128 experts of width 256, 16 per token
    y = layer(x)                                                                   # [..., D] -> [..., D]

d_expert = d_ff / G, E = expansion * G experts, G of them per token: active parameters and FLOPs stay those of the dense block
of width d_ff while experts become many and small. The forward is a routed sum in `moec::` ops, so that nothing has to be
detected; it runs in eager, under any backend of torch.compile, and under moec, whose report then shows the declared G.

    y = shared(x) + norm(sum over chosen experts of weight * expert(x))

Not handled: dropout inside experts, experts of several widths, tensor parallelism; expert choice over ranks.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from moec.capture.markers import declared

from .choices import expert_width, positive_int
from .experts import Body, Experts, SharedExpert
from .initialization import initializer
from .routers import make_router
from .routing import Routing, TokenRouting, routed_sum
from .settings import RouterSettings
from .stabilizers import balance_loss, updated_bias, z_loss
from .stats import Stats, describe


class MoE(nn.Module):
    """Maps x [..., d_model] to the same shape and dtype.

    d_model          width of the model
    d_ff             width of the dense feed-forward block that is cut into experts (the paper: 4 * d_model)
    expansion        parameters of all experts over those of the dense block; E = expansion * granularity experts
    granularity      d_ff / d_expert; must divide d_ff
    top_k            experts per token, the granularity unless given. Expert choice: on average
    router           a name in `moec.nn.ROUTERS`, or `TokenChoice(...)`, `ExpertChoice(...)`; see `moec.nn.routers`
    activation       a name in `moec.nn.ACTIVATIONS`; with `gated` act(gate(x)) * up(x), a third matrix per expert
    shared_experts   how many experts every token visits as well, as one network of width shared_experts * d_expert
    capacity_factor  slots an expert takes, over its even share; None: no limit (expert choice: 1). See `moec.nn.routers`
    output_norm      LayerNorm of the routed sum, before shared experts are added. None: if granularity > 1, where the paper calls
                     it crucial
    balance_loss, z_loss   coefficients of `moec.nn.aux_loss`; 0: not computed (Switch: 0.01; ST-MoE: 0.001)
    init, init_scale a name in `moec.nn.INITS`, by default the paper's truncated normal; biases start at zero

    `layer.record = True` keeps what the router did in the last forward for `layer.stats()`; it compiles the layer once more.
    `layer.aux_loss` is the weighted sum of the losses of the last forward in training, or None.
    Raises ValueError for settings that do not fit together, and for an x of another width.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        expansion: int,
        granularity: int,
        *,
        top_k: int | None = None,
        router: str | RouterSettings = "softmax",
        activation: str = "relu",
        gated: bool = False,
        bias: bool = False,
        shared_experts: int = 0,
        capacity_factor: float | None = None,
        output_norm: bool | None = None,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        init: str = "truncated_normal",
        init_scale: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_ff = positive_int("d_model", d_model), positive_int("d_ff", d_ff)
        self.expansion = positive_int("expansion", expansion)
        self.granularity = positive_int("granularity", granularity)
        self.d_expert, self.num_experts = expert_width(d_ff, granularity), expansion * granularity
        self.top_k = granularity if top_k is None else positive_int("top_k", top_k)
        _check(self.top_k, self.num_experts, granularity, shared_experts, balance_loss, z_loss, init_scale)
        self.shared_experts, self.capacity_factor = shared_experts, capacity_factor
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.init, self.init_scale = init, init_scale
        self.router = make_router(router, d_model, self.num_experts, self.top_k, capacity_factor, device, dtype)
        self.is_expert_choice = self.router.chooses_tokens
        if balance_loss and self.is_expert_choice:
            raise ValueError("expert choice is balanced by construction: leave balance_loss at 0")
        body = Body(activation, gated, bias, device, dtype)
        self.experts = Experts(d_model, self.d_expert, self.num_experts, body)
        self.shared = SharedExpert(d_model, shared_experts * self.d_expert, body) if shared_experts else None
        has_norm = granularity > 1 if output_norm is None else output_norm
        self.output_norm = nn.LayerNorm(d_model, device=device, dtype=dtype) if has_norm else None
        self.record = False
        self.aux_loss: Tensor | None = None
        self._recorded: Routing | None = None
        caller = sys._getframe(1)
        self.where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All parameters as at the start; the router's bias and load are zero."""
        init = initializer(self.init)
        self.router.reset_parameters(init, self.init_scale)
        self.experts.reset_parameters(init, self.init_scale, self.top_k * self.d_expert)
        if self.shared is not None:
            self.shared.reset_parameters(init, self.init_scale)
        if self.output_norm is not None:
            self.output_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ValueError(
                f"MoE of d_model={self.d_model}: x is {tuple(x.shape)}, its last dimension must be {self.d_model}"
            )
        if torch.compiler.is_compiling():
            top_k = None if self.is_expert_choice else self.top_k
            declared(self.where, "MoE", self.num_experts, top_k, self.d_model, self.d_expert, float(self.granularity))
        routing = self.router(x)
        x_TD = x.reshape(-1, self.d_model)
        out_TD = routed_sum(x_TD, routing, self.experts)
        if self.output_norm is not None:
            out_TD = self.output_norm(out_TD)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        if self.balance_loss or self.z_loss:
            self.aux_loss = self._aux_loss(routing) if self.training else None
        if self.record:
            self._recorded = type(routing)(*(t.detach() for t in routing))
        return out_TD.to(x.dtype).view(x.shape)

    def stats(self) -> Stats:
        """What the router did in the last forward with `record` on. Raises RuntimeError where there was none."""
        if self._recorded is None:
            raise RuntimeError(
                "nothing was recorded: set layer.record = True before the forward, then ask for layer.stats()"
            )
        return describe(self._recorded, self.router.probabilities(self._recorded.logits), self.num_experts)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3) -> None:
        """One step of loss-free balancing (arXiv 2408.15664), after the optimizer's: experts with less than their share rise by
        `rate`, the others sink. The load is summed over all processes of torch.distributed, then forgotten.

        Raises RuntimeError where the router keeps no bias, or in 16 bits.
        """
        bias, load = self.router.expert_bias, self.router.load
        if bias is None or load is None:
            raise RuntimeError(
                "this router keeps no bias: take router='sigmoid', or dataclasses.replace(ROUTERS['softmax'], bias=True)"
            )
        bias.copy_(updated_bias(bias, load, rate))
        load.zero_()

    def _aux_loss(self, routing: Routing) -> Tensor:
        total = routing.logits.new_zeros(())
        if self.balance_loss and isinstance(routing, TokenRouting):
            total = total + self.balance_loss * balance_loss(self.router.probabilities(routing.logits), routing.chosen)
        if self.z_loss:
            total = total + self.z_loss * z_loss(routing.logits)
        return total

    def __getstate__(self) -> dict[str, object]:
        """For copy and pickle: without what the last forward left, which may hold a graph of autograd."""
        return {**self.__dict__, "aux_loss": None, "_recorded": None}

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, d_ff={self.d_ff}, expansion={self.expansion}, granularity={self.granularity}"
        return f"{sizes}, num_experts={self.num_experts}, top_k={self.top_k}, capacity_factor={self.capacity_factor}"


def _check(
    top_k: int,
    num_experts: int,
    granularity: int,
    shared_experts: int,
    balance_loss: float,
    z_loss: float,
    init_scale: float,
) -> None:
    if top_k > num_experts:
        raise ValueError(
            f"top_k={top_k} of {num_experts} experts (expansion * granularity): lower top_k to at most {num_experts}, or raise "
            f"expansion to at least {-(-top_k // granularity)}"
        )
    if isinstance(shared_experts, bool) or not isinstance(shared_experts, int) or shared_experts < 0:
        raise ValueError(f"shared_experts is a whole number, 0 for none, not {shared_experts!r}")
    for name, value in (("balance_loss", balance_loss), ("z_loss", z_loss)):
        if value < 0:
            raise ValueError(f"{name} is a coefficient of at least 0, not {value!r}; 0 switches it off")
    if not init_scale > 0:
        raise ValueError(f"init_scale is a positive number, not {init_scale!r}; the paper's is 0.1")
