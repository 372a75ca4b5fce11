"""Reading one Dynamo graph backwards: is this number a count, does this tensor list the experts that were hit?

Names are compared rather than callables, since `x.sum()`, `torch.sum(x)` and `operator` forms say the same. Both answers only
decide what is *assumed*; that the assumption is right is proven elsewhere, or the frame is traced again.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,assignment"
from __future__ import annotations

import torch
from torch import fx

# Keep the numbers, change how they are held.
_CARRIERS = frozenset(
    "item tolist getitem select squeeze unsqueeze view reshape flatten ravel to long int cpu cuda type contiguous clone "
    "detach unbind sym_int index_select numpy".split()
)
_COUNTERS = frozenset(
    "bincount histc scatter_add index_add sum count_nonzero size numel nelement sym_size shape __len__ len".split()
)
_COUNTING_WRITES = frozenset("scatter_ scatter_add_ index_add_ index_put_ scatter_reduce_".split())
# Keep one row per hit expert, in order.
_SAME_ROWS = frozenset(
    "squeeze flatten view reshape ravel to long int cpu cuda type contiguous clone detach getitem select".split()
)
# Hold the same values, maybe elsewhere or fewer of them.
_SAME_VALUES = _SAME_ROWS | {"t", "permute", "transpose", "unsqueeze", "unbind", "expand"}


def name_of(node: object) -> str:
    """The bare operation name of a graph node, "" for anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def operands(node: fx.Node) -> tuple[object, ...]:
    return (*node.args, *node.kwargs.values())


def value_of(node: fx.Node) -> object:
    return node.meta.get("example_value")


def is_count(node: object) -> bool:
    """Whether `node` holds numbers of things: sizes, histograms, sums of masks, and what carries or adds these."""
    if isinstance(node, int):
        return True
    if not isinstance(node, fx.Node):
        return False
    name, value = name_of(node), value_of(node)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return False
    if name in _COUNTERS or any(name_of(user) in _COUNTING_WRITES and user.args[0] is node for user in node.users):
        return True
    if name in ("add", "mul"):
        return all(map(is_count, node.args))
    if name == "getattr":
        return node.args[1] == "shape"
    if name == "getitem" and name_of(node.args[0]) == "unique_consecutive":
        return True
    return name in _CARRIERS and is_count(node.args[0])


def hit_vector(rows: fx.Node) -> fx.Node | None:
    """The vector `hit` [E] if `rows` is `hit.nonzero()` in some spelling ([n, 1] or [n], one row per hit expert)."""
    value = value_of(rows)
    if not isinstance(value, torch.Tensor) or value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[1] != 1):
        return None
    if value.is_floating_point() or not isinstance(value.shape[0], torch.SymInt):
        return None
    count, node = value.shape[0], rows
    while isinstance(node, fx.Node):
        held = value_of(node)
        if isinstance(held, torch.Tensor) and (held.dim() == 0 or not _same(held.shape[0], count)):
            return None
        name = name_of(node)
        if name == "nonzero" or (name == "where" and len(operands(node)) == 1):
            hit = node.args[0]
            vector = value_of(hit)
            fixed = isinstance(vector, torch.Tensor) and vector.dim() == 1 and isinstance(vector.shape[0], int)
            return hit if fixed else None
        if name not in _SAME_ROWS or (name == "getitem" and not _is_plain_index(node.args[1])):
            return None
        node = node.args[0]
    return None


def id_range(ids: fx.Node) -> int | None:
    """E if all of `ids` are positions of a topk (argmax, argsort, sort) along a dimension of static size E; None if unknown."""
    node = ids
    while isinstance(node, fx.Node):
        name = name_of(node)
        if name in ("argmax", "argmin", "argsort"):
            return _static_size(node)
        if name in ("getitem", "getattr") and name_of(node.args[0]) in ("topk", "sort", "max", "min"):
            return _static_size(node.args[0]) if node.args[1] in (1, "indices") else None
        if name not in _SAME_VALUES:
            return None
        node = node.args[0]
    return None


def _static_size(chosen: fx.Node) -> int | None:
    """The size of the dimension that topk, sort and the like choose along."""
    position = 2 if name_of(chosen) == "topk" else 1
    default = None if name_of(chosen) in ("argmax", "argmin", "max", "min") else -1
    dim = chosen.kwargs.get("dim", chosen.args[position] if len(chosen.args) > position else default)
    scores = value_of(chosen.args[0]) if isinstance(chosen.args[0], fx.Node) else None
    if not isinstance(dim, int) or not isinstance(scores, torch.Tensor):
        return None
    size = scores.shape[dim]
    return size if isinstance(size, int) else None


def _is_plain_index(index: object) -> bool:
    """Built of slices, numbers and None, so that rows keep their order."""
    return all(i is None or isinstance(i, (int, slice)) for i in (index if isinstance(index, tuple) else (index,)))


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.expr == b.node.expr
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b
