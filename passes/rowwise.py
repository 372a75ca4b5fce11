"""rowwise: which operations work row by row, and how to call them again.

A body runs on slot rows in an order of our choosing, so each operation in it has to treat the leading dim as a batch: point-wise
operations do (torch tags them), reductions and shape changes do when they keep to the feature dims. Anything else is refused by
the body, never assumed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moec.ir import Apply, ExpertRows, Expr, TokenRows, with_features
from moec.passes import dense
from moec.passes.orders import Order, Pairs, Refused, TokenMajor, static
from moec.passes.roll import has_hole
from moec.passes.terms import Arg, Term, numel, rank, same_size, shape

if TYPE_CHECKING:
    from moec.passes.body import Body

# Reductions and normalisations over the dims that their argument `dim` names
OVER_DIMS = {
    "softmax", "log_softmax", "_softmax", "sum", "mean", "amax", "amin", "var", "std", "logsumexp", "norm", "linalg_vector_norm",
    "vector_norm", "normalize", "glu", "cumsum",
}  # fmt: skip
NAMES_DIM_SECOND = {"norm", "linalg_vector_norm", "vector_norm", "normalize"}  # (x, order of the norm, dim)
DIM_SECOND = 2
OPERATORS: dict[str, Callable[..., object]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "floor_divide": operator.floordiv,
}
NOT_POINTWISE = {"bernoulli", "dropout", "rrelu", "native_dropout", "feature_dropout", "alpha_dropout"}
EXTRA_POINTWISE = {
    "cast",
    "relu6",
    "softsign",
    "tanhshrink",
    "logsigmoid",
    "selu",
    "celu",
    "quick_gelu",
    "masked_fill",
    "where",
    "hardswish",
    "mish",
}


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether the operation of that name maps corresponding elements only, by torch's own tag."""
    if name in NOT_POINTWISE:
        return False
    if name in EXTRA_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, o) for o in packet.overloads()]
    return any(torch.Tag.pointwise in o.tags for o in overloads) and not any(
        torch.Tag.nondeterministic_seeded in o.tags for o in overloads
    )


def callable_for(name: str) -> Callable[..., object] | None:
    """The torch function that computes the operation of that (functional) name."""
    if name in OPERATORS:
        return OPERATORS[name]
    for namespace in (torch, torch.nn.functional, torch.special, torch.linalg):
        found = getattr(namespace, name, None)
        if callable(found):
            return found
    packet = getattr(torch.ops.aten, name, None)
    return packet if packet is not None else None


# -- steps of the walk: each returns the expression of a row-wise term, or refuses ------------------------------------------


def is_rows(body: Body, arg: Arg, out: Term, lead: int) -> bool:
    """Whether an operand, broadcast against `out`, spans its row dims."""
    own, full = shape(arg), shape(out)
    if own is None or full is None:
        return False
    features = len(full) - lead
    if len(own) <= features:
        return False
    ours, theirs = own[: len(own) - features], full[:lead]
    return not all(isinstance(s, int) and s == 1 for s in ours) or all(isinstance(s, int) and s == 1 for s in theirs)


