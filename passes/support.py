"""support: which pairs of a token and an expert a tensor can be non-zero for.

    zeros.scatter(1, ids, w)                     full(-inf).scatter(1, ids, logits).sigmoid()
    probs * one_hot(ids).sum(1)                  probs.masked_fill(~mask, 0)
    (one_hot(ids) * w[..., None]).sum(1)         experts(x) * any of these

Code that runs every expert on every token makes up for it with zeros. Outside the pairs (t, ids[t, k]) all of these tensors are
`off`, which is 0, or -inf on the way to a sigmoid or softmax; and that is why only those pairs have to be computed. What is known
about a tensor is the *axis* that each of its dims is:

    T token (T0, T1 if several dims)    K choice    E expert    1 of size one
    * anything: what is said holds all along it    TE, ET two dims made one

Every rule here is about one operation, and most say that zero stays zero. What has no rule is not known to be zero. That
0 * inf is NaN is left out of account: it is the second licence of docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from moec.passes import facts
from moec.passes.terms import Arg, Term, numel, rank, same_shape, same_size, shape

# f(0) = 0, and the derivative there is finite
ZERO_AT_ZERO = {
    "silu", "gelu", "relu", "relu6", "tanh", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "softsign", "tanhshrink",
    "sin", "erf", "square", "abs", "neg", "detach", "cast",
}  # fmt: skip


@dataclass(frozen=True)
class Support:
    """The entries of a tensor are `off` but for the pairs (t, ids[t, k]). `expert` is the expert where no dim runs over them."""

    root: Term
    ids: Term
    axes: tuple[str, ...]
    num_experts: int | None = None
    expert: Arg = None
    off: float = 0.0
    one_hot: bool = False  # made by an operation that refuses ids beyond the last expert

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of the token dims, in the order of the ids."""
        return token_names(max((rank(self.ids) or 1) - 1, 1))

    @property
    def pairs(self) -> tuple[str, ...]:
        """The axes of a tensor [tokens.., experts]."""
        return (*self.tokens, "E")


class Supports:
    """What is known of the terms asked about so far."""

    def __init__(self) -> None:
        self._known: dict[Term, Support | None] = {}

    def of(self, term: Arg) -> Support | None:
        """The support of a tensor, None when nothing is known to be off."""
        if not isinstance(term, Term):
            return None
        if term not in self._known:
            self._known[term] = None  # while it is being found
            self._known[term] = self._find(term)
        return self._known[term]

    def zero(self, term: Arg) -> Support | None:
        """The same, if off is zero."""
        found = self.of(term)
        return found if found is not None and found.off == 0 else None

    def _find(self, term: Term) -> Support | None:
        if term.op in ZERO_AT_ZERO and (inner := self.of(term.args[0] if term.args else None)) is not None:
            kept = term.op == "detach" or (term.op == "cast" and term.args[1].is_floating_point)
            return inner if inner.off == 0 or kept else None
        if (mask := facts.mask_of(term)) is not None:
            return _of_mask(mask)
        rule = RULES.get(term.op)
        return rule(self, term) if rule is not None else None


def token_names(dims: int) -> tuple[str, ...]:
    return ("T",) if dims == 1 else tuple(f"T{d}" for d in range(dims))


def _of_mask(mask: facts.Mask) -> Support | None:
    dims = rank(mask.ids) or 0
    choice = dims - 1 if dims > 1 else None
    names: dict[int | str, str] = {"E": "E", "1": "1", **dict(enumerate(token_names(max(dims - 1, 1))))}
    if choice is not None:
        names[choice] = "K"
    if (
        mask.summed - {choice}
        or (mask.expert is None and "E" not in mask.axes)
        or not keeps_choices(mask.root, mask.ids)
    ):
        return None
    axes = tuple(names[a] for a in mask.axes)
    return Support(mask.root, mask.ids, axes, mask.num_experts, mask.expert, 0.0, mask.one_hot)


def keeps_choices(root: Term, ids: Term) -> bool:
    """Whether the ids as they are compared have the choices of one token in each row, as their root has."""
    own, first = shape(ids), shape(root)
    if not own or not first:
        return False
    if len(own) == 1:
        return len(first) == 1 or same_size(first[-1], 1)
    return len(first) > 1 and same_size(own[-1], first[-1])


