"""leaves: where the walk of a body ends or changes order, and the facts about order that let it.

| order | leaf | becomes |
|---|---|---|
| TokenMajor | `x.repeat_interleave(K, 0)` | TokenRows(x) |
| TokenMajor | `y[inverse]`, `empty[order] = y` | y, in sorted order |
| Sorted | `x[order // K]` | TokenRows(x) |
| Sorted | `a[order]` | a, in slot order |
| Sorted | `bias[sorted_ids]` | ExpertRows(bias) |
| Sorted | `cat([y_0, .., y_E-1])` | the rolled y, one slice each |
| LoopRows | `x[token]`, `w[token, choice]`, `probs[token, e]`, `x[mask]` | TokenRows(x), SlotValue(w), ... |
| LoopSlice | `sorted[start:end]`, a piece of `split(sorted, counts)` | sorted, whole |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.ir import Apply, ExpertRows, Expr, SlotValue, Stacked, TokenRows
from moec.passes import dense, facts
from moec.passes.orders import EveryToken, LoopRows, LoopSlice, Order, Pairs, Refused, Sorted, TokenMajor, static
from moec.passes.roll import has_hole, hole_values
from moec.passes.terms import Arg, Term, children, dtype, rank, same_shape, same_size, shape

if TYPE_CHECKING:
    from moec.passes.body import Body


def leaf(body: Body, term: Term, order: Order, lead: int) -> Expr | None:
    if isinstance(order, TokenMajor):
        return _token_major(body, term, lead)
    if isinstance(order, Sorted):
        return _sorted(body, term, order, lead)
    if isinstance(order, (Pairs, EveryToken)):
        return dense.leaf(body, term, order, lead)
    return _loop_slice(body, term, order) if isinstance(order, LoopSlice) else _loop_rows(body, term, order)


def _token_major(body: Body, term: Term, lead: int) -> Expr | None:
    op, args = term.op, term.args
    if op == "repeat_interleave" and args[2] == 0 and lead == 1 and isinstance(args[1], int):
        body.claim_top_k(args[1], term)
        return _token_rows(body, args[0], term)
    if op == "index" and lead == 1 and len(args[1]) == 1:
        index = args[1][0]
        if (count := facts.token_of_slot(index)) is not None:
            body.claim_top_k(count, term)
            return _token_rows(body, args[0], term)
        if isinstance(index, Term) and (source := _order_undone_by(body, index)) is not None:
            sorted_by(body, source, index)
            body.fact("back in slot order, by the inverse permutation", term)
            body.inner.append(term)
            return body.rows(args[0], Sorted(source), 1)
        if (clamped := own_ids(body, index)) is not None and (rank(args[0]) or 0) >= 2:
            return _expert_rows(body, args[0], clamped, term)
    if op == "index_put" and lead == 1 and len(args[1]) == 1 and args[3] is False:
        index = args[1][0]
        if isinstance(index, Term) and facts.sorted_order(index) is not None:
            if not (_same_rows(term, index) or _same_rows(term, args[2])):
                raise Refused("rows are scattered into a longer tensor", term)
            sorted_by(body, index, term)
            body.fact("back in slot order, by scattering to the sorted places", term)
            body.inner.append(term)
            return body.rows(args[2], Sorted(index), 1)
    return None


def _sorted(body: Body, term: Term, order: Sorted, lead: int) -> Expr | None:
    op, args = term.op, term.args
    if lead != 1:
        return None
    if op == "index" and len(args[1]) == 1:
        index = args[1][0]
        if index is order.order:
            body.inner.append(term)
            return body.rows(args[0], TokenMajor(), 1)
        if (count := facts.token_of_order(index, order.order)) is not None:
            body.claim_top_k(count, term)
            body.fact("rows gathered in sorted order", term)
            return _token_rows(body, args[0], term)
        if _own_sorted_ids(body, index, order.order):
            return _expert_rows(body, args[0], False, term)
        raise Refused("sorted rows are gathered by an index that is not known to be the token of the slot", term)
    if op == "cat" and args[1] == 0 and isinstance(args[0], tuple) and len(args[0]) >= 2:
        parts = args[0]
        if isinstance(parts[-1], Term) and parts[-1].op == "zeros":
            parts = parts[:-1]  # rows of the slots that no expert has
        body.claim_experts(len(parts), term)
        body.inner.append(term)
        return body.rows(body.roller.roll(parts), LoopSlice(order.order), 1)
    return None


def _loop_rows(body: Body, term: Term, order: LoopRows) -> Expr | None:
    """x[rows], w[rows, choices], probs[rows, e], x[mask] and w[mask2d] for the rows of this expert."""
    if term.op != "index":
        return None
    source, index = term.args[0], term.args[1]
    ids = order.mask.ids
    dims = rank(ids) or 0
    if _holds_rows(source, order):
        raise Refused("rows of an expert are indexed again", term)
    if dims > 1 and (weights := _masked_weights(body, source, order)) is not None and len(index) == 1:
        if _row_entry(body, index[0], order) in ([*range(dims - 1)], [0]):
            return weights
    if len(index) == 1 and dims == 1 and (token := _token_of(body, index[0], order)) is not None:
        body.claim_top_k(token, term)
        return _token_rows(body, source, term)
    found = [_row_entry(body, entry, order) for entry in index]
    if any(f is None for f in found):
        raise Refused("rows are taken by an index that is not known to be the rows of this expert", term)
    covered = [d for f in found for d in f]  # type: ignore[union-attr]
    expert_last = bool(covered) and covered[-1] == "E"
    coordinates = covered[:-1] if expert_last else covered
    tokens = list(range(dims - 1)) if dims > 1 else [0]
    if dims == 1 and coordinates == [0] and not expert_last and _slots_flat(body, ids):
        return body.rows(source, TokenMajor(), 1)
    if coordinates == tokens and expert_last:
        return _probabilities(body, source, len(tokens), term)
    if coordinates == list(range(dims)) and dims > 1 and not expert_last:
        sizes, own = shape(source), shape(ids)
        if sizes is None or own is None or not all(map(same_size, sizes, own)):
            raise Refused("weights of another shape than the ids", term)
        body.inner.append(term)
        return SlotValue(body.outer(source), static(sizes[dims:], term))
    if coordinates == tokens and not expert_last:
        return _token_rows(body, source, term, len(tokens))
    raise Refused("rows are taken along dims that are not those of the ids", term)


def _row_entry(body: Body, entry: Arg, order: LoopRows) -> list[int | str] | None:
    """Which dims of the ids an index entry walks along: a coordinate, a mask, the expert itself, or a unit dim (0)."""
    if isinstance(entry, tuple) and len(entry) == 1:
        entry = entry[0]
    if facts.same_expert(entry, order.mask.expert) and isinstance(entry, Term):
        return ["E"]
    if (coordinate := facts.coordinate_of(entry)) is not None:
        same = facts.same_rows(coordinate.mask, order.mask) and coordinate.mask.axes == order.mask.axes
        return [coordinate.dim] if same else None
    if (mask := facts.mask_of(entry)) is not None and dtype(entry) == torch.bool and facts.same_rows(mask, order.mask):
        axes = list(mask.axes)
        if mask.axes == order.mask.axes or _must_be_distinct(body, mask, order.mask, entry):
            return axes
    return None


def _token_of(body: Body, entry: Arg, order: LoopRows) -> int | None:
    """K when the entry is `slot // K` for the slots of this expert."""
    if isinstance(entry, Term) and entry.op == "floor_divide" and isinstance(entry.args[1], int):
        return entry.args[1] if _row_entry(body, entry.args[0], order) == [0] else None
    return None


def _masked_weights(body: Body, source: Arg, order: LoopRows) -> Expr | None:
    """(w * (ids == e)).sum(-1): the weight of this expert for each token, since a token's ids differ."""
    if not isinstance(source, Term) or source.op != "sum" or source.args[1] != ((rank(order.mask.ids) or 0) - 1,):
        return None
    inner, keep = source.args[0], source.args[2]
    if not isinstance(inner, Term) or not isinstance(keep, bool):
        return None
    parts: tuple[Arg, ...] = ()
    if inner.op == "mul":
        parts = inner.args
    elif inner.op == "where" and inner.args[2] in (0, 0.0):
        parts = inner.args[:2]
    for weight, mask_term in (parts, parts[::-1]) if len(parts) == 2 else ():
        mask = facts.mask_of(mask_term)
        if mask is None or not facts.same_rows(mask, order.mask) or mask.summed or has_hole(weight):
            continue
        if not same_shape(shape(weight), shape(order.mask.ids)):
            continue
        _must_be_distinct(body, mask, order.mask, source)
        body.inner += [source, inner]
        return SlotValue(body.outer(weight), (1,) if keep else ())
    return None


