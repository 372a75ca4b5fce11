"""dense: the walk where every expert was given every token, and zeros pick out the pairs that count (`support`).

| order | leaf | becomes |
|---|---|---|
| Pairs | `x.expand(E, T, D)`, `x.repeat(E, 1)`, `x[:, None]` | TokenRows(x) |
| Pairs | `bias[:, None]` | ExpertRows(bias) |
| Pairs | `bmm(rows, W)`, `rows @ W`, `einsum("td,edf->tef", x, W)` | GroupedLinear(rows, W) |
| Pairs | `w` of shape [T, E] | SlotValue(w.gather(-1, ids)) |
| Pairs | `stack([y_0, .., y_E-1])` | the rolled y, for every token |
| EveryToken | whatever is the same for all experts | TokenRows |
| EveryToken | `w[:, e]`, `(topk_weights * (ids == e)).sum(-1)` | SlotValue |

The rows that stay are those of the slots, in slot order. A factor that is the mask itself is one for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.ir import Apply, ExpertRows, Expr, GroupedLinear, SlotValue, Stacked, TokenRows
from moec.passes import facts, support
from moec.passes.orders import EveryToken, Pairs, Refused, static
from moec.passes.roll import has_hole, hole_values
from moec.passes.terms import Arg, Term, dtype, rank, same_shape, same_size, shape

if TYPE_CHECKING:
    from moec.passes.body import Body


def leaf(body: Body, term: Term, order: Pairs | EveryToken, lead: int) -> Expr | None:
    """The leaf or change of order that a term is, None to walk on."""
    if (chosen := _chosen(body, term, order, lead)) is not None:
        body.inner.append(term)
        rows = body.rows(chosen, order, lead)
        return rows if dtype(chosen) == dtype(term) else Apply(torch.Tensor.to, (rows, dtype(term)))
    return _every_token(body, term, lead) if isinstance(order, EveryToken) else _pairs(body, term, order, lead)


def _chosen(body: Body, term: Term, order: Pairs | EveryToken, lead: int) -> Arg:
    """What the term is for the slots, when a mask only says that other pairs are zero."""
    if term.op == "mul":
        for mask, other in (term.args[:2], term.args[1::-1]):
            if shape(other) == shape(term) and _is_mask(body, mask, term, order, lead):
                return other
    if term.op == "where" and len(term.args) == 3 and _is_mask(body, term.args[0], term, order, lead):
        return term.args[1] if shape(term.args[1]) == shape(term) else None
    if term.op == "masked_fill" and (mask := support.negated(term.args[1])) is not None:
        whole = shape(mask) == shape(term.args[1])
        return term.args[0] if whole and _is_mask(body, mask, term, order, lead) else None
    return None


def _is_mask(body: Body, mask: Arg, out: Term, order: Pairs | EveryToken, lead: int) -> bool:
    """Whether the tensor is one exactly for the slots of the rows of `out`: those of their own expert, in the same order."""
    found, own, full = body.supports.zero(mask), shape(mask), shape(out)
    if facts.mask_of(mask) is None or found is None or found.root is not body.ids or own is None or full is None:
        return False
    axes = ("1",) * (len(full) - len(own)) + found.axes
    rows = tuple(a for a in axes[:lead] if a != "1")
    if any(a != "1" for a in axes[lead:]):
        return False
    if isinstance(order, EveryToken):
        return rows == found.tokens and hole_values(found.expert) == tuple(range(body.num_experts or 0))
    return found.expert is None and rows == (found.pairs if order.token_first else ("E", *found.tokens))


# -- rolled loops ----------------------------------------------------------------------------------------------------------


def _every_token(body: Body, term: Term, lead: int) -> Expr | None:
    if not has_hole(term):
        return token_rows(body, term, lead)
    if term.op == "select" and isinstance(term.args[0], Term) and not has_hole(term.args[0]):
        source, dim, index = term.args
        if rank(source) == lead + 1 and dim == lead and hole_values(index) is not None:
            if hole_values(index) != tuple(range(body.num_experts or 0)):
                raise Refused("weights are read for another expert than the rows' own", term)
            return pair_values(body, source, term)
    return _masked_weights(body, term)


def _masked_weights(body: Body, term: Term) -> Expr | None:
    """(topk_weights * (ids == e)).sum(-1)"""
    found = body.supports.zero(term)
    if found is None or term.op != "sum" or not isinstance(term.args[0], Term) or body.ids is not found.root:
        return None
    inner, keep = term.args[0], term.args[2]
    if not isinstance(keep, bool) or found.axes != (*found.tokens, *(("1",) if keep else ())):
        return None
    parts = inner.args[:2] if inner.op in ("mul", "where") else ()
    for weight, mask in (parts, parts[::-1]) if parts else ():
        known = facts.mask_of(mask)
        if known is None or known.summed or known.root is not body.ids or has_hole(weight):
            continue
        if hole_values(known.expert) != tuple(range(body.num_experts or 0)):
            continue
        last = (rank(known.ids) or 0) - 1
        if not same_shape(shape(weight), shape(known.ids)) or term.args[1] != (last,) or "E" in known.axes:
            continue
        body.inner += [term, inner]
        return SlotValue(body.outer(weight), (1,) if keep else ())
    return None


# -- all pairs at once -----------------------------------------------------------------------------------------------------


def _pairs(body: Body, term: Term, order: Pairs, lead: int) -> Expr | None:
    op, args, sizes = term.op, term.args, shape(term)
    if sizes is None:
        return None
    if op == "repeat" and lead == 1 and not order.token_first and args[1] == (body.num_experts, 1):
        body.inner.append(term)
        return token_rows(body, args[0], 1)
    if op == "repeat_interleave" and lead == 1 and order.token_first and args[1:3] == (body.num_experts, 0):
        body.inner.append(term)
        return token_rows(body, args[0], 1)
    if lead < 2:
        return None
    at = lead - 1 if order.token_first else 0  # the dim of the experts
    if _row_of_each_expert(body, term, lead, at):
        return ExpertRows(Stacked(Apply(torch.reshape, (body.outer(term), (sizes[at], *static(sizes[lead:], term))))))
    if has_unit(sizes, at):
        return unit_rows(body, term, lead, at)
    if op == "expand" and shape(args[0]) is not None and len(shape(args[0]) or ()) == len(sizes):
        inner = shape(args[0]) or ()
        if has_unit(inner, at) and all(map(same_size, inner[lead:], sizes[lead:])):
            body.inner.append(term)
            return unit_rows(body, args[0], lead, at)
    if op == "permute" and lead == 2 and args[1] == (1, 0, *range(2, len(sizes))):
        body.inner.append(term)
        return body.rows(args[0], Pairs(not order.token_first), 2)
    if op == "stack" and args[1] == at and isinstance(args[0], tuple) and len(args[0]) == body.num_experts:
        body.inner.append(term)
        return body.rows(body.roller.roll(args[0]), EveryToken(), lead - 1)
    if op in ("bmm", "matmul", "baddbmm", "einsum"):
        return _product(body, term, order, lead, at)
    if order.token_first and len(sizes) == lead:
        return pair_values(body, term, term)
    return None


def _row_of_each_expert(body: Body, term: Term, lead: int, at: int) -> bool:
    """[1, E, F] or [E, 1, F]; with one token that may be any value of pairs, so it must be a parameter."""
    sizes = shape(term) or ()
    if sizes[at] != body.num_experts or not all(
        isinstance(s, int) and s == 1 for s in (*sizes[:at], *sizes[at + 1 : lead])
    ):
        return False
    below: Arg = term
    while isinstance(below, Term) and below.op in ("reshape", "cast", "permute"):
        below = below.args[0]
    return isinstance(below, Term) and below.op in ("placeholder", "get_attr")


def has_unit(sizes: tuple[int | torch.SymInt, ...], at: int) -> bool:
    return isinstance(sizes[at], int) and sizes[at] == 1


def unit_rows(body: Body, term: Term, lead: int, at: int) -> Expr:
    """x[:, None] or x[None]: the same row for every expert."""
    below = term.args[0] if term.op == "reshape" else None
    sizes = shape(term) or ()
    kept = (*sizes[:at], *sizes[at + 1 :])
    if isinstance(below, Term) and same_shape(shape(below), kept):
        body.inner.append(term)
        return token_rows(body, below, lead - 1)
    return token_rows(body, term, lead)


def token_rows(body: Body, term: Arg, lead: int) -> Expr:
    """A value with one row for each token, in `lead` dims."""
    if not isinstance(term, Term) or dtype(term) is None or has_hole(term):
        raise Refused("a value of every token that is not the same for all experts", term)
    sizes = shape(term) or ()
    body.x = body.x or term
    body.read.append((term, lead, True))
    rows = body.outer(term)
    return TokenRows(rows if lead == 1 else Apply(torch.reshape, (rows, (-1, *static(sizes[lead:], term)))))


def expert_rows(body: Body, term: Arg, out: Term) -> Expr:
    """A value [E, ...] with one row for each expert."""
    sizes = shape(term)
    if sizes is None or sizes[0] != body.num_experts or has_hole(term):
        raise Refused("a value of every expert that is not one row for each", term)
    body.heavy.append(out)
    return ExpertRows(Stacked(body.outer(term)))


def pair_values(body: Body, source: Term, term: Term) -> Expr:
    """The entries of [tokens.., E] that belong to the slots."""
    sizes = shape(source)
    if body.ids is None or body.top_k is None or body.num_experts is None:
        raise Refused("the expert ids of these rows are not known", term)
    if sizes is None or len(sizes) < 2 or sizes[-1] != body.num_experts:
        raise Refused("weights of pairs that are not [tokens, experts]", term)
    known = body.supports.of(source)
    if known is not None and known.root is body.ids and known.axes != known.pairs:
        raise Refused("weights of pairs that are not [tokens, experts]", term)
    ids = own_columns(body)
    if rank(body.ids) != 2:
        ids = Apply(torch.reshape, (ids, (-1, body.top_k)))
    values = body.outer(source)
    if len(sizes) != 2:
        values = Apply(torch.reshape, (values, (-1, body.num_experts)))
    if source is not term:
        body.inner.append(term)
    body.read.append((source, len(sizes) - 1, True))
    body.weighed.append(source)
    return SlotValue(Apply(torch.gather, (values, 1, ids)), ())


def own_columns(body: Body) -> Expr:
    """The ids as the columns to gather from [tokens, experts]; what is out of range has no row that counts."""
    assert body.num_experts is not None
    ids: Expr = Apply(torch.clamp, (body.outer(body.ids), 0, body.num_experts - 1))
    return ids if dtype(body.ids) == torch.int64 else Apply(torch.Tensor.to, (ids, torch.int64))


def _product(body: Body, term: Term, order: Pairs, lead: int, at: int) -> Expr | None:
    """Rows times the weights of their expert, for all experts."""
    bias = None
    if term.op == "einsum":
        x, weight, transposed = _einsum(body, term, lead, at)
    else:
        *addend, x, weight = term.args[:3] if term.op == "baddbmm" else (None, *term.args[:2])
        bias, transposed = addend[0], True
        if term.op == "baddbmm" and term.args[3:] != (1, 1):
            raise Refused("a scaled product in an expert", term)
        if order.token_first or lead != 2 or rank(weight) != 3:
            raise Refused(f"`{term.op}` mixes rows, or its weight is not one matrix for each expert", term)
        if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (0, 2, 1):
            body.inner.append(weight)
            weight, transposed = weight.args[0], False
    sizes = shape(weight)
    if sizes is None or sizes[0] != body.num_experts or not isinstance(weight, Term) or has_hole(weight):
        raise Refused("the weights are not one matrix for each expert", weight)
    body.heavy.append(term)
    body.inner.append(term)
    theta = None
    if bias is not None:
        own = shape(bias) or ()
        if len(own) != 3 or own[0] != body.num_experts or own[1] != 1:
            raise Refused("a bias that is not one row for each expert", term)
        theta = Stacked(Apply(torch.squeeze, (body.outer(bias), 1)))
    rows = token_rows(body, x, lead - 1) if rank(x) == lead else body.rows(x, order, lead)
    return GroupedLinear(rows, Stacked(body.outer(weight)), theta, transposed)


def _einsum(body: Body, term: Term, lead: int, at: int) -> tuple[Term, Term, bool]:
    """(rows, weights, whether they are stored [E, D, F]) of td,edf->tef and its like."""
    equation = support.parse(term)
    if equation is None or len(term.args[1]) != 2:
        raise Refused("an einsum that is not rows times weights", term)
    inputs, out = equation
    expert, feature = out[at], out[lead:]
    tokens = [c for i, c in enumerate(out[:lead]) if i != at]
    for (x, xs), (weight, ws) in (zip(term.args[1], inputs), [*zip(term.args[1], inputs)][::-1]):
        summed = [c for c in xs if c not in out]
        if len(feature) != 1 or len(summed) != 1 or set(ws) != {expert, summed[0], feature}:
            continue
        if xs not in ("".join(tokens) + summed[0], out[:lead] + summed[0]):
            continue
        if ws in (expert + summed[0] + feature, expert + feature + summed[0]):
            return x, weight, ws == expert + summed[0] + feature
    raise Refused("an einsum that is not rows times weights, in an order known here", term)
