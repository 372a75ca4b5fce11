"""`moec::experts`: a layer of feed-forward experts as one op, so that one kernel may do all of it.

    pre = grouped_linear(dispatch(x), up, up_bias)                      [S, F], or [S, 2F] where a gate lies beside it
    h   = act(gate) * up      or act(pre)                               [S, F]
    y   = grouped_linear(h, down, down_bias)                            [S, D]
    out = combine(y * dispatch(scale))                                  [T, D]

What it means is this composition of the other ops, written once below for any implementation of them: over `reference` it is the
definition, over `torch.ops.moec` the kernel for wherever nothing better is there. A kernel that does it all at once may round
less often. For the backward only x and `pre` are kept: the gradient of the scale is <h, grad @ down>, so that y is never needed.

    activation   a name in ACTIVATIONS
    gating       "none": up [F, D] for each expert; "halves": [2F, D], the gate in the first F rows; "interleaved": [2F, D],
                 the gate in even rows; "separate": two lists, gate and up, [F, D] each

With a `key` each stack of parameters only stands for separate ones: see `bundles`.

`experts` is what is written into graphs; autograd sees `experts_forward` (which returns `pre` if `keep`) and `experts_backward`.

Shape letters: T tokens, K slots per row, S = T*K slots, E experts, D model width, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bundles, reference
from .schema import LIBRARY, implement

aten = torch.ops.aten

GATINGS = ("none", "halves", "interleaved", "separate")

_ARGUMENTS = (
    "Tensor order, Tensor inverse, Tensor offsets, Tensor? scale, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, int slots_per_row, str activation, str gating,"
    " bool up_transposed, bool down_transposed"
)
SCHEMAS = {
    "experts": f"(Tensor x, {_ARGUMENTS}, ScalarType out_dtype, Tensor? key=None) -> Tensor",
    "experts_forward": f"(Tensor x, {_ARGUMENTS}, ScalarType out_dtype, bool keep, Tensor? key=None)"
    " -> (Tensor out, Tensor pre)",
    # `wanted`: which gradients, as positions in [x, scale, *gate, *up, *down, *gate_bias, *up_bias, *down_bias]; None: all.
    "experts_backward": f"(Tensor grad, Tensor pre, Tensor x, {_ARGUMENTS}, int[]? wanted, Tensor? key=None) -> Tensor[]",
}
# Where the arguments of `experts` stand, for those who read its nodes in a graph.
POSITION = {name: i for i, name in enumerate(re.findall(r"(\w+)(?:=None)?(?=[,)])", SCHEMAS["experts"]))}


class Activation(NamedTuple):
    """A function of the pre-activation, and (gradient, pre-activation) -> the gradient of the pre-activation."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda t: F.gelu(t, approximate="tanh"), lambda g, t: aten.gelu_backward(g, t, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda g, t: aten.threshold_backward(g, t, 0)),
    "relu2": Activation(lambda t: F.relu(t).square(), lambda g, t: 2 * g * F.relu(t)),
}


class Routing(NamedTuple):
    """What `moec::route` returned, and K."""

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    slots_per_row: int