def _operand(body: Body, arg: Arg, out: Term, order: Order, lead: int) -> object:
    if isinstance(arg, tuple):
        return tuple(_operand(body, a, out, order, lead) for a in arg)
    if not isinstance(arg, Term):
        return arg
    own, full = shape(arg), shape(out)
    if own is None or full is None:
        raise Refused("a number that is computed inside the graph is used in an expert", arg)
    features = len(full) - lead
    if is_rows(body, arg, out, lead):
        ours = own[: len(own) - features]
        # outside slot order the number of rows may have several symbols (each boolean index brings its own); there the walk
        # reaches leaves of this very order only, and so proves the numbers equal
        if len(own) == len(full) and (not isinstance(order, TokenMajor) or all(map(same_size, ours, full[:lead]))):
            return body.rows(arg, order, lead)
        if isinstance(order, TokenMajor) and lead >= 2 and len(own) == len(full):
            if all(map(same_size, ours[:-1], full[: lead - 1])) and ours[-1] == 1 and not has_hole(arg):
                body.claim_top_k(static((full[lead - 1],), out)[0], out)
                body.read.append((arg, lead, True))
                flat = Apply(torch.reshape, (body.outer(arg), (-1, *static(own[lead:], arg))))
                return TokenRows(flat)
        if isinstance(order, Pairs) and len(own) == len(full) - 1 and lead == 2:
            # a leading dim that is not written out: that of the tokens, or that of the experts
            return dense.expert_rows(body, arg, out) if order.token_first else dense.token_rows(body, arg, 1)
        raise Refused("rows are broadcast against rows of another number", arg)
    wanted = own[-features:] if features and len(own) > features else own
    if has_hole(arg):
        theta = body.theta(arg if len(own) <= features else _raise("an expert value with unit row dims", arg), arg)
        body.heavy.append(out)
        padded = (1,) * (features - len(own)) + static(own, arg)
        rows = ExpertRows(theta)
        return rows if len(own) == features else with_features(rows, padded)
    outer = body.outer(arg)
    return outer if len(own) <= features else Apply(torch.reshape, (outer, static(wanted, arg)))


def pointwise(body: Body, term: Term, order: Order, lead: int) -> Expr:
    body.inner.append(term)
    if term.op == "cast":
        return Apply(torch.Tensor.to, (body.rows(term.args[0], order, lead), term.args[1]))
    args = term.args
    if term.op in ("add", "sub") and len(args) == 3:
        if args[2] != 1:
            raise Refused("a scaled addition (alpha) in an expert", term)
        args = args[:2]
    if rank(term) is None:
        raise Refused("a value of unknown shape in an expert", term)
    operands = tuple(_operand(body, a, term, order, lead) for a in args)
    kwargs = tuple((k, _operand(body, v, term, order, lead)) for k, v in term.kwargs)
    target = callable_for(term.op)
    if target is None:
        raise Refused(f"`{term.op}` has no functional form", term)
    if kwargs and target in OPERATORS.values():
        target = getattr(torch, term.op)
    return Apply(target, operands, kwargs)


def _features(body: Body, dims: Arg, of: Arg, lead: int, term: Term) -> tuple[int, ...]:
    """Dims as negative feature dims; refuses row dims."""
    full = rank(of)
    if full is None:
        raise Refused("a value of unknown rank in an expert", term)
    dims = dims if isinstance(dims, tuple) else (dims,)
    if not all(isinstance(d, int) for d in dims):
        raise Refused("an operation over all dims mixes rows", term)
    found = tuple(d % full - full for d in dims)
    if any(d < lead - full for d in found):
        raise Refused(f"`{term.op}` over the row dim mixes the rows of an expert", term)
    return found


def over_features(body: Body, term: Term, order: Order, lead: int) -> Expr:
    args, kwargs = list(term.args), dict(term.kwargs)
    place = DIM_SECOND if term.op in NAMES_DIM_SECOND else 1
    if "dim" in kwargs:
        kwargs["dim"] = _one(_features(body, kwargs["dim"], args[0], lead, term))
    elif len(args) > place and args[place] is not None and not isinstance(args[place], bool):
        args[place] = _one(_features(body, args[place], args[0], lead, term))
    else:
        raise Refused(f"`{term.op}` over all dims mixes rows", term)
    body.inner.append(term)
    rows = body.rows(args[0], order, lead)
    if any(isinstance(a, Term) for a in (*args[1:], *kwargs.values())):
        raise Refused(f"`{term.op}` with computed arguments", term)
    if term.op in ("sum", "mean", "amax", "cumsum") and not kwargs:
        named = dict(zip(("dim", "keepdim", "dtype"), args[1:]))
        kwargs = {k: v for k, v in named.items() if v is not None}
        args = args[:1]
    while args[-1] is None:
        args.pop()
    return Apply(callable_for(term.op), (rows, *args[1:]), tuple(kwargs.items()))  # type: ignore[arg-type]


