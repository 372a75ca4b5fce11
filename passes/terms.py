"""Terms: the values of a graph, without spelling and without mutation.

An FX graph says how a value was computed; a `Term` says what it is. `x.view(-1)`, `torch.flatten(x)` and `x.reshape(n)` are one
term; `out.index_add_(0, i, y)` and `out[i] += y` are terms that name the value of `out` before. Pure terms are interned, so equal
values are one object and `is` compares them. Terms are what facts are proven about; the graph itself is only read here.

The operations with a canonical name and fixed arguments are those whose meaning detection needs (see `normalise`); all others
keep their own name and arguments, and mean what torch says they mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx

# An argument is a Term, a constant (number, string, None, dtype, slice, ...) or a tuple of these. Which stands where is fixed by
# the name of the operation, which a type checker cannot follow; hence the alias instead of a union that every reader would cast.
Arg = Any


@dataclass(frozen=True)
class Meta:
    """What is known of a tensor that no node of the graph holds: as much of a fake tensor as the passes read."""

    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def is_tensor(val: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor's."""
    return isinstance(val, (torch.Tensor, Meta))


@dataclass(eq=False)
class Term:
    """One value. `val` is its fake tensor or symbolic number where known; `nodes` are the FX nodes that hold it."""

    op: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    val: Any = None
    nodes: list[fx.Node] = field(default_factory=list)
    instances: tuple[Term, ...] | None = None  # for rolled terms: the E terms this one stands for

    @property
    def node(self) -> fx.Node | None:
        if self.nodes:
            return self.nodes[0]
        return self.instances[0].node if self.instances else None

    def __repr__(self) -> str:
        return self.show(3)

    def show(self, depth: int = 3) -> str:
        """A short text of the term, `depth` operations deep."""
        if depth == 0:
            return str(self.node) if self.node else f"{self.op}(…)"

        def arg(a: Arg) -> str:
            if isinstance(a, Term):
                return a.show(depth - 1)
            return "(" + ", ".join(map(arg, a)) + ")" if isinstance(a, tuple) else repr(a)

        return f"{self.op}({', '.join([arg(a) for a in self.args] + [f'{k}={arg(v)}' for k, v in self.kwargs])})"


@dataclass(frozen=True, eq=False)
class Hole:
    """What differs between the E instances of a rolled term: one entry for each instance, in the order of the instances."""

    values: tuple[Arg, ...]


class Interner:
    """Makes equal pure terms one object."""

    def __init__(self) -> None:
        self._known: dict[object, Term] = {}

    def make(
        self,
        op: str,
        args: tuple[Arg, ...],
        kwargs: tuple[tuple[str, Arg], ...] = (),
        val: object = None,
        mode: Hashable = None,
    ) -> Term:
        """The term for `op(*args, **kwargs)` under `mode`; `val` is kept from the first that had one."""
        key = (op, tuple(map(_key, args)), tuple((k, _key(v)) for k, v in kwargs), mode)
        term = self._known.get(key)
        if term is None:
            term = self._known[key] = Term(op, args, kwargs, val)
        elif term.val is None or (isinstance(term.val, Meta) and val is not None):
            term.val = val
        return term


def _key(arg: Arg) -> object:
    # 1, 1.0 and True are equal in Python and differ in meaning (dtype promotion, one_hot), so the type is part of the key.
    if isinstance(arg, (Term, Hole)):
        return ("term", id(arg))
    if isinstance(arg, tuple):
        return tuple(map(_key, arg))
    if isinstance(arg, slice):
        return ("slice", _key(arg.start), _key(arg.stop), _key(arg.step))
    return (type(arg), arg if arg == arg else "nan")


def children(term: Term) -> list[Term]:
    """The terms among the arguments, nested tuples and slices included."""
    found: list[Term] = []

    def visit(arg: Arg) -> None:
        if isinstance(arg, Term):
            found.append(arg)
        elif isinstance(arg, tuple):
            for a in arg:
                visit(a)
        elif isinstance(arg, slice):
            for a in (arg.start, arg.stop, arg.step):
                visit(a)

    for a in (*term.args, *(v for _, v in term.kwargs)):
        visit(a)
    return found


def shape(term: Arg) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a tensor term, None where it is not known."""
    return tuple(term.val.shape) if isinstance(term, Term) and is_tensor(term.val) else None


def rank(term: Arg) -> int | None:
    """The number of dimensions of a tensor term, None where it is not known."""
    known = shape(term)
    return None if known is None else len(known)


def dtype(term: Arg) -> torch.dtype | None:
    """The dtype of a tensor term, None where it is not known."""
    return term.val.dtype if isinstance(term, Term) and is_tensor(term.val) else None


def same_size(a: object, b: object) -> bool:
    """Whether two sizes (ints, symbols or products of them) are known to be equal. Nothing is guarded on."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    difference = left - right  # type: ignore[operator]
    return bool(difference.expand() == 0) if hasattr(difference, "expand") else difference == 0


def same_shape(a: Sequence[object] | None, b: Sequence[object] | None) -> bool:
    """Whether two shapes are known, and known to be equal."""
    return a is not None and b is not None and len(a) == len(b) and all(map(same_size, a, b))


def numel(sizes: tuple[int | torch.SymInt, ...]) -> Any:
    """The product of sizes as an int or a sympy expression, without guards."""
    total: Any = 1
    for s in sizes:
        total = total * (s.node.expr if isinstance(s, torch.SymInt) else s)
    return total


def location(node: fx.Node | None) -> str:
    """ "file:line" of the user's code that made the node: the innermost frame outside torch. Empty when unknown."""
    trace = node.stack_trace if node is not None else None
    if not trace:
        return ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for line in reversed(frames):
        path, _, rest = line[5:].partition(", line ")
        path = path.strip('"')
        if f"torch{'/'}" in path.rsplit("site-packages/", 1)[-1][:6] and "site-packages/" in path:
            continue
        return f"{path}:{rest.split(',')[0]}"
    return ""