class Body(NamedTuple):
    """An expert: parameters, each a list of one stack or of E tensors (empty where there is none), and what is done with them.

    `bundled`: the parameters are E tensors each, but their gradients are wanted as one stack.
    """

    gate: Sequence[Tensor]
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    gate_bias: Sequence[Tensor]
    up_bias: Sequence[Tensor]
    down_bias: Sequence[Tensor]
    activation: str
    gating: str
    up_transposed: bool
    down_transposed: bool
    bundled: bool = False

    def parameters(self) -> list[Tensor]:
        return [t for name in PARAMETERS for t in getattr(self, name)]

    @property
    def num_pre(self) -> int:
        """Columns of `pre`: F, or 2F with a gate."""
        columns = self.up[0].shape[-1 if self.up_transposed else -2]
        return columns * 2 if self.gating == "separate" else columns

    @property
    def d_model(self) -> int:
        """Columns of the result."""
        return self.down[0].shape[-1 if self.down_transposed else -2]

    @property
    def d_expert(self) -> int:
        return self.down[0].shape[-2 if self.down_transposed else -1]

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """The columns that the activation reads, and those it is multiplied with; views."""
        if self.gating == "none":
            return pre, None
        if self.gating == "interleaved":
            return pre[:, ::2], pre[:, 1::2]
        gate, up = pre.chunk(2, dim=-1)
        return gate, up

    def hidden(self, pre: Tensor) -> Tensor:
        gate, up = self.split(pre)
        h = ACTIVATIONS[self.activation].forward(gate)
        return h if up is None else h * up

    def hidden_backward(self, grad_h: Tensor, pre: Tensor) -> Tensor:
        """The gradient of `pre` [S, num_pre]."""
        act, (gate, up) = ACTIVATIONS[self.activation], self.split(pre)
        if up is None:
            return act.backward(grad_h, gate)
        grad = torch.empty_like(pre)
        grad_gate, grad_up = self.split(grad)
        grad_gate.copy_(act.backward(grad_h * up, gate))
        torch.mul(grad_h, act.forward(gate), out=grad_up)
        return grad


PARAMETERS = Body._fields[:6]


class Layer(NamedTuple):
    """The arguments from `order` to `down_transposed`, by what they are."""

    routing: Routing
    scale: Tensor | None
    body: Body


def unpack(args: Sequence[Any], key: Tensor | None = None, unwritten: bool = False) -> Layer:
    """`args` from `order` to `down_transposed`; what stands for other parameters gives way to them."""
    order, inverse, offsets, scale, gate, up, down, gate_bias, up_bias, down_bias, slots_per_row = args[:11]
    parameters: list[Any] = [gate, up, down, gate_bias, up_bias, down_bias]
    if key is not None:
        groups = iter(bundles.resolve(key, unwritten))
        parameters = [next(groups) if stand_in else [] for stand_in in parameters]
    body = Body._make([*parameters, *args[11:15], key is not None])
    return Layer(Routing(order, inverse, offsets, slots_per_row), scale, body)