def filled_with(term: Arg) -> float | None:
    """0 or -inf when the term is that number, or a tensor full of it."""
    if isinstance(term, Term) and term.op == "zeros":
        return 0.0
    if isinstance(term, Term) and term.op in ("full", "scalar_tensor"):
        term = term.args[-1]
    number = isinstance(term, (int, float)) and not isinstance(term, bool)
    return float(term) if number and term in (0, -inf) else None


# -- one rule for each operation -------------------------------------------------------------------------------------------


def _scatter(known: Supports, term: Term) -> Support | None:
    base, dim, ids = term.args[:3]
    off, root, sizes, out = filled_with(base), facts.ids_root(ids), shape(ids), shape(base)
    if off is None or root is None or sizes is None or out is None or not isinstance(base, Term) or term.kwargs:
        return None
    if term.op == "scatter_add" and off != 0:
        return None
    if len(sizes) < 2 or len(sizes) != len(out) or dim != len(out) - 1 or not isinstance(out[-1], int):
        return None
    if not all(map(same_size, sizes[:-1], out[:-1])):
        return None
    if not keeps_choices(root, ids):
        return None
    return Support(root, ids, (*token_names(len(out) - 1), "E"), out[-1], None, off, True)


def _index_put(known: Supports, term: Term) -> Support | None:
    """zeros[arange(T)[:, None], ids] = w"""
    base, entries, _, _ = term.args
    off, out = filled_with(base), shape(base)
    if off is None or out is None or len(out) != 2 or len(entries) != 2 or not isinstance(out[1], int):
        return None
    rows, ids = entries
    root, sizes = facts.ids_root(ids), shape(ids)
    counted = rows.args[0] if isinstance(rows, Term) and rows.op == "reshape" else None
    if root is None or sizes is None or len(sizes) != 2 or not isinstance(counted, Term) or counted.op != "arange":
        return None
    if not keeps_choices(root, ids):
        return None
    column = shape(rows)
    if column is None or len(column) != 2 or column[1] != 1:
        return None
    if not (same_size(column[0], sizes[0]) and same_size(column[0], out[0])):
        return None
    return Support(root, ids, ("T", "E"), out[1], None, off, True)


def _mul(known: Supports, term: Term) -> Support | None:
    for arg in term.args[:2]:
        if (found := known.zero(arg)) is not None:
            return _broadcast(found, arg, term)
    return None


def _div(known: Supports, term: Term) -> Support | None:
    found = known.zero(term.args[0])
    return _broadcast(found, term.args[0], term) if found is not None and not term.kwargs else None


def _expand(known: Supports, term: Term) -> Support | None:
    found = known.of(term.args[0])
    return _broadcast(found, term.args[0], term) if found is not None else None


def _add(known: Supports, term: Term) -> Support | None:
    a, b = (known.zero(arg) for arg in term.args[:2])
    if a is None or b is None:
        return None
    left, right = _broadcast(a, term.args[0], term), _broadcast(b, term.args[1], term)
    same = left is not None and right is not None and left.root is right.root and left.axes == right.axes
    return left if same and facts.same_expert(a.expert, b.expert) and _same_ids(a, b) else None


def _where(known: Supports, term: Term) -> Support | None:
    """where(mask, x, 0)"""
    if len(term.args) != 3 or (off := filled_with(term.args[2])) is None:
        return None
    found = known.zero(term.args[0])
    found = _broadcast(found, term.args[0], term) if found is not None and facts.mask_of(term.args[0]) else None
    return replace(found, off=off) if found is not None else None


def _masked_fill(known: Supports, term: Term) -> Support | None:
    """x.masked_fill(~mask, 0)"""
    off, mask = filled_with(term.args[2]), negated(term.args[1])
    if off is None or mask is None or (found := known.zero(mask)) is None:
        return None
    found = _broadcast(found, term.args[1], term)
    return replace(found, off=off) if found is not None else None