def _must_be_distinct(body: Body, a: facts.Mask, b: facts.Mask, term: Arg) -> bool:
    """Masks over (t, k) and over t alone pick the same number of rows in the same order when a token's ids differ."""
    for mask in (a, b):
        first = next((axis for axis in mask.axes if isinstance(axis, int)), None)
        if first != 0:
            raise Refused("rows are listed by choice first, and read by token first", term)
    if not facts.ids_distinct(a.root, a.ids):
        raise Refused("a token may hold the same expert twice: its ids are not known to be indices of one topk", term)
    return True


def _slots_flat(body: Body, ids: Term) -> bool:
    root_sizes = shape(body.ids) if body.ids is not None else None
    return root_sizes is not None and len(root_sizes) > 1


def _loop_slice(body: Body, term: Term, order: LoopSlice) -> Expr | None:
    if term.op == "slice" and term.args[1] == 0 and term.args[4] in (1, None):
        _proves_partition(body, term.args[2], term.args[3], order, term)
        return body.rows(term.args[0], Sorted(order.order), 1)
    if (
        term.op == "item_of"
        and isinstance(term.args[0], Term)
        and term.args[0].op == "split"
        and term.args[0].args[2] == 0
    ):
        sizes, which = term.args[0].args[1], hole_values(term.args[1])
        if not isinstance(sizes, tuple) or which is None or which != tuple(range(len(sizes))):
            raise Refused("the pieces of the split are not taken once each, in order", term)
        _counts_in_order(body, sizes, order, term)
        return body.rows(term.args[0].args[0], Sorted(order.order), 1)
    return None