def forward(ops: Any, x: Tensor, layer: Layer, out_dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    """(out [T, D] in `out_dtype`, pre [S, num_pre], or [0, num_pre] without `keep`), computed with `ops`."""
    routing, scale, body = layer
    offsets = routing.offsets
    rows = ops.dispatch(x, *routing)
    pre = ops.grouped_linear(rows, body.up, body.up_bias, offsets, body.up_transposed)
    if body.gating == "separate":
        gate = ops.grouped_linear(rows, body.gate, body.gate_bias, offsets, body.up_transposed)
        pre = torch.cat([gate, pre], dim=-1)
    y = ops.grouped_linear(body.hidden(pre), body.down, body.down_bias, offsets, body.down_transposed)
    if scale is not None:
        y = y * ops.dispatch(scale, *routing[:3], 1).unsqueeze(-1)
    out = ops.combine(y.to(out_dtype), *routing)
    return out, pre if keep else pre.new_empty((0, pre.shape[1]))


def backward(
    ops: Any, grad: Tensor, pre: Tensor, x: Tensor, layer: Layer, wanted: Sequence[int] | None
) -> list[Tensor]:
    """The gradients asked for, in order, computed with `ops`; all in the dtype of what they are the gradient of."""
    routing, scale, body = layer
    offsets, dtype = routing.offsets, x.dtype
    groups = Wanted(wanted, body)
    grad_rows = ops.dispatch(grad.to(dtype), *routing)
    h = body.hidden(pre)
    grad_h = ops.grouped_linear(grad_rows, body.down, [], offsets, not body.down_transposed)
    found: list[Tensor] = []
    grad_y = grad_rows
    if scale is not None:
        scale_rows = ops.dispatch(scale, *routing[:3], 1).unsqueeze(-1)
        if groups.scale:
            # wide: a sum over F columns and, with a bias, over D
            products = (h.float() * grad_h.float() if dtype.itemsize < 4 else h * grad_h).sum(-1)
            if body.down_bias:
                bias_rows = ops.expert_rows(body.down_bias, offsets, h.shape[0])
                products = products + (bias_rows * grad_rows).sum(-1, dtype=products.dtype)
            slots = ops.combine(products.to(scale.dtype), *routing[:3], 1)
            found_scale = [slots.view_as(scale)]
        grad_h, grad_y = (grad_h * scale_rows).to(dtype), (grad_rows * scale_rows).to(dtype)
    grad_pre = body.hidden_backward(grad_h, pre)
    pieces = {"up": grad_pre}
    if body.gating == "separate":
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        pieces = {"gate": grad_gate.contiguous(), "up": grad_up.contiguous()}
    if groups.x:
        sums = [
            ops.grouped_linear(piece, getattr(body, name), [], offsets, not body.up_transposed)
            for name, piece in pieces.items()
        ]
        found.append(ops.combine(sums[0] if len(sums) == 1 else sums[0] + sums[1], *routing))
    if scale is not None and groups.scale:
        found += found_scale
    rows = ops.dispatch(x, *routing) if groups.any("gate", "up") else x
    outer = {
        **{name: (piece, rows, body.up_transposed) for name, piece in pieces.items()},
        "down": (grad_y, h, body.down_transposed),
    }
    for name in ("gate", "up", "down"):
        if groups.any(name):
            left, right, transposed = outer[name]
            left, right = (right, left) if transposed else (left, right)
            found += ops.grouped_outer(left, right, offsets, groups.experts(name), getattr(body, name)[0].dtype)
    for name in ("gate", "up", "down"):
        if groups.any(f"{name}_bias"):
            bias_grad = grad_y if name == "down" else pieces[name]
            dtype_of = getattr(body, f"{name}_bias")[0].dtype
            found += ops.expert_sums(bias_grad, offsets, groups.experts(f"{name}_bias"), dtype_of)
    return found


class Wanted:
    """Which of the gradients are wanted. `needs`: for each parameter, one for each of its tensors, or one for its stack."""

    def __init__(self, wanted: Sequence[int] | None, body: Body) -> None:
        self._body = body
        self.needs: dict[str, list[bool]] = {}
        at = 2
        for name in PARAMETERS:
            n = len(getattr(body, name))
            n = min(n, 1) if body.bundled else n
            self.needs[name] = [wanted is None or p in wanted for p in range(at, at + n)]
            at += n
        self.x = wanted is None or 0 in wanted
        self.scale = wanted is None or 1 in wanted

    def any(self, *names: str) -> bool:
        return any(any(self.needs[name]) for name in names)

    def experts(self, name: str) -> list[int] | None:
        """As `grouped_outer` takes it: None for one stack."""
        stacked = getattr(self._body, name)[0].dim() == (2 if name.endswith("bias") else 3)
        return None if stacked or self._body.bundled else [e for e, need in enumerate(self.needs[name]) if need]


def _check(x: Tensor, layer: Layer) -> None:
    _, scale, body = layer
    problem = None
    if body.activation not in ACTIVATIONS:
        problem = f"an activation {body.activation!r}; known are {', '.join(ACTIVATIONS)}"
    elif body.gating not in GATINGS or (body.gating == "separate") != bool(body.gate):
        problem = f"gating {body.gating!r} with {len(body.gate)} gate weights; known are {', '.join(GATINGS)}"
    elif x.dim() != 2 or not body.up or not body.down:
        problem = f"x {tuple(x.shape)}, {len(body.up)} up and {len(body.down)} down weights; x is to be [T, D]"
    elif len({t.dtype for t in (x, *(g[0] for g in body[:6] if g))}) > 1:
        problem = "x, weights and biases of several dtypes"
    elif scale is not None and scale.dim() != 1:
        problem = f"a scale of shape {tuple(scale.shape)}; it is to be [T*K], in the order of slots"
    if problem is not None:
        raise ValueError(f"moec::experts: found {problem}")


def _experts_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *given, out_dtype, keep, key = with_key(args, "experts_forward")
    return forward(reference, x, unpack(given, key), out_dtype, keep)


def _experts_backward(grad: Tensor, pre: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    *given, wanted, key = with_key(args, "experts_backward")
    return backward(reference, grad, pre, x, unpack(given, key, unwritten=True), wanted)


_LENGTHS = {"experts": 16, "experts_forward": 17, "experts_backward": 16}  # of what follows x, without a key


def with_key(args: Sequence[Any], name: str) -> list[Any]:
    """The dispatcher leaves trailing defaults out."""
    return [*args, *[None] * (_LENGTHS[name] + 1 - len(args))]


def _fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *given, out_dtype, keep, _ = with_key(args, "experts_forward")
    layer = unpack(given)
    _check(x, layer)
    rows = layer.routing.order.shape[0] if keep else 0
    return x.new_empty((x.shape[0], layer.body.d_model), dtype=out_dtype), x.new_empty((rows, layer.body.num_pre))


def _fake_backward(grad: Tensor, pre: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    *given, wanted, _ = with_key(args, "experts_backward")
    _, scale, body = unpack(given)
    likes = [x, scale, *body.parameters()]
    chosen = range(len(likes)) if wanted is None else wanted
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for i in chosen if (t := likes[i]) is not None]


def _experts(x: Tensor, *args: Any) -> Tensor:
    """Keeps what a backward will need if there can be one."""
    *given, out_dtype, key = with_key(args, "experts")
    layer = unpack(given)
    _check(x, layer)
    tensors = (x, layer.scale, *layer.body.parameters())
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    with torch._C._DisableAutocast():
        out: Tensor = torch.ops.moec.experts_forward(x, *given, out_dtype, keep, key)[0]
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *args = inputs
    *given, ctx.out_dtype, ctx.kept, key = with_key(args, "experts_forward")
    routing, scale, body = unpack(given)
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.kind = [len(g) for g in body[:6]], tuple(given[10:])
    ctx.save_for_backward(x, output[1], *routing[:3], scale, key, *body.parameters())


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, pre, order, inverse, offsets, scale, key, *parameters = ctx.saved_tensors
    needs = ctx.needs_input_grad
    groups = _grouped(parameters, ctx.sizes)
    needed = [needs[0], bool(needs[4]), *(bool(need) for group in needs[5:11] for need in group)]
    wanted = [i for i, need in enumerate(needed) if need]
    rest = (None,) * (len(needs) - 11)
    if grad is None or not wanted:
        return (None, None, None, None, None, *([None] * n for n in ctx.sizes), *rest)
    args = (order, inverse, offsets, scale, *groups, *ctx.kind)
    if not ctx.kept:
        pre = torch.ops.moec.experts_forward(x, *args, ctx.out_dtype, True, key)[1]
    everything = [i for i in range(len(needed)) if i != 1 or scale is not None]
    found = iter(torch.ops.moec.experts_backward(grad, pre, x, *args, None if wanted == everything else wanted, key))
    grads = [next(found) if need else None for need in needed]
    return (grads[0], None, None, None, grads[1], *_grouped(grads[2:], ctx.sizes), *rest)


def _grouped(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    remaining = iter(flat)
    return [[next(remaining) for _ in range(n)] for n in sizes]


def _no_second_derivative(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    raise NotImplementedError(
        "moec::experts: second derivatives are not implemented. Run this model without moec where gradients are taken with "
        "create_graph=True"
    )


def define() -> None:
    """The ops, on the reference, with their gradients."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl("experts", _experts, "CompositeImplicitAutograd")
    implement("experts_forward", "CompositeExplicitAutograd", _experts_forward)
    implement("experts_backward", "CompositeExplicitAutograd", _experts_backward)
    torch.library.register_fake("moec::experts_forward", _fake_forward, lib=LIBRARY)
    torch.library.register_fake("moec::experts_backward", _fake_backward, lib=LIBRARY)
    torch.library.register_autograd("moec::experts_forward", _backward, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd("moec::experts_backward", _no_second_derivative, lib=LIBRARY)