def negated(term: Arg) -> Term | None:
    """The mask that the term is the negation of."""
    if not isinstance(term, Term):
        return None
    inner = term.args[0] if term.args else None
    if term.op in ("bitwise_not", "logical_not") or (
        term.op == "eq" and term.args[1] == 0 and not isinstance(term.args[1], Term)
    ):
        return inner if isinstance(inner, Term) and facts.mask_of(inner) is not None else None
    if term.op == "reshape":  # ~mask, then a unit dim put in
        found = negated(inner)
        return found if found is not None and shape(found) == shape(term) else None
    return None


def _softmax(known: Supports, term: Term) -> Support | None:
    found = known.of(term.args[0])
    dim = dict(term.kwargs).get("dim", term.args[1] if len(term.args) > 1 else None)
    if found is None or found.off != -inf or not isinstance(dim, int) or found.axes[dim] != "E":
        return None
    return replace(found, off=0.0)


def _sigmoid(known: Supports, term: Term) -> Support | None:
    found = known.of(term.args[0])
    return replace(found, off=0.0) if found is not None and found.off == -inf else None


def _permute(known: Supports, term: Term) -> Support | None:
    found = known.of(term.args[0])
    return replace(found, axes=tuple(found.axes[d] for d in term.args[1])) if found is not None else None


def _reshape(known: Supports, term: Term) -> Support | None:
    found, before, after = known.of(term.args[0]), shape(term.args[0]), shape(term)
    if found is None or before is None or after is None:
        return None
    labelled = [(a, s) for a, s in zip(found.axes, before) if a != "1"]
    axes: list[str] = []
    for i, size in enumerate(after):
        if labelled and same_size(labelled[0][1], size):
            axes.append(labelled.pop(0)[0])
        elif size == 1:
            axes.append("1")
        elif len(labelled) > 1 and labelled[0][0] + labelled[1][0] in ("TE", "ET"):
            (a, m), (b, n) = labelled[:2]
            if not same_size(numel((m, n)), size):
                return None
            axes.append(a + b)
            del labelled[:2]
        elif labelled and labelled[0][0] in ("TE", "ET") and i + 1 < len(after):
            label, whole = labelled.pop(0)
            first, second = label[0], label[1]
            count = size if first == "E" else after[i + 1]
            if count != found.num_experts or not same_size(numel((size, after[i + 1])), whole):
                return None
            axes.append(first)
            labelled.insert(0, (second, after[i + 1]))
        elif labelled and all(a == "*" for a, _ in labelled):
            if not same_size(numel(tuple(s for _, s in labelled)), numel(after[i:])):
                return None
            axes += ["*"] * (len(after) - i)
            labelled = []
            break
        else:
            return None
    return replace(found, axes=tuple(axes)) if not labelled else None


def _select(known: Supports, term: Term) -> Support | None:
    found, dim = known.of(term.args[0]), term.args[1]
    if found is None or not isinstance(dim, int) or found.axes[dim] not in ("E", "*", "1"):
        return None
    rest = (*found.axes[:dim], *found.axes[dim + 1 :])
    return replace(found, axes=rest, **({"expert": term.args[2]} if found.axes[dim] == "E" else {}))


def _slice(known: Supports, term: Term) -> Support | None:
    found, dim = known.of(term.args[0]), term.args[1]
    return found if found is not None and isinstance(dim, int) and found.axes[dim] == "*" else None


def _piece(known: Supports, term: Term) -> Support | None:
    cut = term.args[0]
    if not isinstance(cut, Term) or cut.op not in ("chunk", "split", "unbind"):
        return None
    found, dim = known.of(cut.args[0]), cut.args[1] if cut.op == "unbind" else cut.args[2]
    if found is None or not isinstance(dim, int) or found.axes[dim] != "*":
        return None
    return found if cut.op != "unbind" else replace(found, axes=(*found.axes[:dim], *found.axes[dim + 1 :]))


def _sum(known: Supports, term: Term) -> Support | None:
    found, dims, keep = known.zero(term.args[0]), term.args[1], term.args[2]
    if found is None or not isinstance(dims, tuple) or any(found.axes[d] not in ("*", "1", "K") for d in dims):
        return None
    axes = tuple("1" if d in dims else a for d, a in enumerate(found.axes) if keep or d not in dims)
    return replace(found, axes=axes)