def sorted_by(body: Body, order: Term, term: Arg) -> None:
    root = facts.sorted_order(order)
    if root is None:
        raise Refused("a permutation that is not known to sort the expert ids", term)
    body.claim_ids(root, term)


def _order_undone_by(body: Body, index: Term) -> Term | None:
    """The sorting order that `index` is the inverse of."""
    candidates = [index.args[0].args[0]] if index.op == "item_of" and isinstance(index.args[0], Term) else []
    if index.op == "index_put" and len(index.args[1]) == 1:
        candidates.append(index.args[1][0])
    if index.op == "scatter":
        candidates.append(index.args[2])
    for order in candidates:
        if isinstance(order, Term) and facts.sorted_order(order) is not None and facts.is_inverse(index, order):
            return order
    return None


def own_ids(body: Body, index: Arg) -> bool | None:
    """False when the index is the expert id of each slot, True when those ids clamped to the experts, else None."""
    if isinstance(index, Term) and index.op == "clamp" and rank(index) == 1:
        low, high = index.args[1], index.args[2]
        root = facts.ids_root(index.args[0])
        if (
            root is None
            or not isinstance(high, int)
            or low not in (0, None)
            or (low is None and facts.ids_bound(root) is None)
        ):
            return None
        if body.ids is not None and body.ids is not root:
            return None
        body.claim_ids(root, index)
        body.claim_experts(high + 1, index)
        return facts.ids_bound(root) is None or facts.ids_bound(root) > high + 1  # type: ignore[operator]
    root = facts.ids_root(index)
    if root is None or rank(index) != 1 or facts.ids_bound(root) is None:
        return None
    if body.ids is not None and body.ids is not root:
        return None
    body.claim_ids(root, index)
    return False


