"""body: from the value of a slot down to the leaves of the region, proving on the way that every step works row by row.

The walk starts at what is summed and knows, at each term, in which *order* its rows stand:

    TokenMajor        slot (t, k) at row t*K + k, in any shape with T*K leading rows
    Sorted(order)     row p is slot order[p], experts ascending
    ExpertRows(...)   the rows of one expert, inside a rolled loop: those of a mask, or one slice of the sorted rows

Row-wise operations are walked through; steps that only change the order (index by the permutation or its inverse, concatenation
of all slices) change the order; matrix products with the weights of the row's own expert become `GroupedLinear`; gathers by token
become `TokenRows`; anything per slot that holds no expert becomes `SlotValue`. All else raises `Refused` with the missing fact.

Because every operation acts on rows alone, the body found is the same function whatever the order, and lowering may run it sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moec.ir import Apply, ExpertRows, Expr, Fact, GroupedLinear, Outer, Separate, SlotValue, Stacked, Theta, TokenRows
from moec.passes import facts, rowwise
from moec.passes.normalise import Values
from moec.passes.roll import Roller, hole_values
from moec.passes.terms import Arg, Term, children, dtype, is_tensor, location, numel, rank, same_size, shape


class Refused(Exception):
    """A fact is missing. `term` is where."""

    def __init__(self, missing: str, term: Arg) -> None:
        super().__init__(missing)
        self.missing = missing
        self.term = term


@dataclass(frozen=True)
class TokenMajor:
    """Slot (t, k) stands at row t*K + k."""


@dataclass(frozen=True)
class Sorted:
    """Row p holds slot `order[p]`; the order sorts the slots by expert."""

    order: Term


@dataclass(frozen=True)
class LoopRows:
    """The rows of the expert of this iteration: the true entries of a mask, in row-major order."""

    mask: facts.Mask


@dataclass(frozen=True)
class LoopSlice:
    """The rows of the expert of this iteration: `sorted[start:end]`."""

    order: Term


Order = TokenMajor | Sorted | LoopRows | LoopSlice


class Body:
    """One walk. Collects what it proves: the ids, E, K, facts, and the terms that belong to the body."""

    def __init__(self, values: Values, roller: Roller, at: fx.Node) -> None:
        self.values = values
        self.roller = roller
        self.at = at
        self.ids: Term | None = None
        self.num_experts: int | None = None
        self.top_k: int | None = None
        self.token_dims = 1  # how many leading dims of the root are tokens
        self.clamp_ids = False
        self.check_ids = False  # the original raises on ids that are out of range
        self.facts: list[Fact] = []
        self.inner: list[Term] = []  # terms that are computed anew by the body
        self.heavy: list[Term] = []  # those that hold expert weights: they must die with the region
        self.x: Term | None = None
        self.abandoned: list[Refused] = []
        self._known: dict[tuple[int, object, int], Expr] = {}

    # -- claims: what several places say about the same region must agree ----------------------------------------------

    def claim_ids(self, root: Term, term: Arg) -> None:
        """The expert ids of this region are `root`."""
        if self.ids is None:
            self.ids = root
            self.fact("expert ids", root)
        elif self.ids is not root:
            raise Refused(f"rows are chosen by two different id tensors ({self.ids.node} and {root.node})", term)

    def claim_experts(self, count: int, term: Arg) -> None:
        """There are `count` experts."""
        if self.num_experts is None:
            self.num_experts = count
        elif self.num_experts != count:
            raise Refused(f"two different numbers of experts ({self.num_experts} and {count})", term)

    def claim_top_k(self, count: int, term: Arg) -> None:
        """Each token has `count` slots."""
        if self.top_k is None:
            self.top_k = count
        elif self.top_k != count:
            raise Refused(f"two different numbers of choices per token ({self.top_k} and {count})", term)

    def fact(self, text: str, term: Arg) -> None:
        """Notes something proven, for the report."""
        node = term.node if isinstance(term, Term) else None
        self.facts.append(Fact(text, str(node), location(node)))

    # -- the walk ------------------------------------------------------------------------------------------------------

    def rows(self, term: Arg, order: Order, lead: int) -> Expr:
        """The row value that `term` is, its first `lead` dims being the rows in that order."""
        if not isinstance(term, Term):
            raise Refused(f"{term!r} is not a tensor of rows", term)
        key = (id(term), order, lead)
        if key not in self._known:
            self._known[key] = self._token_major(term, lead) if isinstance(order, TokenMajor) else self._walk(term, order, lead)
        return self._known[key]

    def _token_major(self, term: Term, lead: int) -> Expr:
        """In slot order any value can be read as it is; walk on only where experts are found below."""
        inner, noted = len(self.inner), len(self.facts)
        try:
            expr = self._walk(term, TokenMajor(), lead)
            if any(isinstance(e, (TokenRows, GroupedLinear, ExpertRows)) for e in expressions(expr)):
                return expr
        except Refused as refused:
            if self._computed_from_experts(term):
                raise
            self.abandoned.append(refused)
        del self.inner[inner:], self.facts[noted:]
        sizes = shape(term)
        if sizes is None or not all(isinstance(s, int) for s in sizes[lead:]):
            raise Refused("a value of slots with an unknown feature shape", term)
        return SlotValue(self.outer(term), sizes[lead:])  # type: ignore[arg-type]

    def _computed_from_experts(self, term: Term) -> bool:
        """Whether an expert product that this walk has met lies below the term."""
        heavy = {id(t) for t in self.heavy}
        position = self.values.position
        first = min((position[t.node] for t in self.heavy if t.node is not None), default=None)
        stack, seen = [term], set()
        while stack and first is not None:
            t = stack.pop()
            if id(t) in heavy:
                return True
            if id(t) in seen or (t.node is not None and position[t.node] < first):
                continue
            seen.add(id(t))
            stack.extend(children(t))
        return False

    def _walk(self, term: Term, order: Order, lead: int) -> Expr:
        op = term.op
        if op == "hole":
            raise Refused(_why_unlike(term), term)
        if (found := self._leaf(term, order, lead)) is not None:
            return found
        if op in ("linear", "matmul", "bmm", "grouped_mm"):
            return self._product(term, order, lead)
        if op == "reshape":
            return self._reshape(term, order, lead)
        if op == "masked_fill" and self._masks_the_tail(term, order):
            return self.rows(term.args[0], order, lead)
        if op == "item_of" and isinstance(term.args[0], Term) and term.args[0].op in ("chunk", "split", "unbind"):
            return self._pieces(term, order, lead)
        if op in ("select", "slice") and isinstance(term.args[1], int):
            return self._feature_index(term, order, lead)
        if op == "cat":
            return self._concatenate(term, order, lead)
        if op in rowwise.OVER_DIMS:
            return self._over_features(term, order, lead)
        if op in ("layer_norm", "rms_norm"):
            return self._norm(term, order, lead)
        if rowwise.is_pointwise(op):
            return self._pointwise(term, order, lead)
        if op.endswith("dropout") or op in ("bernoulli", "rrelu"):
            raise Refused(f"`{op}` draws random numbers inside an expert", term)
        raise Refused(f"`{op}` is not known to work row by row", term)

    # -- leaves and changes of order -----------------------------------------------------------------------------------

    def _leaf(self, term: Term, order: Order, lead: int) -> Expr | None:
        if isinstance(order, TokenMajor):
            return self._leaf_token_major(term, lead)
        if isinstance(order, Sorted):
            return self._leaf_sorted(term, order, lead)
        return self._leaf_loop_slice(term, order) if isinstance(order, LoopSlice) else self._leaf_loop_rows(term, order)

    def _leaf_token_major(self, term: Term, lead: int) -> Expr | None:
        op, args = term.op, term.args
        if op == "repeat_interleave" and args[2] == 0 and lead == 1 and isinstance(args[1], int):
            self.claim_top_k(args[1], term)
            return self._token_rows(args[0], term)
        if op == "index" and lead == 1 and len(args[1]) == 1:
            index = args[1][0]
            if (count := facts.token_of_slot(index)) is not None:
                self.claim_top_k(count, term)
                return self._token_rows(args[0], term)
            if isinstance(index, Term) and (source := self._order_undone_by(index)) is not None:
                self.sorted_by(source, index)
                self.fact("back in slot order, by the inverse permutation", term)
                self.inner.append(term)
                return self.rows(args[0], Sorted(source), 1)
            if (clamped := self._own_ids(index)) is not None and (rank(args[0]) or 0) >= 2:
                return self._expert_rows(args[0], clamped, term)
        if op == "index_put" and lead == 1 and len(args[1]) == 1 and args[3] is False:
            index = args[1][0]
            if isinstance(index, Term) and facts.sorted_order(index) is not None:
                if not (_same_rows(term, index) or _same_rows(term, args[2])):
                    raise Refused("rows are scattered into a longer tensor", term)
                self.sorted_by(index, term)
                self.fact("back in slot order, by scattering to the sorted places", term)
                self.inner.append(term)
                return self.rows(args[2], Sorted(index), 1)
        return None

    def _leaf_sorted(self, term: Term, order: Sorted, lead: int) -> Expr | None:
        op, args = term.op, term.args
        if lead != 1:
            return None
        if op == "index" and len(args[1]) == 1:
            index = args[1][0]
            if index is order.order:
                return self.rows(args[0], TokenMajor(), 1)
            if (count := facts.token_of_order(index, order.order)) is not None:
                self.claim_top_k(count, term)
                self.fact("rows gathered in sorted order", term)
                return self._token_rows(args[0], term)
            if self._own_sorted_ids(index, order.order):
                return self._expert_rows(args[0], False, term)
            raise Refused("sorted rows are gathered by an index that is not known to be the token of the slot", term)
        if op == "cat" and args[1] == 0 and isinstance(args[0], tuple) and len(args[0]) >= 2:
            parts = args[0]
            if isinstance(parts[-1], Term) and parts[-1].op == "zeros":
                parts = parts[:-1]  # rows of the slots that no expert has
            self.claim_experts(len(parts), term)
            self.inner.append(term)
            return self.rows(self.roller.roll(parts), LoopSlice(order.order), 1)
        return None

    def _leaf_loop_rows(self, term: Term, order: LoopRows) -> Expr | None:
        """x[rows], w[rows, choices], probs[rows, e], x[mask] and w[mask2d] for the rows of this expert."""
        if term.op != "index":
            return None
        source, index = term.args[0], term.args[1]
        mask, ids = order.mask, order.mask.ids
        dims = rank(ids) or 0
        if _holds_rows(source, order):
            raise Refused("rows of an expert are indexed again", term)
        if dims > 1 and (weights := self._masked_weights(source, order)) is not None and len(index) == 1:
            if self._row_entry(index[0], order) in ([*range(dims - 1)], [0]):  # type: ignore[index]
                return weights
        if len(index) == 1 and dims == 1 and (token := self._token_of(index[0], order)) is not None:  # type: ignore[arg-type, index]
            self.claim_top_k(token, term)
            return self._token_rows(source, term)
        found = [self._row_entry(entry, order) for entry in index]  # type: ignore[union-attr]
        if any(f is None for f in found):
            raise Refused("rows are taken by an index that is not known to be the rows of this expert", term)
        covered = [d for f in found for d in f]  # type: ignore[union-attr]
        expert_last = bool(covered) and covered[-1] == "E"
        coordinates = covered[:-1] if expert_last else covered
        tokens = list(range(dims - 1)) if dims > 1 else [0]
        if dims == 1 and coordinates == [0] and not expert_last and self._slots_flat(ids):
            return self.rows(source, TokenMajor(), 1)
        if coordinates == tokens and expert_last:
            return self._probabilities(source, len(tokens), term)
        if coordinates == list(range(dims)) and dims > 1 and not expert_last:
            sizes, own = shape(source), shape(ids)
            if sizes is None or own is None or not all(map(same_size, sizes, own)):
                raise Refused("weights of another shape than the ids", term)
            return SlotValue(self.outer(source), _static(sizes[dims:], term))
        if coordinates == tokens and not expert_last:
            return self._token_rows(source, term, len(tokens))
        raise Refused("rows are taken along dims that are not those of the ids", term)

    def _row_entry(self, entry: Arg, order: LoopRows) -> list[int | str] | None:
        """Which dims of the ids an index entry walks along: a coordinate, a mask, the expert itself, or a unit dim (0)."""
        if isinstance(entry, tuple) and len(entry) == 1:
            entry = entry[0]
        if facts.same_expert(entry, order.mask.expert) and isinstance(entry, Term):
            return ["E"]
        if (coordinate := facts.coordinate_of(entry)) is not None:
            same = facts.same_rows(coordinate.mask, order.mask) and coordinate.mask.axes == order.mask.axes
            return [coordinate.dim] if same else None
        if (mask := facts.mask_of(entry)) is not None and dtype(entry) == torch.bool and facts.same_rows(mask, order.mask):
            axes = [a for a in mask.axes]
            if mask.axes == order.mask.axes or self._same_count(mask, order.mask, entry):
                return axes
        return None

    def _token_of(self, entry: Arg, order: LoopRows) -> int | None:
        """K when the entry is `slot // K` for the slots of this expert."""
        if isinstance(entry, Term) and entry.op == "floor_divide" and isinstance(entry.args[1], int):
            return entry.args[1] if self._row_entry(entry.args[0], order) == [0] else None
        return None

    def _masked_weights(self, source: Arg, order: LoopRows) -> Expr | None:
        """(w * (ids == e)).sum(-1): the weight of this expert for each token, since a token's ids differ."""
        if not isinstance(source, Term) or source.op != "sum" or source.args[1] != ((rank(order.mask.ids) or 0) - 1,):
            return None
        inner, keep = source.args[0], source.args[2]
        if not isinstance(inner, Term):
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
            sizes, own = shape(weight), shape(order.mask.ids)
            if sizes is None or own is None or len(sizes) != len(own) or not all(map(same_size, sizes, own)):
                continue
            self._same_count(mask, order.mask, source)
            return SlotValue(self.outer(weight), (1,) if keep else ())
        return None

    def _same_count(self, a: facts.Mask, b: facts.Mask, term: Arg) -> bool:
        """Masks over (t, k) and over t alone pick the same number of rows in the same order when a token's ids differ."""
        if not facts.ids_distinct(a.root):
            raise Refused("a token may hold the same expert twice: its ids are not known to be indices of one topk", term)
        return True

    def _slots_flat(self, ids: Term) -> bool:
        root_sizes = shape(self.ids) if self.ids is not None else None
        return root_sizes is not None and len(root_sizes) > 1

    def _leaf_loop_slice(self, term: Term, order: LoopSlice) -> Expr | None:
        if term.op == "slice" and term.args[1] == 0 and term.args[4] in (1, None):
            self._proves_partition(term.args[2], term.args[3], order, term)
            return self.rows(term.args[0], Sorted(order.order), 1)
        if term.op == "item_of" and isinstance(term.args[0], Term) and term.args[0].op == "split" and term.args[0].args[2] == 0:
            sizes, which = term.args[0].args[1], hole_values(term.args[1])
            if not isinstance(sizes, tuple) or which is None or which != tuple(range(len(sizes))):
                raise Refused("the pieces of the split are not taken once each, in order", term)
            self._counts_in_order(sizes, order, term)
            return self.rows(term.args[0].args[0], Sorted(order.order), 1)
        return None

    # -- facts about order ---------------------------------------------------------------------------------------------

    def sorted_by(self, order: Term, term: Arg) -> None:
        root = facts.sorted_order(order)
        if root is None:
            raise Refused("a permutation that is not known to sort the expert ids", term)
        self.claim_ids(root, term)

    def _order_undone_by(self, index: Term) -> Term | None:
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

    def _own_ids(self, index: Arg) -> bool | None:
        """False when the index is the expert id of each slot, True when those ids clamped to the experts, else None."""
        if isinstance(index, Term) and index.op == "clamp" and rank(index) == 1:
            low, high = index.args[1], index.args[2]
            root = facts.ids_root(index.args[0])
            if root is None or not isinstance(high, int) or low not in (0, None) or (low is None and facts.ids_bound(root) is None):
                return None
            if self.ids is not None and self.ids is not root:
                return None
            self.claim_ids(root, index)
            self.claim_experts(high + 1, index)
            return facts.ids_bound(root) is None or facts.ids_bound(root) > high + 1  # type: ignore[operator]
        root = facts.ids_root(index)
        if root is None or rank(index) != 1 or facts.ids_bound(root) is None:
            return None
        if self.ids is not None and self.ids is not root:
            return None
        self.claim_ids(root, index)
        return False

    def _own_sorted_ids(self, index: Arg, order: Term) -> bool:
        if isinstance(index, Term) and index.op == "clamp" and isinstance(index.args[2], int):
            if index.args[1] not in (0, None):
                return False
            self.claim_experts(index.args[2] + 1, index)
            index = index.args[0]
        return facts.sorted_ids(index, order)

    def _counts_in_order(self, sizes: tuple[Arg, ...], order: LoopSlice, term: Arg) -> None:
        """sizes[e] is the number of slots of expert e, for all e."""
        for e, size in enumerate(sizes):
            counted = facts.row_count_of(size) if isinstance(size, Term) and size.op == "item" else None
            if counted is None or counted[0] is not facts.sorted_order(order.order) or counted[1] != e:
                raise Refused(f"the length of slice {e} is not known to be the number of slots of expert {e}", size or term)
        experts = self.roller.roll(tuple(range(len(sizes))))
        assert isinstance(experts, Term)
        self.claim_experts(len(sizes), term)
        self.fact("slices hold the rows of each expert, by its count", term)

    def _proves_partition(self, start: Arg, end: Arg, order: LoopSlice, term: Arg) -> None:
        """start[0] = 0, end[e] = start[e] + count[e], start[e + 1] = end[e]."""
        count = self.num_experts or 0
        starts = hole_values(start) or (start,) * count
        ends = _instances(end) or hole_values(end) or (end,) * count
        starts = tuple(s if s is not None else 0 for s in starts)
        sizes: list[Arg] = []
        running = [_running_total(end) for end in ends]
        for e in range(count):
            expected = 0 if e == 0 else ends[e - 1]
            if not _same_number(starts[e], expected):
                raise Refused(f"slice {e} does not start where slice {e - 1} ends" if e else "the first slice does not start at 0", term)
            sizes.append(_minus(ends[e], starts[e]))
        if all(r is not None and r[1] == e and r[0] is running[0][0] for e, r in enumerate(running)):  # type: ignore[index]
            histogram = facts.histogram_of(running[0][0])  # type: ignore[index]
            if histogram is None or histogram.root is not facts.sorted_order(order.order) or histogram.num_experts < count:
                raise Refused("the slices end where another histogram than that of the ids says", term)
            self.fact("slices hold the rows of each expert, by running sums of the histogram", term)
            return
        self._counts_in_order(tuple(sizes), order, term)

    def _masks_the_tail(self, term: Term, order: Order) -> bool:
        """masked_fill(rows, ids_sorted >= E, 0): touches only slots without an expert, which contribute nothing anyway."""
        mask, value = term.args[1], term.args[2]
        if not isinstance(order, Sorted) or value != 0 or isinstance(value, Term):
            return False
        mask = mask.args[0] if isinstance(mask, Term) and mask.op == "reshape" else mask
        if not isinstance(mask, Term) or mask.op != "ge" or not isinstance(mask.args[1], int):
            return False
        if not facts.sorted_ids(mask.args[0], order.order):
            return False
        self.claim_experts(mask.args[1], term)
        return True

    def tail_is_zero(self, term: Arg, order: Order, lead: int) -> bool:
        """Whether slots without an expert are known to contribute zero: their rows were masked after the last product."""
        if not isinstance(term, Term):
            return False
        if isinstance(order, Sorted) and term.op == "masked_fill" and self._masks_the_tail(term, order):
            return True
        if term.op in ("reshape", "cast"):
            return self.tail_is_zero(term.args[0], order, 1)
        if term.op == "mul":
            return any(self.tail_is_zero(a, order, lead) for a in term.args)
        if term.op == "div":
            return self.tail_is_zero(term.args[0], order, lead)
        if isinstance(order, TokenMajor) and term.op == "index" and isinstance(term.args[1][0], Term):
            source = self._order_undone_by(term.args[1][0])
            return source is not None and self.tail_is_zero(term.args[0], Sorted(source), 1)
        if isinstance(order, TokenMajor) and term.op == "index_put" and isinstance(term.args[1][0], Term):
            return self.tail_is_zero(term.args[2], Sorted(term.args[1][0]), 1)
        return False

    # -- products with expert weights ----------------------------------------------------------------------------------

    def _product(self, term: Term, order: Order, lead: int) -> Expr:
        if term.op == "grouped_mm":
            return self._grouped(term, order, lead)
        if term.op == "bmm" or (term.op == "matmul" and rank(term.args[1]) == 3):
            return self._batched(term, order, lead)
        x, weight = term.args[0], term.args[1]
        bias = term.args[2] if term.op == "linear" else None
        if not has_hole(weight) and not has_hole(bias):
            if rank(weight) != 2 or self._is_rows(weight, term, lead):
                raise Refused(f"`{term.op}` mixes rows, or its weight is neither shared nor one expert's", term)
            self.inner.append(term)
            call = Apply(torch.nn.functional.linear if term.op == "linear" else torch.matmul, (self.rows(x, order, lead), self.outer(weight)))
            return call if bias is None else Apply(torch.nn.functional.linear, (*call.args, self.outer(bias)))
        if rank(weight) != 2 or rank(x) != lead + 1:
            raise Refused("an expert product that is not rows times matrix", term)
        stored_transposed = term.op == "matmul"
        theta, flipped = self._matrix(weight, term)
        self.heavy.append(term)
        return self._grouped_linear(term, x, order, lead, theta, self.theta(bias, term) if bias is not None else None, stored_transposed ^ flipped)

    def _grouped_linear(self, term: Term, x: Arg, order: Order, lead: int, weight: Theta, bias: Theta | None, transposed: bool) -> Expr:
        self.inner.append(term)
        return GroupedLinear(self.rows(x, order, lead), weight, bias, transposed)

    def _grouped(self, term: Term, order: Order, lead: int) -> Expr:
        x, weight, offsets, bias, out_dtype = (*term.args, None, None)[:5]
        if not isinstance(order, Sorted) or lead != 1 or bias is not None or out_dtype not in (None, dtype(term)):
            raise Refused("a grouped product in a form that is not known here", term)
        counted = offsets
        while isinstance(counted, Term) and counted.op == "cast":
            counted = counted.args[0]
        histogram = facts.histogram_of(counted.args[0]) if isinstance(counted, Term) and counted.op == "cumsum" else None
        if histogram is None:
            raise Refused("the offsets are not known to be the running sum of a histogram of the expert ids", offsets)
        self.sorted_by(order.order, term)
        self.claim_ids(histogram.root, offsets)
        self.claim_experts(histogram.num_experts, offsets)
        self.fact("offsets are the running sum of the histogram of the ids", offsets)
        sizes = shape(weight)
        if sizes is None or len(sizes) != 3 or sizes[0] != histogram.num_experts:
            raise Refused("the grouped weights are not one matrix for each counted expert", weight)
        self.heavy.append(term)
        transposed = True
        if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (0, 2, 1):
            weight, transposed = weight.args[0], False
        return self._grouped_linear(term, x, order, lead, Stacked(self.outer(weight)), None, transposed)

    def _batched(self, term: Term, order: Order, lead: int) -> Expr:
        """bmm(rows.unsqueeze(1), W[ids]) or bmm(W[ids], rows.unsqueeze(-1))."""
        if not isinstance(order, TokenMajor) or lead != 1:
            raise Refused("a batched product outside slot order", term)
        left, right = term.args[0], term.args[1]
        for x, weight, transposed in ((left, right, True), (right, left, False)):
            flip = False
            if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (0, 2, 1):
                weight, flip = weight.args[0], True
            if not (isinstance(weight, Term) and weight.op == "index" and len(weight.args[1]) == 1 and rank(weight.args[0]) == 3):
                continue
            clamped = self._own_ids(weight.args[1][0])
            sizes, vector = shape(weight.args[0]), shape(x)
            if clamped is None or sizes is None or vector is None or vector[1 if transposed else 2] != 1:
                continue
            if not isinstance(sizes[0], int):
                continue
            self.claim_experts(sizes[0], weight)
            self.clamp_ids = self.clamp_ids or clamped
            self.fact("each slot is multiplied with the weights of its own expert", term)
            self.heavy.append(term)
            self.inner += [term, weight]
            rows = self.rows(x, order, 1)
            flat = with_features(rows, _static((vector[2 if transposed else 1],), x))
            product = GroupedLinear(flat, Stacked(self.outer(weight.args[0])), None, transposed ^ flip)
            return with_features(product, _static(shape(term)[1:], term))  # type: ignore[index]
        raise Refused("a batched product whose weights are not gathered by the expert id of each slot", term)

    def _matrix(self, weight: Arg, term: Term) -> tuple[Theta, bool]:
        """The expert weights and whether a transpose was taken off."""
        if isinstance(weight, Term) and weight.op == "permute" and weight.args[1] == (1, 0):
            return self.theta(weight.args[0], term), True
        return self.theta(weight, term), False

    # -- parameters ----------------------------------------------------------------------------------------------------

    def theta(self, term: Arg, where: Arg) -> Theta:
        """The E values behind a rolled, row-free term: one stack, or one node for each expert."""
        if not isinstance(term, Term) or not has_hole(term):
            raise Refused("a weight that is not one per expert", where)
        if _spans_tokens(term):
            raise Refused("an expert uses a value computed over all of its rows at once", term)
        stacked = self._stacked(term)
        if stacked is not None:
            return Stacked(stacked)
        instances = term.instances
        if instances is None or len(instances) != self.num_experts:
            raise Refused("a weight that is not one tensor per expert", where)
        vals = [i.val for i in instances]
        first = vals[0]
        if not all(map(is_tensor, vals)):
            raise Refused("a weight of unknown shape", where)
        for e, v in enumerate(vals):
            if v.shape != first.shape or v.dtype != first.dtype or v.device != first.device:  # type: ignore[union-attr]
                raise Refused(f"expert {e} has weights of another shape, dtype or device ({tuple(v.shape)} {v.dtype})", where)  # type: ignore[union-attr]
        nodes = [self.values.holds(i, self.at) for i in instances]
        for e, node in enumerate(nodes):
            if node is None:
                raise Refused(f"the weight of expert {e} is overwritten, or is not a value of the graph", instances[e])
        return Separate(tuple(nodes))  # type: ignore[arg-type]

    def _stacked(self, term: Term) -> Expr | None:
        if term.op in ("select", "index") and isinstance(term.args[0], Term) and not has_hole(term.args[0]):
            entry = term.args[2] if term.op == "select" else term.args[1][0] if len(term.args[1]) == 1 else None
            if term.op == "select" and term.args[1] != 0:
                return None
            values, sizes = hole_values(entry), shape(term.args[0])
            if isinstance(entry, tuple):
                return None
            if values is None or sizes is None:
                return None
            if values != tuple(range(len(values))):
                raise Refused("expert weights are read at another index than the expert's own", term)
            if sizes[0] != len(values):
                raise Refused(f"{len(values)} experts read from a stack of {sizes[0]}", term)
            return self.outer(term.args[0])
        if not term.args or not isinstance(term.args[0], Term) or not has_hole(term.args[0]):
            return None
        if term.op == "cast":
            inner = self._stacked(term.args[0])
            return Apply(torch.Tensor.to, (inner, term.args[1])) if inner is not None else None
        if term.op == "permute":
            inner = self._stacked(term.args[0])
            return Apply(torch.permute, (inner, (0, *(d + 1 for d in term.args[1])))) if inner is not None else None  # type: ignore[union-attr, operator]
        return None

    def _expert_rows(self, stack: Arg, clamped: bool, term: Term) -> Expr:
        """`stack[id of the slot]`."""
        sizes = shape(stack)
        if sizes is None or not isinstance(sizes[0], int):
            raise Refused("per-expert values of unknown number", term)
        self.claim_experts(sizes[0], term)
        self.clamp_ids = self.clamp_ids or clamped
        self.heavy.append(term)
        self.inner.append(term)
        return ExpertRows(Stacked(self.outer(stack)))

    def _probabilities(self, source: Arg, dims: int, term: Term) -> Expr:
        """probs[rows, e]: the entry of the slot's expert in [T, E]."""
        assert self.ids is not None and self.num_experts is not None
        sizes, own = shape(source), shape(self.ids)
        if sizes is None or own is None or dims != 1 or len(sizes) != 2 or len(own) != 2 or not same_size(sizes[0], own[0]):
            raise Refused("probabilities that are not [tokens, experts]", term)
        index = Apply(torch.clamp, (self.outer(self.ids), 0, self.num_experts - 1))
        return SlotValue(Apply(torch.gather, (self.outer(source), 1, index)), ())

    def _token_rows(self, source: Arg, term: Term, dims: int = 1) -> Expr:
        if not isinstance(source, Term) or dtype(source) is None:
            raise Refused("rows gathered from an unknown value", term)
        if has_hole(source):
            raise Refused("tokens are gathered from a tensor that differs between experts", term)
        if dims != 1:
            raise Refused("tokens with more than one token dim", term)
        self.x = self.x or source
        return TokenRows(self.outer(source))

    def outer(self, term: Arg) -> Expr:
        """A value computed outside the region, as an expression: a node that holds it now, or the views between."""
        if not isinstance(term, Term):
            raise Refused(f"{term!r} is not a tensor", term)
        if has_hole(term):
            raise Refused("a value that differs between experts is used as if it were one", term)
        node = self.values.holds(term, self.at)
        if node is not None:
            return Outer(node)
        rebuilt: dict[str, Callable[..., object]] = {"permute": torch.permute, "select": torch.select, "cast": torch.Tensor.to}
        if term.op in rebuilt and not term.nodes:
            return Apply(rebuilt[term.op], (self.outer(term.args[0]), *term.args[1:]))
        if term.op == "slice" and not term.nodes and all(isinstance(a, (int, type(None))) for a in term.args[1:]):
            dim, part = term.args[1], slice(*term.args[2:])
            return Apply("getitem", (self.outer(term.args[0]), (*(slice(None),) * dim, part)))  # type: ignore[operator]
        raise Refused("an input of the region is overwritten before the region ends", term)

    # -- row-wise operations -------------------------------------------------------------------------------------------

    def _is_rows(self, arg: Arg, out: Term, lead: int) -> bool:
        """Whether an operand, broadcast against `out`, spans its row dims."""
        own, full = shape(arg), shape(out)
        if own is None or full is None:
            return False
        features = len(full) - lead
        if len(own) <= features:
            return False
        ours, theirs = own[: len(own) - features], full[:lead]
        return not all(isinstance(s, int) and s == 1 for s in ours) or all(isinstance(s, int) and s == 1 for s in theirs)

    def _operand(self, arg: Arg, out: Term, order: Order, lead: int) -> object:
        if isinstance(arg, tuple):
            return tuple(self._operand(a, out, order, lead) for a in arg)
        if not isinstance(arg, Term):
            return arg
        own, full = shape(arg), shape(out)
        if own is None or full is None:
            raise Refused("a number that is computed inside the graph is used in an expert", arg)
        features = len(full) - lead
        if self._is_rows(arg, out, lead):
            ours = own[: len(own) - features]
            # outside slot order the number of rows may have several symbols (each boolean index brings its own); there the walk
            # reaches leaves of this very order only, and so proves the numbers equal
            if len(own) == len(full) and (not isinstance(order, TokenMajor) or all(map(same_size, ours, full[:lead]))):
                return self.rows(arg, order, lead)
            if isinstance(order, TokenMajor) and lead >= 2 and len(own) == len(full):
                if all(map(same_size, ours[:-1], full[: lead - 1])) and ours[-1] == 1 and not has_hole(arg):
                    self.claim_top_k(_static((full[lead - 1],), out)[0], out)
                    flat = Apply(torch.reshape, (self.outer(arg), (-1, *_static(own[lead:], arg))))
                    return TokenRows(flat)
            raise Refused("rows are broadcast against rows of another number", arg)
        wanted = own[-features:] if features and len(own) > features else own
        if has_hole(arg):
            theta = self.theta(arg if len(own) <= features else _raise("an expert value with unit row dims", arg), arg)
            self.heavy.append(out)
            padded = (1,) * (features - len(own)) + _static(own, arg)
            rows = ExpertRows(theta)
            return rows if len(own) == features else with_features(rows, padded)
        outer = self.outer(arg)
        return outer if len(own) <= features else Apply(torch.reshape, (outer, _static(wanted, arg)))

    def _pointwise(self, term: Term, order: Order, lead: int) -> Expr:
        self.inner.append(term)
        if term.op == "cast":
            return Apply(torch.Tensor.to, (self.rows(term.args[0], order, lead), term.args[1]))
        args = term.args
        if term.op in ("add", "sub") and len(args) == 3:
            if args[2] != 1:
                raise Refused("a scaled addition (alpha) in an expert", term)
            args = args[:2]
        if rank(term) is None:
            raise Refused("a value of unknown shape in an expert", term)
        operands = tuple(self._operand(a, term, order, lead) for a in args)
        kwargs = tuple((k, self._operand(v, term, order, lead)) for k, v in term.kwargs)
        target = rowwise.callable_for(term.op)
        if target is None:
            raise Refused(f"`{term.op}` has no functional form", term)
        if kwargs and target in rowwise.OPERATORS.values():
            target = getattr(torch, term.op)
        return Apply(target, operands, kwargs)

    def _features(self, dims: Arg, of: Arg, lead: int, term: Term) -> tuple[int, ...]:
        """Dims as negative feature dims; refuses row dims."""
        full = rank(of)
        if full is None:
            raise Refused("a value of unknown rank in an expert", term)
        dims = dims if isinstance(dims, tuple) else (dims,)
        if not all(isinstance(d, int) for d in dims):
            raise Refused("an operation over all dims mixes rows", term)
        found = tuple(d % full - full for d in dims)  # type: ignore[operator]
        if any(d < lead - full for d in found):
            raise Refused(f"`{term.op}` over the row dim mixes the rows of an expert", term)
        return found

    def _over_features(self, term: Term, order: Order, lead: int) -> Expr:
        args, kwargs = list(term.args), dict(term.kwargs)
        name = rowwise.OVER_DIMS[term.op]
        if name in kwargs:
            kwargs[name] = _one(self._features(kwargs[name], args[0], lead, term))
        elif len(args) > 1 and args[1] is not None:
            args[1] = _one(self._features(args[1], args[0], lead, term))
        else:
            raise Refused(f"`{term.op}` over all dims mixes rows", term)
        self.inner.append(term)
        rows = self.rows(args[0], order, lead)
        if any(isinstance(a, Term) for a in (*args[1:], *kwargs.values())):
            raise Refused(f"`{term.op}` with computed arguments", term)
        if term.op in ("sum", "mean", "amax", "cumsum") and not kwargs:
            named = dict(zip(("dim", "keepdim", "dtype"), args[1:]))
            kwargs = {k: v for k, v in named.items() if v is not None}
            args = args[:1]
        return Apply(rowwise.callable_for(term.op), (rows, *args[1:]), tuple(kwargs.items()))  # type: ignore[arg-type]

    def _norm(self, term: Term, order: Order, lead: int) -> Expr:
        args, kwargs = term.args, dict(term.kwargs)
        normalized = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
        if not isinstance(normalized, tuple) or len(normalized) > (rank(args[0]) or 0) - lead:
            raise Refused(f"`{term.op}` over row dims mixes rows", term)
        if any(has_hole(a) for a in (*args[1:], *kwargs.values())):
            raise Refused(f"`{term.op}` with weights of one expert", term)
        self.inner.append(term)
        rest = tuple(self.outer(a) if isinstance(a, Term) else a for a in args[1:])
        named = tuple((k, self.outer(v) if isinstance(v, Term) else v) for k, v in kwargs.items())
        return Apply(rowwise.callable_for(term.op), (self.rows(args[0], order, lead), *rest), named)  # type: ignore[arg-type]

    def _pieces(self, term: Term, order: Order, lead: int) -> Expr:
        source, which = term.args[0], term.args[1]
        assert isinstance(source, Term)
        if not isinstance(which, int):
            raise Refused("which piece is taken differs between experts", term)
        dim = source.args[1] if source.op == "unbind" else source.args[2]
        (feature,) = self._features(dim, source.args[0], lead, term)
        size = () if source.op == "unbind" else (source.args[1],)
        if any(isinstance(s, Term) or (isinstance(s, tuple) and any(isinstance(x, Term) for x in s)) for s in size):
            raise Refused("pieces of computed size", term)
        self.inner += [term, source]
        cut = Apply(getattr(torch, source.op), (self.rows(source.args[0], order, lead), *size), (("dim", feature),))
        return Apply("getitem", (cut, which))

    def _feature_index(self, term: Term, order: Order, lead: int) -> Expr:
        (feature,) = self._features(term.args[1], term.args[0], lead, term)
        entry: object = term.args[2] if term.op == "select" else slice(*term.args[2:])
        if any(isinstance(a, Term) for a in term.args[2:]):
            raise Refused("an index into the features is computed", term)
        self.inner.append(term)
        return Apply("getitem", (self.rows(term.args[0], order, lead), (..., entry, *(slice(None),) * (-feature - 1))))

    def _concatenate(self, term: Term, order: Order, lead: int) -> Expr:
        parts = term.args[0]
        if not isinstance(parts, tuple) or not parts:
            raise Refused("a concatenation of an unknown list", term)
        (feature,) = self._features(term.args[1], parts[0], lead, term)
        self.inner.append(term)
        return Apply(torch.cat, (tuple(self.rows(p, order, lead) for p in parts),), (("dim", feature),))

    def _reshape(self, term: Term, order: Order, lead: int) -> Expr:
        """A reshape that keeps rows apart: the leading dims before and after have the same product."""
        before, after = shape(term.args[0]), shape(term)
        if before is None or after is None:
            raise Refused("a reshape of unknown shapes", term)
        self._same_reshape(term)
        features = after[lead:]
        if not all(isinstance(s, int) and s > 0 for s in features):
            raise Refused("a reshape to features of symbolic or zero size", term)
        for n in range(1, len(before) + 1):
            rest = before[n:]
            # a reshape keeps the number of elements, so equal features mean equal rows
            if all(isinstance(s, int) for s in rest) and numel(rest) == numel(features):
                inner = self.rows(term.args[0], order, n)
                self.inner.append(term)
                return inner if rest == features else with_features(inner, features)  # type: ignore[arg-type]
        raise Refused("a reshape that mixes rows and features", term)

    def _same_reshape(self, term: Term) -> None:
        for i in term.instances or ():
            own, first = shape(i), shape(term)
            if own is None or first is None or len(own) != len(first):
                raise Refused("a reshape that differs between experts", term)
            if any(isinstance(a, int) != isinstance(b, int) or (isinstance(a, int) and a != b) for a, b in zip(own, first)):
                raise Refused("a reshape that differs between experts", term)