def _cat(known: Supports, term: Term) -> Support | None:
    parts, dim = term.args
    found = [known.zero(p) for p in parts] if isinstance(parts, tuple) else []
    first = found[0] if found else None
    if first is None or not isinstance(dim, int) or first.axes[dim] != "*":
        return None
    same = all(f is not None and f.root is first.root and f.axes == first.axes and _same_ids(f, first) for f in found)
    return first if same and all(facts.same_expert(f.expert, first.expert) for f in found if f) else None


def _stack(known: Supports, term: Term) -> Support | None:
    parts, dim = term.args
    found = [known.zero(p) for p in parts] if isinstance(parts, tuple) else []
    first = found[0] if found else None
    if first is None or not isinstance(dim, int) or "E" in first.axes:
        return None
    for e, part in enumerate(found):
        if part is None or part.root is not first.root or part.axes != first.axes or not _same_ids(part, first):
            return None
        if isinstance(part.expert, Term) or part.expert != e:
            return None
    axes = (*first.axes[:dim], "E", *first.axes[dim:])
    return replace(first, axes=axes, expert=None, num_experts=len(found))


def _product(known: Supports, term: Term) -> Support | None:
    """Zero rows times a matrix, without a bias."""
    x, weight = term.args[0], term.args[1]
    if term.op == "linear" and term.args[2] is not None:
        return None
    found, wide = known.zero(x), rank(weight)
    if found is None or found.axes[-1] not in ("*", "1") or wide is None or wide not in (2, len(found.axes)):
        return None
    if wide > 2 and any(a == "1" for a in found.axes[:-2]):
        return None
    return replace(found, axes=(*found.axes[:-1], "*"))


def _einsum(known: Supports, term: Term) -> Support | None:
    equation = parse(term)
    if equation is None:
        return None
    inputs, out = equation
    for letters, operand in zip(inputs, term.args[1]):
        found = known.zero(operand)
        if found is None:
            continue
        axis = dict(zip(letters, found.axes))
        if all(axis[c] in ("*", "1", "K") for c in letters if c not in out):
            return replace(found, axes=tuple(axis.get(c, "*").replace("1", "*") for c in out))
    return None


def parse(term: Term) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result of an einsum without ellipsis, diagonals and implicit result."""
    equation = term.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    inputs = left.split(",")
    plain = all(len(set(letters)) == len(letters) for letters in (*inputs, out))
    return (inputs, out) if plain and len(inputs) == len(term.args[1]) else None


def _broadcast(found: Support | None, arg: Arg, out: Term) -> Support | None:
    """The support of an operand as that of the result it is broadcast to."""
    own, full = shape(arg), shape(out)
    if found is None or own is None or full is None:
        return None
    axes = ("1",) * (len(full) - len(own)) + found.axes
    sizes = (1,) * (len(full) - len(own)) + tuple(own)
    spread = tuple("*" if a == "1" and not same_size(s, n) else a for a, s, n in zip(axes, sizes, full))
    kept = all(same_size(s, n) for a, s, n in zip(axes, sizes, full) if a not in ("1", "*"))
    return replace(found, axes=spread) if kept else None


def _same_ids(a: Support, b: Support) -> bool:
    return same_shape(shape(a.ids), shape(b.ids))


RULES: dict[str, Callable[[Supports, Term], Support | None]] = {
    "scatter": _scatter,
    "scatter_add": _scatter,
    "index_put": _index_put,
    "mul": _mul,
    "div": _div,
    "add": _add,
    "sub": _add,
    "where": _where,
    "masked_fill": _masked_fill,
    "softmax": _softmax,
    "_softmax": _softmax,
    "sigmoid": _sigmoid,
    "exp": _sigmoid,
    "permute": _permute,
    "reshape": _reshape,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "item_of": _piece,
    "sum": _sum,
    "mean": _sum,
    "cat": _cat,
    "stack": _stack,
    "linear": _product,
    "matmul": _product,
    "bmm": _product,
    "einsum": _einsum,
}
