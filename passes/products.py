"""products: rows times the weights of their own expert, in the spellings that the orders allow.

    linear(rows, w_e), rows @ w_e            in a rolled loop, w_e one of E parameters or an entry of a stack
    grouped_mm(rows, W, offsets)             sorted rows; the offsets are proven to be those of the ids
    bmm(rows.unsqueeze(1), W[ids])           slot order; the index is proven to be the ids of the slots

All become `GroupedLinear`. A product with a weight that all experts share stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.ir import Apply, Expr, GroupedLinear, Stacked, Theta, with_features
from moec.passes import facts, leaves
from moec.passes.orders import Order, Refused, Sorted, TokenMajor, static
from moec.passes.roll import has_hole
from moec.passes.terms import Arg, Term, dtype, rank, shape

if TYPE_CHECKING:
    from moec.passes.body import Body


def product(body: Body, term: Term, order: Order, lead: int) -> Expr:
    if term.op == "grouped_mm":
        return _grouped(body, term, order, lead)
    if term.op == "bmm" or (term.op == "matmul" and rank(term.args[1]) == 3):
        return _batched(body, term, order, lead)
    x, weight = term.args[0], term.args[1]
    bias = term.args[2] if term.op == "linear" else None
    if not has_hole(weight) and not has_hole(bias):
        if rank(weight) != 2:
            raise Refused(f"`{term.op}` mixes rows, or its weight is neither shared nor one expert's", term)
        body.inner.append(term)
        call = Apply(
            torch.nn.functional.linear if term.op == "linear" else torch.matmul,
            (body.rows(x, order, lead), body.outer(weight)),
        )
        return call if bias is None else Apply(torch.nn.functional.linear, (*call.args, body.outer(bias)))
    if rank(weight) != 2 or rank(x) != lead + 1:
        raise Refused("an expert product that is not rows times matrix", term)
    stored_transposed = term.op == "matmul"
    theta, flipped = _matrix(body, weight, term)
    body.heavy.append(term)
    return _grouped_linear(
        body,
        term,
        x,
        order,
        lead,
        theta,
        body.theta(bias, term) if bias is not None else None,
        stored_transposed ^ flipped,
    )


def _grouped_linear(
    body: Body, term: Term, x: Arg, order: Order, lead: int, weight: Theta, bias: Theta | None, transposed: bool
) -> Expr:
    body.inner.append(term)
    return GroupedLinear(body.rows(x, order, lead), weight, bias, transposed)


def _grouped(body: Body, term: Term, order: Order, lead: int) -> Expr:
    x, weight, offsets, bias, out_dtype = (*term.args, None, None)[:5]
    if not isinstance(order, Sorted) or lead != 1 or bias is not None or out_dtype not in (None, dtype(term)):
        raise Refused("a grouped product in a form that is not known here", term)
    counted = offsets
    while isinstance(counted, Term) and counted.op == "cast":
        counted = counted.args[0]
    histogram = facts.histogram_of(counted.args[0]) if isinstance(counted, Term) and counted.op == "cumsum" else None
    if histogram is None:
        raise Refused("the offsets are not known to be the running sum of a histogram of the expert ids", offsets)
    leaves.sorted_by(body, order.order, term)
    body.claim_ids(histogram.root, offsets)
    body.claim_experts(histogram.num_experts, offsets)
    body.fact("offsets are the running sum of the histogram of the ids", offsets)
    sizes = shape(weight)
    if sizes is None or len(sizes) != 3 or sizes[0] != histogram.num_experts:
        raise Refused("the grouped weights are not one matrix for each counted expert", weight)
    body.heavy.append(term)
    transposed = True
    if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (0, 2, 1):
        body.inner.append(weight)
        weight, transposed = weight.args[0], False
    return _grouped_linear(body, term, x, order, lead, Stacked(body.outer(weight)), None, transposed)


def _batched(body: Body, term: Term, order: Order, lead: int) -> Expr:
    """bmm(rows.unsqueeze(1), W[ids]) or bmm(W[ids], rows.unsqueeze(-1))."""
    if not isinstance(order, TokenMajor) or lead != 1:
        raise Refused("a batched product outside slot order", term)
    left, right = term.args[0], term.args[1]
    for x, weight, transposed in ((left, right, True), (right, left, False)):
        flip = False
        if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (0, 2, 1):
            body.inner.append(weight)
            weight, flip = weight.args[0], True
        if not (
            isinstance(weight, Term) and weight.op == "index" and len(weight.args[1]) == 1 and rank(weight.args[0]) == 3
        ):
            continue
        clamped = leaves.own_ids(body, weight.args[1][0])
        sizes, vector = shape(weight.args[0]), shape(x)
        if clamped is None or sizes is None or vector is None or vector[1 if transposed else 2] != 1:
            continue
        if not isinstance(sizes[0], int):
            continue
        body.claim_experts(sizes[0], weight)
        body.clamp_ids = body.clamp_ids or clamped
        body.fact("each slot is multiplied with the weights of its own expert", term)
        body.heavy.append(term)
        body.inner += [term, weight]
        rows = body.rows(x, order, 1)
        flat = with_features(rows, static((vector[2 if transposed else 1],), x))
        product = GroupedLinear(flat, Stacked(body.outer(weight.args[0])), None, transposed ^ flip)
        return with_features(product, static(shape(term)[1:], term))  # type: ignore[index]
    raise Refused("a batched product whose weights are not gathered by the expert id of each slot", term)


def _matrix(body: Body, weight: Arg, term: Term) -> tuple[Theta, bool]:
    """The expert weights and whether a transpose was taken off."""
    if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (1, 0):
        body.inner.append(weight)
        return body.theta(weight.args[0], term), True
    return body.theta(weight, term), False
