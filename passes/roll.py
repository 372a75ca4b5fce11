"""roll: E equal expressions become one, with holes where they differ (anti-unification).

    linear(index(x, rows_0), w_0), ..., linear(index(x, rows_7), w_7)   ->   linear(index(x, <rows>), <w_0 ... w_7>)

Two terms roll when they are the same operation on arguments that roll. What is common to all instances stays the very same
term; constants and inputs that differ become a `Hole` (one entry per instance). Everything else that differs is a hole as well,
and whoever reads it has to prove something about its values or refuse. Rolling proves nothing by itself.
"""

from __future__ import annotations

from moec.passes.terms import Arg, Hole, Interner, Term, children, shape

LEAVES = ("placeholder", "get_attr", "opaque")


class Roller:
    """Rolls tuples of E terms; remembers what it has rolled, so shared subterms stay shared."""

    def __init__(self, make: Interner | None = None) -> None:
        self._make = (make or Interner()).make
        self._known: dict[tuple[int, ...], Term] = {}
        self._keep: list[tuple[Arg, ...]] = []

    def roll(self, instances: tuple[Arg, ...]) -> Arg:
        """One argument for E arguments: the common one, a rolled term, or a term `hole`."""
        first = instances[0]
        if all(i is first for i in instances):
            return first
        if all(isinstance(i, Term) for i in instances):
            return self._roll_terms(instances)
        if all(isinstance(i, tuple) and len(i) == len(first) for i in instances):
            return tuple(self.roll(column) for column in zip(*instances))
        if all(isinstance(i, slice) for i in instances):
            parts = ((i.start, i.stop, i.step) for i in instances)
            return slice(*(self.roll(column) for column in zip(*parts)))
        if all(type(i) is type(first) and i == first for i in instances):
            return first
        return self._hole(instances)

    def _roll_terms(self, instances: tuple[Term, ...]) -> Term:
        key = tuple(map(id, instances))
        known = self._known.get(key)
        if known is None:
            self._keep.append(instances)  # ids in the key stay valid while the terms live
            known = self._known[key] = self._roll_new(instances)
        return known

    def _roll_new(self, instances: tuple[Term, ...]) -> Term:
        first = instances[0]
        alike = all(
            i.op == first.op
            and len(i.args) == len(first.args)
            and tuple(k for k, _ in i.kwargs) == tuple(k for k, _ in first.kwargs)
            and _same_form(i, first)
            for i in instances
        )
        if not alike or first.op in LEAVES:
            return self._hole(instances)
        columns = list(zip(*(i.args for i in instances)))
        if first.op == "reshape":
            # the target shape names each instance's own number of rows; the shapes themselves are compared where it is used
            columns = columns[:1]
        args = tuple(self.roll(column) for column in columns)
        kwargs = tuple(
            (k, self.roll(tuple(i.kwargs[n][1] for i in instances))) for n, (k, _) in enumerate(first.kwargs)
        )
        rolled = Term(first.op, args, kwargs, first.val)
        rolled.instances = instances
        return rolled

    def _hole(self, instances: tuple[Arg, ...]) -> Term:
        key = ("hole", *map(_identity, instances))
        known = self._known.get(key)  # type: ignore[arg-type]
        if known is None:
            self._keep.append(instances)
            first = instances[0]
            known = Term("hole", (Hole(instances),), (), first.val if isinstance(first, Term) else None)
            if all(isinstance(i, Term) for i in instances):
                known.instances = instances
            self._known[key] = known  # type: ignore[index]
        return known


def _same_form(a: Term, b: Term) -> bool:
    """Whether two terms have the same rank and sizes, but for those that only the data know."""
    own, other = shape(a), shape(b)
    if own is None or other is None:
        return (own is None) == (other is None)
    return len(own) == len(other) and all(
        m == n for m, n in zip(own, other) if isinstance(m, int) and isinstance(n, int)
    )


def _identity(arg: Arg) -> object:
    return id(arg) if isinstance(arg, Term) else (type(arg).__name__, arg if not isinstance(arg, tuple) else id(arg))


def hole_values(arg: Arg) -> tuple[Arg, ...] | None:
    """The E values behind a hole, None when the argument is not a hole."""
    return arg.args[0].values if isinstance(arg, Term) and arg.op == "hole" else None


def first_difference(instances: tuple[Term, ...]) -> tuple[int, Term] | None:
    """(which, where): the first instance whose operations differ from the first one's, for the text of a refusal."""
    for number, other in enumerate(instances[1:], 1):
        stack: list[tuple[Arg, Arg]] = [(instances[0], other)]
        while stack:
            a, b = stack.pop()
            if not isinstance(a, Term) or not isinstance(b, Term) or a is b:
                continue
            if a.op != b.op and {a.op, b.op}.isdisjoint(LEAVES):
                return number, b
            stack.extend(zip(a.args, b.args))
    return None


def has_hole(arg: Arg) -> bool:
    """Whether something below differs between experts."""
    if isinstance(arg, tuple):
        return any(map(has_hole, arg))
    if not isinstance(arg, Term):
        return False
    if arg.op == "hole":
        return True
    return arg.instances is not None and any(has_hole(c) for c in children(arg))


def why_unlike(hole: Term) -> str:
    """What keeps the instances of a hole from being one expression."""
    instances = hole.instances
    if instances is None:
        return "an expert is given a number where another is given a tensor"
    odd = next(
        (e for e, i in enumerate(instances) if i.op != instances[0].op or len(i.args) != len(instances[0].args)), None
    )
    if odd is None:
        return "rows of experts come from different tensors"
    return f"expert {odd} computes `{instances[odd].op}` where expert 0 computes `{instances[0].op}`"
