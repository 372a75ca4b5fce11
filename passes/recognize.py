"""recognize: is a rolled body one of those that `moec::experts` does in one go?

    mul(down(act(getitem(chunk(up(rows(x)), 2), 0)) * getitem(chunk(...), 1)), slots(weights))
    ->  Feedforward(x, scale=weights, up, down, activation="silu", gating="halves")

Pure, and a matter of speed alone: a body that is not recognized is written out in smaller ops, which can say anything. So what is
recognized here must mean *exactly* what `moec.ops.experts` says, rounding apart, and a doubt is None.
"""

from __future__ import annotations

import torch
from torch import fx

from moec.fx import is_sharded, value
from moec.ir import (
    Apply,
    ExpertRows,
    Expr,
    Feedforward,
    GroupedLinear,
    MoERegion,
    Outer,
    Separate,
    SlotValue,
    Stacked,
    Theta,
    TokenRows,
    reshape_features,
)
from moec.ops.experts import ACTIVATIONS

_NAMES = {"silu": "silu", "relu": "relu", "gelu": "gelu"}  # of torch's functions


def recognize(region: MoERegion) -> Feedforward | None:
    """The body as a feed-forward network with weights of one dtype, that of x; None where it is anything else."""
    rows, scale = _scaled(_uncast(region.body, region.out_dtype))
    down = _linear(rows)
    if down is None:
        return None
    hidden = _hidden(down.x)
    if hidden is None:
        return None
    activation, gating, gate, up = hidden
    x = _plain(up.x)
    if not isinstance(x, TokenRows) or (gate is not None and not _same(gate.x, up.x)):
        return None
    if gate is not None and gate.transposed != up.transposed:
        return None
    found = Feedforward(
        x=x.value,
        scale=scale,
        gate=gate.weight if gate else None,
        up=up.weight,
        down=down.weight,
        gate_bias=gate.bias if gate else None,
        up_bias=up.bias,
        down_bias=down.bias,
        activation=activation,
        gating=gating,
        up_transposed=up.transposed,
        down_transposed=down.transposed,
    )
    return found if _uniform(found, region) else None


def _uniform(found: Feedforward, region: MoERegion) -> bool:
    """One dtype for x and all parameters, which autocast would leave alone; x [T, D]; a scale that is a number for each slot."""
    x = _value(found.x)
    parameters = [_first(theta) for theta in found.parameters if theta is not None]
    if x is None or x.dim() != 2 or any(p is None or p.dtype != x.dtype for p in parameters):
        return False
    if any(is_sharded(node) for theta in found.parameters if theta is not None for node in _nodes(theta)):
        return False  # the exchange of tokens comes between the steps
    if dict(region.autocast).get(x.device.type, x.dtype) != x.dtype or region.out_dtype != x.dtype:
        return False
    if found.scale is None:
        return True
    scale = _value(found.scale)
    return scale is not None and scale.dtype in (x.dtype, torch.promote_types(x.dtype, torch.float32))


def _uncast(expr: Expr, dtype: torch.dtype) -> Expr:
    """Without the cast to the dtype in which slots are added up: the op does that."""
    if isinstance(expr, Apply) and expr.target is torch.Tensor.to and expr.args[1:] == (dtype,) and not expr.kwargs:
        return _plain(expr.args[0])
    return _plain(expr)


def _scaled(expr: Expr) -> tuple[Expr, Expr | None]:
    """rows * a(s): the rows and the value [T, K] behind a; (rows, None) where nothing is multiplied."""
    if isinstance(expr, Apply) and _name(expr) == "mul" and len(expr.args) == 2 and not expr.kwargs:
        for rows, by in (expr.args, expr.args[::-1]):
            scale = _slot_scalar(by)
            if scale is not None and not isinstance(rows, (int, float)):
                return _plain(rows), scale
    return expr, None


def _slot_scalar(expr: object) -> Expr | None:
    """The value behind one number for each slot, as a column [S, 1]: anything else would be multiplied another way."""
    if isinstance(expr, Apply) and expr.target is reshape_features and expr.args[1] == (1,):
        inner = expr.args[0]
        return inner.value if isinstance(inner, SlotValue) and inner.feature in ((), (1,)) else None
    return expr.value if isinstance(expr, SlotValue) and expr.feature == (1,) else None


def _linear(expr: object) -> GroupedLinear | None:
    """A product, with a bias that is added to its rows taken in."""
    expr = _plain(expr)
    if isinstance(expr, GroupedLinear):
        return expr
    if isinstance(expr, Apply) and _name(expr) == "add" and len(expr.args) == 2 and not expr.kwargs:
        for product, bias in (expr.args, expr.args[::-1]):
            product, bias = _plain(product), _plain(bias)
            if isinstance(product, GroupedLinear) and product.bias is None and isinstance(bias, ExpertRows):
                return GroupedLinear(product.x, product.weight, bias.theta, product.transposed)
    return None


_Hidden = tuple[str, str, GroupedLinear | None, GroupedLinear]  # activation, gating, gate, up