def _own_sorted_ids(body: Body, index: Arg, order: Term) -> bool:
    if isinstance(index, Term) and index.op == "clamp" and isinstance(index.args[2], int):
        if index.args[1] not in (0, None):
            return False
        body.claim_experts(index.args[2] + 1, index)
        index = index.args[0]
    return facts.sorted_ids(index, order)


def _counts_in_order(body: Body, sizes: tuple[Arg, ...], order: LoopSlice, term: Arg) -> None:
    """sizes[e] is the number of slots of expert e, for all e."""
    for e, size in enumerate(sizes):
        counted = facts.count_of(size) if isinstance(size, Term) and size.op == "item" else None
        if counted is None or counted[0] is not facts.sorted_order(order.order) or counted[1] != e:
            raise Refused(f"the length of slice {e} is not known to be the number of slots of expert {e}", size or term)
    experts = body.roller.roll(tuple(range(len(sizes))))
    assert isinstance(experts, Term)
    body.claim_experts(len(sizes), term)
    body.fact("slices hold the rows of each expert, by its count", term)


def _proves_partition(body: Body, start: Arg, end: Arg, order: LoopSlice, term: Arg) -> None:
    """start[0] = 0, end[e] = start[e] + count[e], start[e + 1] = end[e]."""
    count = body.num_experts or 0
    starts = hole_values(start) or (start,) * count
    ends = _instances(end) or hole_values(end) or (end,) * count
    starts = tuple(s if s is not None else 0 for s in starts)
    sizes: list[Arg] = []
    running = [_running_total(end) for end in ends]
    for e in range(count):
        expected = 0 if e == 0 else ends[e - 1]
        if not _same_number(starts[e], expected):
            raise Refused(
                f"slice {e} does not start where slice {e - 1} ends" if e else "the first slice does not start at 0",
                term,
            )
        sizes.append(_minus(ends[e], starts[e]))
    if all(r is not None and r[1] == e and r[0] is running[0][0] for e, r in enumerate(running)):  # type: ignore[index]
        histogram = facts.histogram_of(running[0][0])  # type: ignore[index]
        if histogram is None or histogram.root is not facts.sorted_order(order.order) or histogram.num_experts < count:
            raise Refused("the slices end where another histogram than that of the ids says", term)
        body.fact("slices hold the rows of each expert, by running sums of the histogram", term)
        return
    _counts_in_order(body, tuple(sizes), order, term)


def masks_the_tail(body: Body, term: Term, order: Order) -> bool:
    """masked_fill(rows, ids_sorted >= E, 0): touches only slots without an expert, which contribute nothing anyway."""
    mask, value = term.args[1], term.args[2]
    if not isinstance(order, Sorted) or value != 0 or isinstance(value, Term):
        return False
    mask = mask.args[0] if isinstance(mask, Term) and mask.op == "reshape" else mask
    if not isinstance(mask, Term) or mask.op != "ge" or not isinstance(mask.args[1], int):
        return False
    if not facts.sorted_ids(mask.args[0], order.order):
        return False
    body.claim_experts(mask.args[1], term)
    return True


def tail_is_zero(body: Body, term: Arg, order: Order, lead: int) -> bool:
    """Whether slots without an expert are known to contribute zero: their rows were masked after the last product."""
    if not isinstance(term, Term):
        return False
    if isinstance(order, Sorted) and term.op == "masked_fill" and masks_the_tail(body, term, order):
        return True
    if term.op in ("reshape", "cast"):
        return tail_is_zero(body, term.args[0], order, 1)
    if term.op == "mul":
        return any(tail_is_zero(body, a, order, lead) for a in term.args)
    if term.op == "div":
        return tail_is_zero(body, term.args[0], order, lead)
    if isinstance(order, TokenMajor) and term.op == "index" and isinstance(term.args[1][0], Term):
        source = _order_undone_by(body, term.args[1][0])
        return source is not None and tail_is_zero(body, term.args[0], Sorted(source), 1)
    if isinstance(order, TokenMajor) and term.op == "index_put" and isinstance(term.args[1][0], Term):
        return tail_is_zero(body, term.args[2], Sorted(term.args[1][0]), 1)
    return False