def expressions(expr: object) -> Iterator[Expr]:
    """All expressions of a body, parents first."""
    if isinstance(expr, tuple):
        for e in expr:
            yield from expressions(e)
        return
    if isinstance(expr, Stacked):
        yield from expressions(expr.value)
        return
    if not isinstance(expr, (Apply, ExpertRows, GroupedLinear, Outer, SlotValue, TokenRows)):
        return
    yield expr
    if isinstance(expr, Apply):
        yield from expressions(expr.args)
        yield from expressions(tuple(v for _, v in expr.kwargs))
    elif isinstance(expr, (TokenRows, SlotValue)):
        yield from expressions(expr.value)
    elif isinstance(expr, ExpertRows):
        yield from expressions(expr.theta)
    elif isinstance(expr, GroupedLinear):
        yield from expressions((expr.x, expr.weight, *((expr.bias,) if expr.bias else ())))


def with_features(rows: Expr, feature: tuple[int, ...]) -> Expr:
    """The rows with another feature shape; of two reshapes the last one counts."""
    if isinstance(rows, Apply) and rows.target is reshape_features:
        rows = rows.args[0]  # type: ignore[assignment]
    return Apply(reshape_features, (rows, feature))


def reshape_features(rows: torch.Tensor, feature: tuple[int, ...]) -> torch.Tensor:
    """[S, ...] to [S, *feature]. Lowering writes it as a plain reshape."""
    return rows.reshape(rows.shape[0], *feature)