def norm(body: Body, term: Term, order: Order, lead: int) -> Expr:
    args, kwargs = term.args, dict(term.kwargs)
    normalized = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    if not isinstance(normalized, tuple) or len(normalized) > (rank(args[0]) or 0) - lead:
        raise Refused(f"`{term.op}` over row dims mixes rows", term)
    if any(has_hole(a) for a in (*args[1:], *kwargs.values())):
        raise Refused(f"`{term.op}` with weights of one expert", term)
    body.inner.append(term)
    rest = tuple(body.outer(a) if isinstance(a, Term) else a for a in args[1:])
    named = tuple((k, body.outer(v) if isinstance(v, Term) else v) for k, v in kwargs.items())
    return Apply(callable_for(term.op), (body.rows(args[0], order, lead), *rest), named)  # type: ignore[arg-type]


def pieces(body: Body, term: Term, order: Order, lead: int) -> Expr:
    source, which = term.args[0], term.args[1]
    assert isinstance(source, Term)
    if not isinstance(which, int):
        raise Refused("which piece is taken differs between experts", term)
    dim = source.args[1] if source.op == "unbind" else source.args[2]
    (feature,) = _features(body, dim, source.args[0], lead, term)
    size = () if source.op == "unbind" else (source.args[1],)
    if any(isinstance(s, Term) or (isinstance(s, tuple) and any(isinstance(x, Term) for x in s)) for s in size):
        raise Refused("pieces of computed size", term)
    body.inner += [term, source]
    key = (id(source), order, lead)
    if key not in body._cut:
        body._cut[key] = Apply(
            getattr(torch, source.op), (body.rows(source.args[0], order, lead), *size), (("dim", feature),)
        )
    return Apply("getitem", (body._cut[key], which))


def feature_index(body: Body, term: Term, order: Order, lead: int) -> Expr:
    (feature,) = _features(body, term.args[1], term.args[0], lead, term)
    entry: object = term.args[2] if term.op == "select" else slice(*term.args[2:])
    if any(isinstance(a, Term) for a in term.args[2:]):
        raise Refused("an index into the features is computed", term)
    body.inner.append(term)
    return Apply("getitem", (body.rows(term.args[0], order, lead), (..., entry, *(slice(None),) * (-feature - 1))))


def concatenate(body: Body, term: Term, order: Order, lead: int) -> Expr:
    parts = term.args[0]
    if not isinstance(parts, tuple) or not parts:
        raise Refused("a concatenation of an unknown list", term)
    (feature,) = _features(body, term.args[1], parts[0], lead, term)
    body.inner.append(term)
    return Apply(torch.cat, (tuple(body.rows(p, order, lead) for p in parts),), (("dim", feature),))


def reshape(body: Body, term: Term, order: Order, lead: int) -> Expr:
    """A reshape that keeps rows apart: the leading dims before and after have the same product."""
    before, after = shape(term.args[0]), shape(term)
    if before is None or after is None:
        raise Refused("a reshape of unknown shapes", term)
    _same_reshape(body, term)
    features = after[lead:]
    if not all(isinstance(s, int) and s > 0 for s in features):
        raise Refused("a reshape to features of symbolic or zero size", term)
    for n in range(1, len(before) + 1):
        rest = before[n:]
        # a reshape keeps the number of elements, so equal features mean equal rows
        if all(isinstance(s, int) for s in rest) and numel(rest) == numel(features):
            inner = body.rows(term.args[0], order, n)
            body.inner.append(term)
            return inner if rest == features else with_features(inner, features)  # type: ignore[arg-type]
    raise Refused("a reshape that mixes rows and features", term)


def _same_reshape(body: Body, term: Term) -> None:
    for i in term.instances or ():
        own, first = shape(i), shape(term)
        if own is None or first is None or len(own) != len(first):
            raise Refused("a reshape that differs between experts", term)
        if any(isinstance(a, int) != isinstance(b, int) or (isinstance(a, int) and a != b) for a, b in zip(own, first)):
            raise Refused("a reshape that differs between experts", term)


def _one(dims: tuple[int, ...]) -> int | tuple[int, ...]:
    return dims[0] if len(dims) == 1 else dims


def _raise(missing: str, term: Arg) -> Arg:
    raise Refused(missing, term)
