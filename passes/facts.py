"""facts: what an index value means, proven by following terms. Pure; every function answers with a fact or None ("not known").

    ids == e, one_hot(ids)[..., e], ids.unsqueeze(-1) == arange(E), zeros.scatter(1, ids, 1)      -> Mask
    torch.where(mask)[j], mask.nonzero()[:, j]                                                    -> Coordinate
    argsort(ids), sort(ids)[1]                                                                    -> sorted order
    argsort(p), empty[p] = arange(S)                                                              -> the inverse of p
    bincount(ids), histc(ids), one_hot(ids).sum(0), scatter(zeros, ids, 1).sum(0)                 -> Histogram

Slots are numbered row-major over the ids, so any reshape of the ids numbers them the same way; `ids_root` takes reshapes and
integer casts off. Idioms ask for these facts; another spelling of the same thing belongs here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moec.passes.terms import Arg, Term, dtype, rank, same_shape, same_size, shape

EXACT = (torch.int64, torch.int32, torch.float32, torch.float64)
WIDE = (torch.int64, torch.int32)  # hold every expert id; a cast to less could wrap
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True)
class Mask:
    """A tensor whose entry is 1 (true) where the id at that place is the expert of that place.

    `axes` names each dim: an int is that dim of the compared ids, "E" runs over the experts, "1" has size one. `expert` is the
    constant or hole when the expert is fixed. `summed` are the dims of the ids that were reduced (by any, sum or scatter).
    """

    root: Term
    ids: Term
    axes: tuple[int | str, ...]
    expert: Arg = None
    num_experts: int | None = None
    summed: frozenset[int] = frozenset()
    one_hot: bool = False  # made by one_hot/scatter, which refuse ids that are out of range


@dataclass(frozen=True)
class Coordinate:
    """`where(mask)[j]`: for each true entry of the mask, in row-major order, its position along dim `dim` of the ids."""

    mask: Mask
    dim: int


@dataclass(frozen=True)
class Histogram:
    """`[E]`: how many slots have each id. `drops` says that ids outside the range are not counted (others refuse them)."""

    root: Term
    num_experts: int
    drops: bool


def ids_root(term: Arg) -> Term | None:
    """The integer tensor behind reshapes and integer casts; its row-major order numbers the slots."""
    while isinstance(term, Term):
        if term.op == "reshape" or (term.op == "cast" and dtype(term) in WIDE and _is_integer(term.args[0])):
            term = term.args[0]
        else:
            return term if _is_integer(term) else None
    return None


def _is_integer(term: Arg) -> bool:
    return dtype(term) in INTEGERS


def ids_bound(root: Term) -> int | None:
    """N when every id is known to lie in [0, N): indices of a topk, sort or argmax over a dim of static size N."""
    if root.op == "item_of" and root.args[1] == 1 and isinstance(root.args[0], Term):
        source = root.args[0]
        if source.op == "topk" and (sizes := shape(source.args[0])):
            n = sizes[source.args[2]]
            return n if isinstance(n, int) else None
    if (
        root.op == "item_of"
        and root.args[1] == 1
        and isinstance(root.args[0], Term)
        and root.args[0].op in ("max", "min")
    ):
        return _size_of_dim(root.args[0])
    if root.op in ("argmax", "argmin"):
        return _size_of_dim(root)
    if root.op in ("slice", "select") and isinstance(root.args[0], Term):
        return ids_bound(root.args[0])
    if root.op == "clamp" and root.args[1] == 0 and isinstance(root.args[2], int):
        return root.args[2] + 1
    return None


def _size_of_dim(reduction: Term) -> int | None:
    """The static size of the dim that max(x, dim) or argmax(x, dim) chooses from."""
    sizes, named = shape(reduction.args[0]), dict(reduction.kwargs)
    dim = named.get("dim", reduction.args[1] if len(reduction.args) > 1 else None)
    if sizes is None or not isinstance(dim, int):
        return None
    n = sizes[dim]
    return n if isinstance(n, int) else None


def ids_distinct(root: Term, ids: Term | None = None) -> bool:
    """Whether the ids of one token (last dim) are known to differ: they are indices of one topk over that dim.

    `ids` is the tensor as it is compared, which must have the same last dim: a reshape may put two tokens into one row.
    """
    if ids is not None:
        own, first = shape(ids), shape(root)
        if own is None or first is None or not own or not first or not same_size(own[-1], first[-1]):
            return False
    if root.op == "slice" and isinstance(root.args[0], Term):
        return ids_distinct(root.args[0])
    sizes = shape(root)
    if sizes and sizes[-1] == 1:
        return True
    if root.op == "item_of" and root.args[1] == 1 and isinstance(root.args[0], Term) and root.args[0].op == "topk":
        return root.args[0].args[2] == (rank(root.args[0].args[0]) or 0) - 1
    return False


# -- masks -------------------------------------------------------------------------------------------------------------


def mask_of(term: Arg) -> Mask | None:
    """The mask a tensor is, in any spelling known here."""
    if not isinstance(term, Term):
        return None
    op, args = term.op, term.args
    if op == "eq":
        return _mask_from_eq(args[0], args[1]) or _mask_from_eq(args[1], args[0])
    if op == "one_hot":
        root, sizes = ids_root(args[0]), shape(args[0])
        if root is None or sizes is None or not isinstance(args[1], int) or args[1] < 1:
            return None
        return Mask(root, args[0], (*range(len(sizes)), "E"), None, args[1], one_hot=True)
    if op in ("scatter", "scatter_add"):
        return _mask_from_scatter(term)
    if op == "item_of" and isinstance(args[0], Term) and args[0].op == "split" and args[0].args[1] == 1:
        whole, dim = mask_of(args[0].args[0]), args[0].args[2]
        if whole is None or not isinstance(dim, int) or whole.axes[dim] != "E":
            return None
        return replace(whole, axes=(*whole.axes[:dim], "1", *whole.axes[dim + 1 :]), expert=args[1])
    inner = mask_of(args[0]) if args else None
    if inner is None:
        return None
    if op == "permute":
        return replace(inner, axes=tuple(inner.axes[d] for d in args[1]))
    if op == "select":
        return _select(inner, args[1], args[2])
    if op == "item_of" or op == "unbind":
        return None
    if op in ("sum", "any", "amax"):
        dims, keep = args[1], args[2]
        if dims is None:
            dims = tuple(range(len(inner.axes)))
        if any(inner.axes[d] == "E" for d in dims):
            return None
        gone = frozenset(a for d in dims if isinstance(a := inner.axes[d], int))
        axes = tuple("1" if d in dims else a for d, a in enumerate(inner.axes) if keep or d not in dims)
        return replace(inner, axes=axes, summed=inner.summed | gone)
    if op == "cast":
        return inner
    if (op == "gt" and args[1] == 0) or (op == "ne" and args[1] == 0) or (op == "ge" and args[1] == 1):
        return inner
    if op == "eq" and args[1] == 1 and not inner.summed:
        return inner
    if op == "reshape":
        return _reshape_mask(inner, term)
    if op == "index" and len(args[1]) == 1 and isinstance(args[1][0], tuple) and len(args[1][0]) == 1:  # mask[[e]]
        chosen = _select(inner, 0, args[1][0][0])
        return replace(chosen, axes=("1", *chosen.axes)) if chosen else None
    return None


def _mask_from_eq(ids: Arg, other: Arg) -> Mask | None:
    if isinstance(ids, Term) and (inner := mask_of(ids)) and other == 1 and not isinstance(other, Term):
        return inner if not inner.summed else None
    root, sizes = ids_root(ids), shape(ids)
    if root is None or sizes is None:
        return None
    if isinstance(other, bool):
        return None
    if isinstance(other, int) or (isinstance(other, Term) and other.op == "hole"):
        return Mask(root, ids, tuple(range(len(sizes))), other)
    experts = _arange_axis(other)
    if experts is None or root.op == "arange":
        return None
    count, others = experts  # arange(E) viewed with `others` dims after (and any number before) the expert dim
    full = rank(ids) or 0
    at = full - 1 - others
    if at < 0 or sizes[at] != 1:
        return None
    base = ids.args[0] if isinstance(ids, Term) and ids.op == "reshape" else None
    base_sizes = shape(base)
    if base_sizes is None or tuple(map(str, base_sizes)) != tuple(str(s) for d, s in enumerate(sizes) if d != at):
        return None
    axes: list[int | str] = list(range(full - 1))
    axes.insert(at, "E")
    return Mask(root, base, tuple(axes), None, count)  # type: ignore[arg-type]


def _arange_axis(term: Arg) -> tuple[int, int] | None:
    """(E, dims after it) when the term is arange(E), possibly with unit dims around."""
    if not isinstance(term, Term):
        return None
    if term.op == "arange" and isinstance(term.args[0], int):
        return term.args[0], 0
    if term.op in ("reshape", "expand", "cast") and (inner := _arange_axis(term.args[0])):
        sizes = shape(term) or ()
        wide = [d for d, s in enumerate(sizes) if s != 1]
        if len(wide) == 1 and sizes[wide[0]] == inner[0]:
            return inner[0], len(sizes) - 1 - wide[0]
    return None


def _mask_from_scatter(term: Term) -> Mask | None:
    """zeros(T, E).scatter(1, ids, 1): the mask summed over the choices (a repeated id is written once)."""
    base, dim, index, source = term.args
    if not isinstance(base, Term) or base.op != "zeros" or term.kwargs:
        return None
    if term.op == "scatter_add" and not (isinstance(source, Term) and source.op == "ones"):
        return None
    if term.op == "scatter" and source not in (1, 1.0, True):
        return None
    root, sizes, out = ids_root(index), shape(index), shape(base)
    if root is None or sizes is None or out is None or len(sizes) != 2 or dim != 1 or not isinstance(out[1], int):
        return None
    if not same_size(sizes[0], out[0]):
        return None
    if term.op == "scatter" and not ids_distinct(root):
        return None  # a repeated id is written once and would be counted once
    return Mask(root, index, (0, "E"), None, out[1], frozenset({1}), one_hot=True)


def _select(mask: Mask, dim: Arg, index: Arg) -> Mask | None:
    if not isinstance(dim, int):
        return None
    axis = mask.axes[dim]
    rest = (*mask.axes[:dim], *mask.axes[dim + 1 :])
    if axis == "E":
        return replace(mask, axes=rest, expert=index)
    if axis == "1" and index == 0:
        return replace(mask, axes=rest)
    return None


def _reshape_mask(mask: Mask, term: Term) -> Mask | None:
    """Unit dims put in or taken out; any other reshape of a mask is not followed."""
    sizes = shape(term)
    if sizes is None or not isinstance(term.args[0], Term):
        return None
    inner = shape(term.args[0])
    if inner is None:
        return None
    # pair the labelled dims in order; one that happens to have size one is kept only if the sizes agree
    labelled = [(a, s) for a, s in zip(mask.axes, inner) if a != "1"]
    axes: list[int | str] = []
    for s in sizes:
        if labelled and same_size(labelled[0][1], s):
            axes.append(labelled.pop(0)[0])
        elif s == 1:
            axes.append("1")
        else:
            return None
    return replace(mask, axes=tuple(axes)) if not labelled else None


def coordinate_of(term: Arg) -> Coordinate | None:
    """The coordinate an index vector is: one component of where(mask) or mask.nonzero()."""
    if not isinstance(term, Term):
        return None
    found: tuple[Mask | None, int] = None, 0
    if term.op == "item_of" and isinstance(term.args[0], Term) and isinstance(term.args[1], int):
        if term.args[0].op == "nonzero_tuple":
            found = mask_of(term.args[0].args[0]), term.args[1]
        elif term.args[0].op == "unbind" and term.args[0].args[1] == 1:
            found = _nonzero(term.args[0].args[0], term.args[1])
    elif term.op == "select" and term.args[1] == 1 and isinstance(term.args[2], int):
        found = _nonzero(term.args[0], term.args[2])
    elif term.op == "reshape" and isinstance(term.args[0], Term) and term.args[0].op in ("nonzero", "slice", "item_of"):
        inner = term.args[0]
        if inner.op == "item_of" and isinstance(inner.args[0], Term) and isinstance(inner.args[1], int):
            cut = inner.args[0]  # where(mask), as it is decomposed
            if cut.op == "split" and cut.args[1:] == (1, 1):
                found = _nonzero(cut.args[0], inner.args[1])
        elif (
            inner.op == "slice"
            and inner.args[1] == 1
            and isinstance(inner.args[2], int)
            and inner.args[3] == inner.args[2] + 1
        ):
            found = _nonzero(inner.args[0], inner.args[2])
        elif inner.op == "nonzero" and (mask := mask_of(inner.args[0])) and len(mask.axes) == 1:
            found = mask, 0
    mask, j = found
    if mask is None:
        return None
    axis = mask.axes[j] if -len(mask.axes) <= j < len(mask.axes) else None
    return Coordinate(mask, axis) if isinstance(axis, int) else None


def _nonzero(term: Arg, j: int) -> tuple[Mask | None, int]:
    return (mask_of(term.args[0]), j) if isinstance(term, Term) and term.op == "nonzero" else (None, 0)


def same_rows(a: Mask, b: Mask) -> bool:
    """Whether two masks are true for the same slots in the same order."""
    return a.root is b.root and same_expert(a.expert, b.expert) and _sizes_equal(a.ids, b.ids)


def same_expert(a: Arg, b: Arg) -> bool:
    """Whether two expert indices (constants or holes) are equal."""
    if isinstance(a, Term) and isinstance(b, Term) and a.op == b.op == "hole":
        return a is b or a.args[0].values == b.args[0].values
    return a is b or (not isinstance(a, Term) and not isinstance(b, Term) and a == b)


def _sizes_equal(a: Term, b: Term) -> bool:
    return same_shape(shape(a), shape(b))


# -- order and counts --------------------------------------------------------------------------------------------------


def sorted_order(term: Arg) -> Term | None:
    """The ids root when the term is a permutation of the slots that sorts their ids ascending: argsort(ids), sort(ids)[1]."""
    if isinstance(term, Term) and term.op == "item_of" and term.args[1] == 1 and isinstance(term.args[0], Term):
        source = term.args[0]
        if source.op == "sort" and source.args[2] is False and rank(source.args[0]) == 1:
            return ids_root(source.args[0])
    return None


def sorted_ids(term: Arg, order: Term) -> bool:
    """Whether the term is the ids in that sorted order: sort(ids)[0] or ids[order]."""
    if not isinstance(term, Term):
        return False
    if term.op == "cast" and _is_integer(term):
        return sorted_ids(term.args[0], order)
    if term.op == "item_of" and term.args[1] == 0:
        return order.op == "item_of" and order.args[0] is term.args[0]
    if term.op == "index" and len(term.args[1]) == 1 and term.args[1][0] is order:
        return ids_root(term.args[0]) is not None and ids_root(term.args[0]) is sorted_order(order)
    return False


def is_inverse(term: Arg, order: Arg) -> bool:
    """Whether one permutation is the inverse of the other: argsort of it, or a scatter of arange to its places."""
    if not isinstance(term, Term) or not isinstance(order, Term):
        return False
    if term.op == "item_of" and term.args[1] == 1 and isinstance(term.args[0], Term) and term.args[0].op == "sort":
        return term.args[0].args[0] is order and term.args[0].args[2] is False and rank(order) == 1
    if term.op == "index_put" and len(term.args[1]) == 1 and term.args[1][0] is order and not term.args[3]:
        return _counts_up(term.args[2], order) and rank(term) == 1 and _sizes_equal(term, order)
    if term.op == "scatter" and term.args[1] == 0 and term.args[2] is order:
        return _counts_up(term.args[3], order) and rank(term) == 1 and _sizes_equal(term, order)
    return False


def _counts_up(term: Arg, like: Term) -> bool:
    if isinstance(term, Term) and term.op == "cast" and _is_integer(term):
        term = term.args[0]
    if not isinstance(term, Term) or term.op != "arange":
        return False
    sizes, own = shape(like), shape(term)
    return sizes is not None and own is not None and same_size(sizes[0], own[0])


def token_of_order(term: Arg, order: Term) -> int | None:
    """K when the term is `order // K`: the token of each slot, for slots numbered (t, k)."""
    if isinstance(term, Term) and term.op == "floor_divide" and term.args[0] is order and isinstance(term.args[1], int):
        return term.args[1]
    if isinstance(term, Term) and term.op == "index" and len(term.args[1]) == 1 and term.args[1][0] is order:
        return token_of_slot(term.args[0])
    return None


def token_of_slot(term: Arg) -> int | None:
    """K when the term is [0, 0, .., 1, 1, ..], each token K times: the token of each slot in slot order."""
    if not isinstance(term, Term):
        return None
    if term.op == "repeat_interleave" and isinstance(term.args[1], int) and rank(term.args[0]) == 1:
        return term.args[1] if isinstance(term.args[0], Term) and term.args[0].op == "arange" else None
    if term.op == "floor_divide" and isinstance(term.args[0], Term) and term.args[0].op == "arange":
        return term.args[1] if isinstance(term.args[1], int) else None
    if term.op == "reshape" and isinstance(term.args[0], Term) and term.args[0].op == "expand":
        inner, sizes = term.args[0].args[0], shape(term.args[0])
        if isinstance(inner, Term) and inner.op == "reshape" and sizes and len(sizes) == 2 and rank(term) == 1:
            counted = inner.args[0]
            column = shape(inner)
            if (
                isinstance(counted, Term)
                and counted.op == "arange"
                and column
                and column[1] == 1
                and isinstance(sizes[1], int)
            ):
                return sizes[1]
    return None


def histogram_of(term: Arg) -> Histogram | None:
    """What a vector of counts counts."""
    if not isinstance(term, Term):
        return None
    op, args = term.op, term.args
    if op in ("cast", "to_device"):
        return histogram_of(args[0]) if dtype(term) in EXACT else None
    if op == "histc":
        source = args[0]
        exact = dtype(source) in (torch.float32, torch.float64, *WIDE)  # 16-bit floats round ids above 256
        source = source.args[0] if isinstance(source, Term) and source.op == "cast" and exact else source
        bins, low, high = args[1], args[2], args[3]
        if isinstance(bins, int) and low == 0 and high == bins - 1 and (root := _ids_in_any_order(source)):
            return Histogram(root, bins, True)
        return None
    if op == "bincount" and args[1] is None and isinstance(args[2], int):
        root = _ids_in_any_order(args[0])
        bound = ids_bound(root) if root is not None else None
        return Histogram(root, args[2], False) if root is not None and bound is not None and bound <= args[2] else None
    if op == "scatter_add" and isinstance(args[0], Term) and args[0].op == "zeros" and rank(args[0]) == 1:
        root, out = _ids_in_any_order(args[2]), shape(args[0])
        ones = isinstance(args[3], Term) and (
            args[3].op == "ones" or (args[3].op == "expand" and _is_ones(args[3].args[0]))
        )
        return Histogram(root, out[0], False) if root is not None and ones and out and isinstance(out[0], int) else None
    mask = mask_of(term)
    if mask is None or mask.axes != ("E",) or mask.num_experts is None:
        return None
    if mask.summed != frozenset(range(rank(mask.ids) or 0)) or not _counts(term):
        return None
    return Histogram(mask.root, mask.num_experts, not mask.one_hot)


def _is_ones(term: Arg) -> bool:
    return isinstance(term, Term) and term.op == "ones"


def _counts(term: Term) -> bool:
    """Whether every reduction on the way from the mask was a sum (any and comparisons lose the count)."""
    while term.op not in ("eq", "one_hot", "scatter", "scatter_add"):
        if term.op in ("sum", "cast") and dtype(term) not in EXACT:
            return False  # 16-bit floats round counts above 256, small integers wrap
        if term.op in ("any", "amax", "gt", "ne", "ge") or (term.op == "cast" and dtype(term) == torch.bool):
            return False
        term = term.args[0]
    return True


def _ids_in_any_order(term: Arg) -> Term | None:
    """The ids root, also behind a permutation of the slots: counting does not mind the order."""
    if isinstance(term, Term) and term.op == "item_of" and term.args[1] == 0 and isinstance(term.args[0], Term):
        if term.args[0].op == "sort":
            return ids_root(term.args[0].args[0])
    if isinstance(term, Term) and term.op == "index" and len(term.args[1]) == 1:
        order = term.args[1][0]
        if sorted_order(order) is not None and sorted_order(order) is ids_root(term.args[0]):
            return sorted_order(order)
    if isinstance(term, Term) and term.op == "reshape" and (inner := _ids_in_any_order(term.args[0])):
        return inner
    return ids_root(term)


def is_hit(term: Arg) -> Mask | None:
    """The mask when the vector says for each expert whether any slot has it."""
    if isinstance(term, Term) and term.op == "cast" and dtype(term) != torch.bool:
        return is_hit(term.args[0])
    mask = mask_of(term)
    if mask is None or mask.axes != ("E",) or mask.num_experts is None:
        return None
    return mask if mask.summed == frozenset(range(rank(mask.ids) or 0)) else None


def row_count_of(term: Arg) -> tuple[Term, Arg] | None:
    """(ids root, expert) when a number is zero exactly when that expert has no slot: a size, a count, or "any"."""
    if not isinstance(term, Term):
        return None
    if term.op == "item" or term.op == "cast":
        return row_count_of(term.args[0])
    if term.op in ("sym_size", "numel", "len"):
        source = term.args[0]
        if term.op == "sym_size" and term.args[1] != 0:
            return None
        if isinstance(source, Term) and source.op == "nonzero_tuple":
            return None
        if (found := coordinate_of(source)) is not None:
            return found.mask.root, found.mask.expert
        if (
            isinstance(source, Term)
            and source.op == "nonzero"
            and (mask := mask_of(source.args[0]))
            and mask.expert is not None
        ):
            return mask.root, mask.expert
        if isinstance(source, Term) and source.op == "index" and len(source.args[1]) >= 1:
            if (found := coordinate_of(source.args[1][0])) is not None:
                return found.mask.root, found.mask.expert
            mask = mask_of(source.args[1][0])
            return (mask.root, mask.expert) if mask and mask.expert is not None else None
        return None
    if term.op == "select" and (counted := histogram_of(term.args[0])):
        return counted.root, term.args[2]
    mask = mask_of(term)
    if mask is not None and mask.axes == () and mask.expert is not None:
        return mask.root, mask.expert
    return None


def count_of(term: Arg) -> tuple[Term, Arg] | None:
    """(ids root, expert) when a number is exactly how many slots that expert has."""
    while isinstance(term, Term) and (term.op == "item" or (term.op == "cast" and dtype(term) in EXACT)):
        term = term.args[0]
    if not isinstance(term, Term):
        return None
    if term.op == "select" and (counted := histogram_of(term.args[0])):
        return counted.root, term.args[2]
    mask = mask_of(term)
    if mask is None or mask.axes != () or mask.expert is None:
        return None
    return (mask.root, mask.expert) if mask.summed == frozenset(range(rank(mask.ids) or 0)) and _counts(term) else None


def in_range(term: Arg, num_experts: int) -> Term | None:
    """The ids root when the condition says that all ids are below `num_experts`: (ids < E).all()."""
    while isinstance(term, Term) and term.op in ("item", "cast", "all", "bool"):
        term = term.args[0]
    if (
        isinstance(term, Term)
        and term.op == "lt"
        and term.args[1] == num_experts
        and not isinstance(term.args[1], Term)
    ):
        return ids_root(term.args[0])
    return None