def has_hole(arg: Arg, _depth: int = 0) -> bool:
    """Whether something below differs between experts."""
    if isinstance(arg, tuple):
        return any(map(has_hole, arg))
    if not isinstance(arg, Term):
        return False
    if arg.op == "hole":
        return True
    return arg.instances is not None and any(has_hole(c) for c in children(arg))


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


def _spans_tokens(term: Term) -> bool:
    """Whether a value without rows was made from rows: something below it has as many rows as an expert has tokens."""
    stack, seen = [term], set()
    while stack:
        t = stack.pop()
        if id(t) in seen or t.instances is None:
            continue
        seen.add(id(t))
        if any(not isinstance(s, int) for s in shape(t) or ()):
            return True
        stack.extend(children(t))
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


def _why_unlike(hole: Term) -> str:
    """What keeps the instances of a hole from being one expression."""
    instances = hole.instances
    if instances is None:
        return "an expert is given a number where another is given a tensor"
    odd = next((e for e, i in enumerate(instances) if i.op != instances[0].op or len(i.args) != len(instances[0].args)), None)
    if odd is None:
        return "rows of experts come from different tensors"
    return f"expert {odd} computes `{instances[odd].op}` where expert 0 computes `{instances[0].op}`"


def _static(sizes: tuple[int | torch.SymInt, ...], term: Arg) -> tuple[int, ...]:
    if not all(isinstance(s, int) for s in sizes):
        raise Refused("a feature size that is not static", term)
    return sizes  # type: ignore[return-value]


def _one(dims: tuple[int, ...]) -> int | tuple[int, ...]:
    return dims[0] if len(dims) == 1 else dims


def _raise(missing: str, term: Arg) -> Arg:
    raise Refused(missing, term)
