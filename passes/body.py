"""body: from the value of a slot down to the leaves of the region, proving on the way that every step works row by row.

The walk starts at what is summed and knows, at each term, in which *order* its rows stand:

    TokenMajor        slot (t, k) at row t*K + k, in any shape with T*K leading rows
    Sorted(order)     row p is slot order[p], experts ascending
    ExpertRows(...)   the rows of one expert, inside a rolled loop: those of a mask, or one slice of the sorted rows
    Pairs, EveryToken every token for every expert, or for the expert of a rolled loop; see `dense`

Row-wise operations are walked through; steps that only change the order (index by the permutation or its inverse, concatenation
of all slices) change the order; matrix products with the weights of the row's own expert become `GroupedLinear`; gathers by token
become `TokenRows`; anything per slot that holds no expert becomes `SlotValue`. All else raises `Refused` with the missing fact.

Because every operation acts on rows alone, the body found is the same function in any order, and lowering may run it sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch._subclasses import FakeTensor

from moec.ir import (
    Apply,
    ExpertRows,
    Expr,
    Fact,
    GroupedLinear,
    Outer,
    Separate,
    SlotValue,
    Stacked,
    Theta,
    TokenRows,
    expressions,
)
from moec.passes import leaves, products, rowwise
from moec.passes.normalise import Values
from moec.passes.orders import Order, Refused, TokenMajor
from moec.passes.roll import Roller, has_hole, hole_values, why_unlike
from moec.passes.support import Supports
from moec.passes.terms import Arg, Term, children, is_tensor, location, numel, same_size, shape

PLAIN = (FakeTensor, torch.Tensor, torch.nn.Parameter)  # other subclasses (DTensor, quantised) are refused by name


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
        self.placed: list[tuple[fx.Node, Term]] = []
        self.read: list[tuple[Term, int, bool]] = []  # (source, its row dims, one row per token rather than per slot)
        self.abandoned: list[Refused] = []
        self.supports = Supports()
        self.weighed: list[Term] = []  # values of pairs, which may follow from the ids
        self._known: dict[tuple[int, object, int], Expr] = {}
        self._cut: dict[tuple[int, object, int], Expr] = {}  # tensors cut in pieces, each once

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

    def same_state_as_root(self, node: fx.Node | None, term: Term) -> None:
        """The node must run under the grad mode and autocast of the root, where its replacement will run."""
        if node is not None:
            self.placed.append((node, term))

    def check_sizes(self) -> None:
        """Every value read by token has T rows, every value read by slot T*K: the ops read by position."""
        ids = shape(self.ids)
        if ids is None or self.top_k is None:
            raise Refused("the expert ids behind these rows are not known", self.ids)
        slots = numel(ids)
        for source, lead, per_row in self.read:
            sizes = shape(source)
            if sizes is None or not same_size(numel(sizes[:lead]) * (self.top_k if per_row else 1), slots):
                raise Refused(f"{sizes and sizes[:lead]} rows are read where the ids have {tuple(ids)} slots", source)

    def fact(self, text: str, term: Arg) -> None:
        """Notes something proven, for the report."""
        node = term.node if isinstance(term, Term) else None
        self.facts.append(Fact(text, str(node), location(node)))

    def rows(self, term: Arg, order: Order, lead: int) -> Expr:
        """The row value that `term` is, its first `lead` dims being the rows in that order."""
        if not isinstance(term, Term):
            raise Refused(f"{term!r} is not a tensor of rows", term)
        key = (id(term), order, lead)
        if key not in self._known:
            self._known[key] = (
                self._token_major(term, lead) if isinstance(order, TokenMajor) else self._walk(term, order, lead)
            )
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
        self.read.append((term, lead, False))
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
            raise Refused(why_unlike(term), term)
        if (found := leaves.leaf(self, term, order, lead)) is not None:
            return found
        if op in ("linear", "matmul", "bmm", "grouped_mm"):
            return products.product(self, term, order, lead)
        if op == "reshape":
            return rowwise.reshape(self, term, order, lead)
        if op == "masked_fill" and leaves.masks_the_tail(self, term, order):
            return self.rows(term.args[0], order, lead)
        if op == "item_of" and isinstance(term.args[0], Term) and term.args[0].op in ("chunk", "split", "unbind"):
            return rowwise.pieces(self, term, order, lead)
        if op in ("select", "slice") and isinstance(term.args[1], int):
            return rowwise.feature_index(self, term, order, lead)
        if op == "cat":
            return rowwise.concatenate(self, term, order, lead)
        if op in rowwise.OVER_DIMS:
            return rowwise.over_features(self, term, order, lead)
        if op in ("layer_norm", "rms_norm"):
            return rowwise.norm(self, term, order, lead)
        if rowwise.is_pointwise(op):
            return rowwise.pointwise(self, term, order, lead)
        if op.endswith("dropout") or op in ("bernoulli", "rrelu"):
            raise Refused(f"`{op}` draws random numbers inside an expert", term)
        raise Refused(f"`{op}` is not known to work row by row", term)

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
        odd = next((type(v).__name__ for v in vals if isinstance(v, torch.Tensor) and type(v) not in PLAIN), None)
        if odd is not None:
            raise Refused(f"`{odd}` weights are not handled", where)
        if not all(map(is_tensor, vals)):
            raise Refused("a weight of unknown shape", where)
        for e, v in enumerate(vals):
            if v.shape != first.shape or v.dtype != first.dtype or v.device != first.device:
                raise Refused(
                    f"expert {e} has weights of another shape, dtype or device ({tuple(v.shape)} {v.dtype})", where
                )
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
            self.inner.append(term)
            return self.outer(term.args[0])
        if not term.args or not isinstance(term.args[0], Term) or not has_hole(term.args[0]):
            return None
        if term.op in ("cast", "permute"):
            self.inner.append(term)
        if term.op == "cast":
            inner = self._stacked(term.args[0])
            return Apply(torch.Tensor.to, (inner, term.args[1])) if inner is not None else None
        if term.op == "permute":
            inner = self._stacked(term.args[0])
            return Apply(torch.permute, (inner, (0, *(d + 1 for d in term.args[1])))) if inner is not None else None
        return None

    def outer(self, term: Arg) -> Expr:
        """A value computed outside the region, as an expression: a node that holds it now, or the views between."""
        if not isinstance(term, Term):
            raise Refused(f"{term!r} is not a tensor", term)
        if has_hole(term):
            raise Refused("a value that differs between experts is used as if it were one", term)
        if isinstance(term.val, torch.Tensor) and type(term.val) not in PLAIN:
            raise Refused(f"`{type(term.val).__name__}` tensors are not handled", term)
        node = self.values.holds(term, self.at)
        if node is not None:
            return Outer(node)
        rebuilt: dict[str, Callable[..., object]] = {
            "permute": torch.permute,
            "select": torch.select,
            "cast": torch.Tensor.to,
            "detach": torch.detach,
        }
        if term.op in rebuilt and not term.nodes:
            return Apply(rebuilt[term.op], (self.outer(term.args[0]), *term.args[1:]))
        if term.op == "slice" and not term.nodes and all(isinstance(a, (int, type(None))) for a in term.args[1:]):
            dim, part = term.args[1], slice(*term.args[2:])
            return Apply("getitem", (self.outer(term.args[0]), (*(slice(None),) * dim, part)))
        raise Refused("an input of the region is overwritten before the region ends", term)


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