def _hidden(expr: object) -> _Hidden | None:
    """act(up(x)), act(gate(x)) * up(x), or both halves of one product."""
    expr = _plain(expr)
    if (single := _activated(expr)) is not None:
        activation, inner = single
        up = _linear(inner)
        return (activation, "none", None, up) if up is not None else None
    if not (isinstance(expr, Apply) and _name(expr) == "mul" and len(expr.args) == 2 and not expr.kwargs):
        return None
    for gated, other in (expr.args, expr.args[::-1]):
        if (found := _activated(_plain(gated))) is None:
            continue
        activation, inner = found
        gate, up = _linear(inner), _linear(other)
        if gate is not None and up is not None:
            return activation, "separate", gate, up
        first, second = _part(inner), _part(other)
        if first is None or second is None or not _same(first[0], second[0]):
            continue
        up = _linear(first[0])
        kind = {("first", "second"): "halves", ("even", "odd"): "interleaved"}.get((first[1], second[1]))
        if up is not None and kind is not None and _columns(up) % 2 == 0:
            return activation, kind, None, up
    return None


def _activated(expr: object) -> tuple[str, Expr] | None:
    if not isinstance(expr, Apply) or not expr.args:
        return None
    kwargs = {k: v for k, v in expr.kwargs if not (k == "inplace" and v is False)}
    name = _NAMES.get(_name(expr))
    rest = [a for a in expr.args[1:] if a is not False] if name != "gelu" else list(expr.args[1:])
    if name == "gelu" and not rest:
        approximate = kwargs.pop("approximate", "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    if name not in ACTIVATIONS or kwargs or rest or not isinstance(expr.args[0], Expr):
        return None
    return name, expr.args[0]


def _part(expr: object) -> tuple[Expr, str] | None:
    """Which columns of which rows: "first" or "second" half, "even" or "odd"."""
    expr = _plain(expr)
    if not (isinstance(expr, Apply) and expr.target == "getitem"):
        return None
    of, key = expr.args
    if isinstance(of, Apply) and isinstance(key, int) and _name(of) == "chunk":
        args = {**dict(zip(("x", "chunks", "dim"), of.args)), **dict(of.kwargs)}
        if args.get("chunks") == 2 and args.get("dim") in (-1, 1) and key in (0, 1, -1):
            return _plain(args["x"]), ("first", "second")[key]
    if isinstance(key, tuple) and len(key) == 2 and key[0] in (Ellipsis, slice(None)) and isinstance(key[1], slice):
        rows = _plain(of)
        up = _linear(rows)
        if up is not None:
            columns = _columns(up)
            picked = range(columns)[key[1]]
            for kind, wanted in (
                ("first", range(columns // 2)),
                ("second", range(columns // 2, columns)),
                ("even", range(0, columns, 2)),
                ("odd", range(1, columns, 2)),
            ):
                if picked == wanted:
                    return rows, kind
    return None


def _plain(expr: object) -> Expr:
    """Without reshapes of rows [S, n] to rows [S, n]."""
    while isinstance(expr, Apply) and expr.target is reshape_features and len(expr.args[1]) == 1:  # type: ignore[arg-type]
        inner = expr.args[0]
        width = _width(inner)
        if width is None or expr.args[1] != (width,):
            break
        expr = inner
    return expr  # type: ignore[return-value]


def _width(expr: object) -> int | None:
    """The columns of rows [S, n], where they are known to have one feature dimension."""
    if isinstance(expr, GroupedLinear):
        return _columns(expr)
    if isinstance(expr, TokenRows):
        v = _value(expr.value)
        return int(v.shape[1]) if v is not None and v.dim() == 2 else None
    if isinstance(expr, Apply):
        if expr.target is reshape_features and len(expr.args[1]) == 1:  # type: ignore[arg-type]
            return expr.args[1][0]  # type: ignore[index]
        if (part := _part(expr)) is not None:
            width = _width(part[0])
            return width // 2 if width is not None and width % 2 == 0 else None
        if (found := _activated(expr)) is not None:
            return _width(found[1])
        if _name(expr) in ("mul", "add"):
            widths = {_width(a) for a in expr.args} - {None}
            return widths.pop() if len(widths) == 1 else None
    return None


def _columns(product: GroupedLinear) -> int:
    weight = _first(product.weight)
    return int(weight.shape[-1 if product.transposed else -2]) if weight is not None else -1


def _nodes(theta: Theta) -> tuple[fx.Node, ...]:
    if isinstance(theta, Separate):
        return theta.values
    return (theta.value.node,) if isinstance(theta.value, Outer) else ()


def _first(theta: Theta) -> torch.Tensor | None:
    """One tensor of the parameters: the stack, or the first expert's."""
    if isinstance(theta, Stacked):
        return _value(theta.value)
    found = value(theta.values[0])
    return found if isinstance(found, torch.Tensor) else None


def _value(expr: Expr) -> torch.Tensor | None:
    """The fake value of what is read from outside, seen through transposes and casts of it."""
    if isinstance(expr, Outer):
        found = value(expr.node)
        return found if isinstance(found, torch.Tensor) else None
    return None


def _name(expr: Apply) -> str:
    target = expr.target
    return target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]


def _same(a: object, b: object) -> bool:
    """Whether two expressions are the same, node for node."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(i, j) for i, j in zip(a, b))
    if isinstance(a, Outer):
        return isinstance(b, Outer) and a.node is b.node
    if isinstance(a, (TokenRows, SlotValue, ExpertRows, GroupedLinear, Apply, Stacked, Separate)):
        return all(_same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return bool(a == b)