def _expert_rows(body: Body, stack: Arg, clamped: bool, term: Term) -> Expr:
    """`stack[id of the slot]`."""
    sizes = shape(stack)
    if sizes is None or not isinstance(sizes[0], int):
        raise Refused("per-expert values of unknown number", term)
    body.claim_experts(sizes[0], term)
    body.clamp_ids = body.clamp_ids or clamped
    body.heavy.append(term)
    body.inner.append(term)
    return ExpertRows(Stacked(body.outer(stack)))


def _probabilities(body: Body, source: Arg, dims: int, term: Term) -> Expr:
    """probs[rows, e]: the entry of the slot's expert in [T, E]."""
    assert body.ids is not None
    assert body.num_experts is not None
    sizes, own = shape(source), shape(body.ids)
    if sizes is None or own is None or dims != 1 or len(sizes) != 2 or len(own) != 2 or not same_size(sizes[0], own[0]):
        raise Refused("probabilities that are not [tokens, experts]", term)
    body.inner.append(term)
    return SlotValue(Apply(torch.gather, (body.outer(source), 1, dense.own_columns(body))), ())


def _token_rows(body: Body, source: Arg, term: Term, dims: int = 1) -> Expr:
    if not isinstance(source, Term) or dtype(source) is None:
        raise Refused("rows gathered from an unknown value", term)
    if has_hole(source):
        raise Refused("tokens are gathered from a tensor that differs between experts", term)
    if dims != 1:
        raise Refused("tokens with more than one token dim", term)
    body.x = body.x or source
    body.inner.append(term)
    body.read.append((source, 1, True))
    return TokenRows(body.outer(source))


def _holds_rows(source: Arg, order: LoopRows) -> bool:
    """Whether a term already stands in the rows of one expert."""
    seen: set[int] = set()
    stack = [source]
    while stack:
        term = stack.pop()
        if not isinstance(term, Term) or id(term) in seen or term.instances is None:
            continue
        seen.add(id(term))
        if term.op == "index" and any(facts.coordinate_of(i) or facts.mask_of(i) for i in term.args[1]):
            return True
        stack.extend(children(term))
    return False


def _instances(arg: Arg) -> tuple[Arg, ...] | None:
    return arg.instances if isinstance(arg, Term) and arg.instances is not None else None


def _same_number(a: Arg, b: Arg) -> bool:
    return a is b or (not isinstance(a, Term) and not isinstance(b, Term) and a == b)


def _minus(end: Arg, start: Arg) -> Arg:
    """The term n when end = start + n."""
    if start == 0 and not isinstance(start, Term):
        if isinstance(end, Term) and end.op == "add" and end.args[0] == 0 and not isinstance(end.args[0], Term):
            return end.args[1]
        if isinstance(end, Term) and end.op == "add" and end.args[1] == 0 and not isinstance(end.args[1], Term):
            return end.args[0]
        return end
    if isinstance(end, Term) and end.op == "add" and isinstance(start, Term):
        if end.args[0] is start:
            return end.args[1]
        if end.args[1] is start:
            return end.args[0]
    return None


def _running_total(end: Arg) -> tuple[Term, Arg] | None:
    """(counts, e) when a number is the entry e of the running sum of counts."""
    while isinstance(end, Term) and end.op in ("item", "cast"):
        end = end.args[0]
    if isinstance(end, Term) and end.op == "select" and isinstance(end.args[0], Term):
        total = end.args[0]
        while total.op in ("cast", "to_device") and isinstance(total.args[0], Term):
            total = total.args[0]
        if total.op == "cumsum" and isinstance(total.args[0], Term):
            return total.args[0], end.args[2]
    return None


def _same_rows(a: Term, b: Arg) -> bool:
    u, v = shape(a), shape(b)
    return u is not None and v is not None and same_size(u[0], v[0])
