"""Slot rows that are summed over the choices of each token.

    y.view(T, K, D).sum(dim=1)                       # transformers' grouped_mm and batched_mm, DeepSeek's moe_infer
    out.index_add_(0, order // K, y)                 # the same from sorted rows

where y holds one row for each slot, computed by a grouped product over sorted rows, by a product with weights gathered for each
slot, or by a loop over slices of the sorted rows whose results are concatenated (`passes.body` finds out which).

Not handled: combination by einsum or bmm; sums over slots that are not all K choices of a token.
"""

from __future__ import annotations

import functools

from moec.passes import facts, leaves
from moec.passes.body import Body
from moec.passes.idioms.common import Candidate, Found
from moec.passes.normalise import Values
from moec.passes.orders import LoopSlice, Order, Refused, Sorted, TokenMajor
from moec.passes.terms import Term, children, numel, same_size, shape


def candidates(values: Values) -> list[Candidate]:
    """Every sum over one inner dim, and every addition of sorted rows at their tokens."""
    found = []
    for node, term in values.of.items():
        if not isinstance(term, Term) or term.node is not node:
            continue
        if term.op == "sum" and _sums_choices(term):
            found.append(Candidate(term, node, functools.partial(prove_sum, term=term)))
        elif term.op == "index_add" and isinstance(term.args[0], Term) and term.args[0].op == "zeros":
            found.append(Candidate(term, node, functools.partial(prove_index_add, term=term)))
    return found


def _sums_choices(term: Term) -> bool:
    dims, keep = term.args[1], term.args[2]
    sizes = shape(term.args[0])
    return (
        isinstance(dims, tuple)
        and len(dims) == 1
        and dims[0] >= 1
        and not keep
        and sizes is not None
        and len(sizes) > dims[0] + 1
    )


def prove_sum(body: Body, term: Term) -> Found | None:
    """sum over dim d of [T.., K, D]: the first d dims are tokens, dim d the choices."""
    source, (dim,) = term.args[0], term.args[1]
    assert isinstance(source, Term)
    assert isinstance(dim, int)
    sizes = shape(source)
    assert sizes is not None
    if not isinstance(sizes[dim], int):
        return None
    expr = body.rows(source, TokenMajor(), dim + 1)
    if not body.heavy:
        _refuse_if_in_sight(body, source)
        return None
    body.claim_top_k(sizes[dim], term)  # type: ignore[arg-type]
    body.token_dims = dim
    _slots_are_all_choices(body, term)
    _out_of_range(body, source, TokenMajor(), dim + 1)
    return Found(_name(body), expr)


def prove_index_add(body: Body, term: Term) -> Found | None:
    """zeros.index_add(0, order // K, y) with y in sorted order."""
    _, dim, index, source, alpha = term.args
    order = index.args[0] if isinstance(index, Term) and index.op == "floor_divide" else None
    if isinstance(index, Term) and index.op == "index" and len(index.args[1]) == 1:
        order = index.args[1][0]
    if not isinstance(order, Term) or facts.sorted_order(order) is None or dim != 0 or alpha != 1:
        return None
    top_k = facts.token_of_order(index, order)
    if top_k is None:
        raise Refused("sorted rows are added at an index that is not known to be the token of the slot", index)
    leaves.sorted_by(body, order, term)
    buffer, ids = shape(term.args[0]), shape(body.ids)
    if buffer is None or ids is None or not same_size(buffer[0] * top_k, numel(ids)):
        raise Refused("the buffer does not have one row for each token", term.args[0])
    expr = body.rows(source, Sorted(order), 1)
    if not body.heavy:
        _refuse_if_in_sight(body, source)
        return None
    body.claim_top_k(top_k, term)
    _slots_are_all_choices(body, term)
    _out_of_range(body, source, Sorted(order), 1)
    return Found(_name(body), expr)


def _slots_are_all_choices(body: Body, term: Term) -> None:
    sizes = shape(body.ids)
    if sizes is None or body.top_k is None:
        raise Refused("the expert ids behind these rows are not known", term)
    last = sizes[-1] if len(sizes) > 1 else body.top_k
    if last != body.top_k:
        raise Refused(f"{body.top_k} rows are summed for each token, but ids has {last} choices", term)


def _out_of_range(body: Body, source: Term, order: Order, lead: int) -> None:
    """Ids beyond the experts either cannot occur, are clamped, or are known to contribute zero."""
    assert body.ids is not None
    assert body.num_experts is not None
    bound = facts.ids_bound(body.ids)
    if (bound is not None and bound <= body.num_experts) or body.clamp_ids:
        return
    if any(isinstance(o, LoopSlice) for _, o, _ in body._known):
        body.check_ids = (
            True  # the loop over slices covers all rows only if every id is in range; eager fails otherwise
        )
        return
    if not leaves.tail_is_zero(body, source, order, lead):
        raise Refused("ids beyond the last expert would read rows that no expert computes", source)


def _name(body: Body) -> str:
    for op, name in (
        ("grouped_mm", "grouped product"),
        ("bmm", "weights gathered per slot"),
        ("matmul", "weights gathered per slot"),
    ):
        if any(t.op == op and t.instances is None for t in body.heavy):
            return name
    return "loop over sorted slices"


def _refuse_if_in_sight(body: Body, source: Term) -> None:
    """No expert was reached. Was one in sight? Then say why the walk stopped before it."""
    stack: list[tuple[Term, int]] = [(source, 0)]
    seen: set[int] = set()
    while stack:
        term, depth = stack.pop()
        if id(term) in seen or depth > 12 or term.op in ("topk", "sort", "softmax", "embedding"):
            continue
        seen.add(id(term))
        rolled = term.op == "cat" and isinstance(term.args[0], tuple) and len(term.args[0]) > 2 and term.args[1] == 0
        if term.op == "grouped_mm" or rolled or (term.op == "bmm" and any(_gathered(a) for a in term.args)):
            if body.abandoned:
                raise body.abandoned[0]
            return
        stack.extend((c, depth + 1) for c in children(term))


def _gathered(arg: object) -> bool:
    return (
        isinstance(arg, Term)
        and arg.op == "index"
        and isinstance(arg.args[0], Term)
        and arg.args[0].op in ("placeholder", "get_attr")
    )
