"""normalise: an FX graph becomes terms. Reads the graph, never edits it.

Three kinds of difference in spelling end here: the name (`call_method`, `torch.`, `F.`, `operator.`, `aten.`), the arguments
(positional, keyword, negative dims, `x[i, None]`), and mutation (`+=`, `index_add_`, `masked_fill_`, `x[i] = y`): a write makes
a new value for the buffer, and from then on every read of the buffer is a read of that value. A write through one view makes
every *other* view of the same buffer an unknown value: a doubt, not a guess.

Not handled, and therefore unknown ("opaque"): calls of functions that are not torch's, writes through views, higher-order ops.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import fx

from moec.fx import ambient_states, is_sharded
from moec.fx import value as fake_value
from moec.passes.spelling import (
    CASTS,
    FRESH,
    IDENTITIES,
    SIGNATURES,
    SYNONYMS,
    VIEWS,
    asks_in_place,
    canonical_name,
    hidden_writes,
    is_pure_helper,
    is_random,
    may_alias,
)
from moec.passes.terms import Arg, Interner, Meta, Term, is_tensor


class Values:
    """The terms of one graph.

    `of[node]` is the value of a node where it is defined; `reads[user, node]` what `user` reads when it reads `node` (they
    differ after a write); `storage[node]` names the buffer a node may be a view of, `writes[buffer]` the nodes that write it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._intern = Interner().make
        self._states = ambient_states(graph)
        self._grad = torch.is_grad_enabled()
        self._at: fx.Node | None = None
        self.of: dict[fx.Node, Arg] = {}
        self.reads: dict[tuple[fx.Node, fx.Node], Arg] = {}
        self.storage: dict[fx.Node, fx.Node] = {}
        self.view_of: dict[fx.Node, fx.Node | None] = {}
        self.members: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.writes: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.written_at: dict[Term, fx.Node] = {}
        self.position: dict[fx.Node, int] = {}
        self._now: dict[fx.Node, Arg] = {}
        self._same: dict[fx.Node, fx.Node] = {}  # result of an in-place call -> the node it was called on
        self._sharded: dict[object, Term] = {}
        for i, node in enumerate(graph.nodes):
            self.position[node] = i
            self._at = node
            self._visit(node)

    def make(
        self, op: str, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...] = (), val: object = None
    ) -> Term:
        """The term for `op(*args, **kwargs)`: one for all equal ones of the same dtype, grad mode and autocast mode."""
        if not is_tensor(val):
            return self._intern(
                op, args, kwargs, val, self._states[self._at] if val is None and self._at is not None else None
            )
        state = self._states[self._at] if val.is_floating_point() and self._at is not None else None
        return self._intern(op, args, kwargs, val, (val.dtype, state))

    def holds(self, term: Term, at: fx.Node) -> fx.Node | None:
        """A node that holds `term` when read just after node `at`: defined by then, and its buffer not written in between."""
        limit = self.position[at]
        for node in term.nodes:
            start = self.position.get(node, limit + 1)
            if start > limit or self.of.get(node) is not term:
                continue
            if not any(start < self.position[w] <= limit for w in self.writes[self.storage[node]]):
                return node
        return None

    # -- one node ------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        for arg in node.all_input_nodes:
            self.reads[node, arg] = self._now[arg]
        if node.op in ("placeholder", "get_attr"):
            value: Arg = Term(node.op, (str(node.target),), (), _val(node))
            self._define(node, value, None)
        elif node.op == "output":
            return
        elif is_sharded(node):  # a parameter, however often it is read
            key = (node.target, node.args[0])
            if key not in self._sharded:
                self._sharded[key] = Term("placeholder", (str(node.args[0]),), (), _val(node))
            self._define(node, self._sharded[key], None)
        elif node.op in ("call_function", "call_method"):
            self._call(node)
        else:
            self._define(node, self._opaque(node), None)
            if not (node.op == "call_module" and node.target == "_guards_fn"):  # of torch.export: it checks its inputs
                self._written_by_stranger(node)

    def _written_by_stranger(self, node: fx.Node) -> None:
        """A function we know nothing about may write to what it is given."""
        for arg in node.all_input_nodes:
            if is_tensor(_val(arg)):
                self._write(node, arg, self._opaque(arg))

    def _call(self, node: fx.Node) -> None:
        name, writes, known = canonical_name(node)
        args = tuple(self._arg(a) for a in node.args)
        if name in ("getitem", "setitem") and isinstance(node.args[1], list):
            args = (args[0], (args[1],), *args[2:])  # x[[0, 2]] indexes with a list, x[0, 2] with two numbers
        kwargs = {k: self._arg(v) for k, v in node.kwargs.items()}
        if not known:
            self._define(node, self._opaque(node), None)
            if not is_pure_helper(node.target):
                self._written_by_stranger(node)
            return
        if name == "setitem":
            target = node.args[0]
            assert isinstance(target, fx.Node)
            self._write(node, target, self._setitem(args[0], args[1], args[2], _val(target)))
            self._define(node, None, None)
            return
        if self._stops_gradient(node, name) and args and isinstance(args[0], Term):
            args = (self.make("detach", (args[0],), (), args[0].val), *args[1:])
        target = node.args[0] if node.args else node.kwargs.get("input")
        if "out" in kwargs:
            self._define(node, self._opaque(node), None)
            out = node.kwargs["out"]
            if isinstance(out, fx.Node):
                self._write(node, out, self._opaque(node))
            return
        for written in hidden_writes(node, name):
            self._write(node, written, self._opaque(written))
        in_place = asks_in_place(node)
        kwargs.pop("inplace", None)
        if in_place:
            writes = True
            args = tuple(a for a in args if a is not True)
        value = self._build(name, args, kwargs, node)
        before = _val(target)
        if writes and isinstance(target, fx.Node) and is_tensor(before):
            if isinstance(value, Term):
                value = self._cast(value, before.dtype, before)
            self._write(node, target, value)
            self._define(node, value, target)
            self._same[node] = self._same.get(target, target)
            return
        if writes and not isinstance(target, fx.Node):
            self._written_by_stranger(node)
        aliased = isinstance(target, fx.Node) and may_alias(node, name) and not _copies(name, args, target, node)
        self._define(node, value, target if aliased and isinstance(target, fx.Node) else None)

    def _stops_gradient(self, node: fx.Node, name: str) -> bool:
        """Whether a view or copy of a value is made under no_grad, in a graph that is not: then it is not the value itself."""
        if (
            self._states[node].grad
            or not self._grad
            or not (name in IDENTITIES or name in VIEWS or name.endswith("dropout"))
        ):
            return False
        x = _val(node.args[0]) if node.args else None
        return is_tensor(x) and x.is_floating_point() and getattr(x, "requires_grad", True)

    def _define(self, node: fx.Node, value: Arg, alias_of: fx.Node | None) -> None:
        if isinstance(value, Term):
            if value.val is None:
                value.val = _val(node)
            value.nodes.append(node)
        self.of[node] = self._now[node] = value
        self.view_of[node] = alias_of
        self.storage[node] = self.storage[alias_of] if alias_of is not None else node
        self.members[self.storage[node]].append(node)

    def _write(self, writer: fx.Node, target: fx.Node, value: Arg) -> None:
        buffer = self.storage[target]
        self.writes[buffer].append(writer)
        if isinstance(value, Term):
            self.written_at[value] = writer
        written = self._same.get(target, target)
        for member in self.members[buffer]:
            # the results of earlier writes are the target itself; any other possible view of the buffer is no longer known
            whole = self._same.get(member, member) is written
            self._now[member] = value if whole else self._opaque(member)

    def _opaque(self, node: fx.Node) -> Term:
        return Term("opaque", (str(node.target), node.name), (), _val(node))

    def _arg(self, arg: object) -> Arg:
        if isinstance(arg, fx.Node):
            return self._now[arg]
        if isinstance(arg, (tuple, list)):
            return tuple(self._arg(a) for a in arg)
        if isinstance(arg, slice):
            return slice(self._arg(arg.start), self._arg(arg.stop), self._arg(arg.step))
        return arg

    # -- canonical arguments -------------------------------------------------------------------------------------------

    def _build(self, name: str, args: tuple[Arg, ...], kwargs: dict[str, Arg], node: fx.Node) -> Arg:
        val = _val(node)
        make = self.make
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if "self" in kwargs:
            args = (kwargs.pop("self"), *args)
        x = args[0] if args else None
        if name in IDENTITIES:
            return x
        if name in CASTS:
            return self._cast(x, val.dtype, val) if is_tensor(val) else self._opaque(node)
        if name == "detach":
            return x if is_tensor(val) and not val.is_floating_point() else make("detach", (x,), (), val)
        if name == "reshape":
            return self._reshape(x, val)
        if name == "zeros" and is_tensor(val):  # not interned: two buffers are two values, whatever is written to them
            return Term(name, (tuple(map(_size, val.shape)), val.dtype, str(val.device)), (), val)
        if name == "ones" and is_tensor(val):
            return make(name, (tuple(map(_size, val.shape)), val.dtype, str(val.device)), (), val)
        if name in ("full", "new_full", "full_like") and is_tensor(val):
            fill = kwargs.get("fill_value", args[1] if len(args) > 1 else None)
            if fill == 0 and not isinstance(fill, Term):
                return Term("zeros", (tuple(map(_size, val.shape)), val.dtype, str(val.device)), (), val)
            return Term("full", (tuple(map(_size, val.shape)), val.dtype, str(val.device), fill), (), val)
        if (
            name in FRESH
            or is_random(name)
            and not name.endswith("dropout")
            or (name.endswith("dropout") and not _is_no_dropout(args, kwargs))
        ):
            return Term(name, args, tuple(sorted(kwargs.items())), val)
        if name.endswith("dropout"):
            return x
        if name == "getitem":
            return self._getitem(x, args[1], val)
        if name in ("t", "T", "mT"):
            if isinstance(x, Term) and is_tensor(x.val):
                return self._permute(x, (*range(x.val.ndim - 2), -1, -2), val) if x.val.ndim >= 2 else x
        if name == "transpose":
            x, a, b = self._bind(name, args, kwargs)
            if is_tensor(val):
                order = list(range(val.ndim))
                order[a], order[b] = order[b], order[a]
                return self._permute(x, tuple(order), val)
        if name == "einsum":
            operands = args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:]
            return make("einsum", (x, operands), (), val)
        if name == "repeat":
            sizes = kwargs.get("repeats", args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:])
            return make("repeat", (x, sizes), (), val)
        if name == "permute":
            dims = kwargs.get("dims", args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:])
            return self._permute(x, dims, val)
        if name == "where" and len(args) == 1 and not kwargs:
            return make("nonzero_tuple", (x,), (), None)
        if name == "scalar_tensor" and isinstance(x, (int, float)):
            return make("scalar_tensor", (x,), (), val)
        if name == "where" and len(args) == 3:  # where(mask, c, x) is how masked_fill is decomposed
            mask, filled, kept = args
            if (
                isinstance(filled, Term)
                and filled.op == "scalar_tensor"
                and isinstance(kept, Term)
                and is_tensor(kept.val)
            ):
                if is_tensor(val) and kept.val.dtype == val.dtype and _same_shape(kept.val.shape, val.shape):
                    return make("masked_fill", (kept, mask, filled.args[0]), (), val)
        if name == "nonzero":
            x, as_tuple = self._bind(name, args, kwargs)
            return make("nonzero_tuple" if as_tuple else "nonzero", (x,), (), None if as_tuple else val)
        if name == "argsort":
            x, dim, descending, _ = self._bind(name, args, kwargs)
            return make("item_of", (make("sort", (x, _positive(dim, x), descending)), 1), (), val)
        if name == "sort":
            x, dim, descending, _ = self._bind(name, args, kwargs)
            return make("sort", (x, _positive(dim, x), descending))
        if name in ("size", "sym_size"):
            bound = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if bound is not None:
                return make("sym_size", (x, _positive(bound, x)), (), val)
        if name in ("index", "index_select"):
            if name == "index":  # ATen's: None is a whole dim there, not a new axis
                return self._index(x, tuple(slice(None) if i is None else i for i in args[1]), val)
            x, dim, index = self._bind(name, args, kwargs)
            return self._index(x, (*(slice(None),) * _positive(dim, x), index), val)
        if name in ("floor_divide", "div"):
            mode = kwargs.pop("rounding_mode", None)
            if name == "floor_divide" or mode == "floor" or (mode == "trunc" and _counts(x)):
                return make("floor_divide", args[:2], (), val)
            return make("div", args[:2], (("rounding_mode", mode),) if mode else (), val)
        if name == "expand" or name == "expand_as":
            return make("expand", (x, tuple(map(_size, val.shape))), (), val) if is_tensor(val) else self._opaque(node)
        if name == "clamp_max":
            return make("clamp", (x, None, kwargs.get("max", args[1] if len(args) > 1 else None)), (), val)
        if name == "clamp_min":
            return make("clamp", (x, kwargs.get("min", args[1] if len(args) > 1 else None), None), (), val)
        if name == "arange" and is_tensor(val):
            start = kwargs.get("start", args[0] if len(args) > 1 or "end" in kwargs else 0)
            step = args[2] if len(args) > 2 else kwargs.get("step", 1)
            if start == 0 and step == 1 and not isinstance(start, Term):
                return make("arange", (_size(val.shape[0]), val.dtype), (), val)
            return make("arange_from", args, tuple(sorted(kwargs.items())), val)
        if name in SIGNATURES:
            try:
                bound = self._bind(name, args, kwargs)
            except _Unbound:
                return make(name, args, tuple(sorted(kwargs.items())), val)
            return self._bound(name, bound, val)
        return make(name, args, tuple(sorted(kwargs.items())), val)

    def _bound(self, name: str, args: tuple[Arg, ...], val: object) -> Arg:
        x = args[0]
        if name == "unsqueeze":
            return self._reshape(x, val, "unsqueeze", (_positive(args[1], val),))
        if name == "squeeze":
            return self._reshape(x, val)
        if name == "select":
            return self.make("select", (x, _positive(args[1], x), args[2]), (), val)
        if (
            name == "slice"
            and args[2] in (None, 0)
            and (args[3] is None or args[3] == 2**63 - 1)
            and args[4] in (None, 1)
        ):
            return x
        if (
            name == "slice"
            and isinstance(x, Term)
            and is_tensor(x.val)
            and is_tensor(val)
            and isinstance(args[1], int)
            and _takes_one(args, x.val.shape[args[1]])
        ):
            dim = _positive(args[1], x)
            kept = (*x.val.shape[:dim], *x.val.shape[dim + 1 :])
            one = self.make("select", (x, dim, args[2]), (), Meta(kept, x.val.dtype, x.val.device))
            return self._reshape(one, val)
        if name == "narrow":
            start, length = args[2], args[3]
            if isinstance(start, int) and isinstance(length, int) and start >= 0:
                return self.make("slice", (x, _positive(args[1], x), start, start + length, 1), (), val)
        if name in (
            "slice",
            "chunk",
            "split",
            "unbind",
            "cumsum",
            "index_add",
            "scatter",
            "scatter_add",
            "gather",
            "topk",
            "cat",
        ):
            position = {"chunk": 2, "split": 2, "topk": 2}.get(name, 1)
            of = args[0][0] if name == "cat" and isinstance(args[0], tuple) and args[0] else x
            args = (*args[:position], _positive(args[position], of), *args[position + 1 :])
        if name == "stack":
            args = (x, _positive(args[1], val))
        if name == "index_put" and isinstance(args[1], tuple):
            kept = tuple("whole" if i is None else i for i in args[1])
            while kept and kept[-1] == "whole":
                kept = kept[:-1]
            args = (x, kept, *args[2:])
        if name == "scatter" and isinstance(args[3], Term) and args[3].op == "ones":
            args = (*args[:3], 1)
        if name in ("sum", "any", "mean", "amax") and isinstance(args[1], (int, tuple)):
            dims = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (x, tuple(sorted(_positive(d, x) for d in dims)), *args[2:])
        if name == "addmm" and args[3] == 1 and args[4] == 1:
            return self.make("linear", (args[1], self._transposed(args[2]), args[0]), (), val)
        return self.make(name, args, (), val)

    def _bind(self, name: str, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> tuple[Arg, ...]:
        names = SIGNATURES[name]
        bound = dict(zip((n for n, _ in names), args))
        for key, value in kwargs.items():
            if key not in dict(names):
                key = SYNONYMS.get(key, key)
            if key not in dict(names) or key in bound:
                raise _Unbound(name)
            bound[key] = value
        if len(args) > len(names) or any(n not in bound and d is ... for n, d in names):
            raise _Unbound(name)
        return tuple(bound.get(n, d) for n, d in names)

    def _cast(self, x: Arg, dtype: torch.dtype, val: object) -> Arg:
        if isinstance(x, Term) and is_tensor(x.val):
            if x.val.dtype == dtype and (not is_tensor(val) or x.val.device == val.device):
                return x
            if is_tensor(val) and x.val.device != val.device:
                return self.make("to_device", (x, dtype, str(val.device)), (), val)
        return self.make("cast", (x, dtype), (), val)

    def _reshape(self, x: Arg, val: object, op: str = "reshape", extra: tuple[Arg, ...] = ()) -> Arg:
        if not is_tensor(val):
            return self.make(op, (x, *extra), (), val)
        if isinstance(x, Term) and x.op in ("reshape", "unsqueeze"):
            x = x.args[0]
        if isinstance(x, Term) and is_tensor(x.val) and _same_shape(x.val.shape, val.shape):
            return x
        return self.make("reshape", (x, tuple(map(_size, val.shape))), (), val)

    def _permute(self, x: Arg, dims: tuple[int, ...], val: object) -> Arg:
        n = len(dims)
        dims = tuple(d % n for d in dims)
        if isinstance(x, Term) and x.op == "permute":
            x, dims = x.args[0], tuple(x.args[1][d] for d in dims)
        return x if dims == tuple(range(n)) else self.make("permute", (x, dims), (), val)

    def _transposed(self, x: Arg) -> Arg:
        val = x.val.transpose(-1, -2) if isinstance(x, Term) and is_tensor(x.val) else None
        n = val.ndim if val is not None else 2
        return self._permute(x, (*range(n - 2), n - 1, n - 2), val)

    # -- indexing ------------------------------------------------------------------------------------------------------

    def _getitem(self, x: Arg, index: Arg, val: object) -> Arg:
        if not (isinstance(x, Term) and is_tensor(x.val)):
            if isinstance(x, Term) and x.op == "unbind" and isinstance(index, int):
                return self.make("select", (*x.args, index), (), val)
            return self.make("item_of", (x, index), (), val)
        index = index if isinstance(index, tuple) else (index,)
        spent = sum(1 for i in index if i is not None and i is not ...)
        if any(_is_bool_mask(i) for i in index):
            spent += sum(i.val.ndim - 1 for i in index if _is_bool_mask(i))
        fill = (slice(None),) * (x.val.ndim - spent)
        at = next((k for k, i in enumerate(index) if i is ...), None)
        index = (*index[:at], *fill, *index[at + 1 :]) if at is not None else (*index, *fill)
        basic = all(i is None or isinstance(i, (int, slice)) or _is_scalar_number(i) for i in index)
        return self._basic_index(x, index, val) if basic else self._index(x, index, val)

    def _basic_index(self, x: Term, index: tuple[Arg, ...], val: object) -> Arg:
        dim, inner, needs_reshape = 0, x, False
        sizes: list[object] = list(x.val.shape)  # None where a slice has bounds that are computed
        for i in index:
            if i is None:
                needs_reshape = True
            elif isinstance(i, slice) and not _takes_one((x, dim, i.start, i.stop, i.step), sizes[dim]):
                if not (i.start in (None, 0) and i.stop is None and i.step in (None, 1)):
                    inner = self.make("slice", (inner, dim, i.start, i.stop, i.step or 1))
                    sizes[dim] = None
                dim += 1
            else:
                needs_reshape = needs_reshape or isinstance(i, slice)
                del sizes[dim]
                known = None if None in sizes else Meta(tuple(sizes), x.val.dtype, x.val.device)  # type: ignore[arg-type]
                inner = self.make("select", (inner, dim, i.start if isinstance(i, slice) else i), (), known)
        if inner is x and not needs_reshape:
            return x
        if not needs_reshape:
            if inner.val is None:
                inner.val = val
            return inner
        return self.make("reshape", (inner, tuple(map(_size, val.shape))), (), val) if is_tensor(val) else inner

    def _index(self, x: Arg, index: Arg, val: object) -> Arg:
        """Advanced indexing: `index(x, entries)`, entries are None for a whole dim, a tensor term, or an int.

        New axes (`x[i, None]`) become a reshape around the index; slices with bounds stay inside it.
        """
        index = index if isinstance(index, tuple) else (index,)
        kept = tuple(
            ("whole" if isinstance(i, slice) and i == slice(None) else i)
            for i in index
            if i is not None or not isinstance(x, Term)
        )
        while kept and kept[-1] == "whole":
            kept = kept[:-1]
        if (
            len(kept) > 1
            and kept[0] == "whole"
            and isinstance(x, Term)
            and is_tensor(x.val)
            and x.val.shape[0] == 1
            and is_tensor(val)
        ):
            below = self._reshape(
                x, Meta(tuple(x.val.shape[1:]), x.val.dtype, x.val.device)
            )  # a unit dim in front, left alone
            return self._reshape(
                self._index(below, kept_as_index(kept[1:]), Meta(tuple(val.shape[1:]), val.dtype, val.device)), val
            )
        inner = _without_unit_tail(x)
        if inner is not None and len(kept) <= inner.val.ndim and is_tensor(val) and not any(i is None for i in index):
            tail = x.val.ndim - inner.val.ndim
            below = Meta(tuple(val.shape[: len(val.shape) - tail]), val.dtype, val.device)
            return self._reshape(self._index(inner, kept_as_index(kept), below), val)
        inner_val = _without_new_axes(val, index) if any(i is None for i in index) else val
        inner = self.make("index", (x, kept), (), inner_val)
        if any(i is None for i in index) and is_tensor(val):
            # where the new axes go follows torch's rules; the value that torch computed tells
            return (
                self.make("reshape", (inner, tuple(map(_size, val.shape))), (), val)
                if _new_axes_only_reshape(index)
                else self.make("index_new_axes", (x, index), (), val)
            )
        return inner

    def _setitem(self, x: Arg, index: Arg, source: Arg, val: object) -> Arg:
        index = index if isinstance(index, tuple) else (index,)
        advanced = any(isinstance(i, Term) and is_tensor(i.val) for i in index)
        if advanced and not any(i is None or i is ... for i in index):
            kept = tuple("whole" if isinstance(i, slice) and i == slice(None) else i for i in index)
            while kept and kept[-1] == "whole":
                kept = kept[:-1]
            return self.make("index_put", (x, kept, source, False), (), val)
        return self.make("setitem", (x, index, source), (), val)


class _Unbound(Exception):
    """The arguments do not fit the signature we know; the term keeps them as they are."""


def _val(node: object) -> object:
    if not isinstance(node, fx.Node):
        return None
    return fake_value(node)


def _size(s: object) -> object:
    return s if isinstance(s, int) else str(s)


def _same_shape(a: torch.Size, b: torch.Size) -> bool:
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))


def _positive(dim: Arg, of: object) -> Arg:
    val = of.val if isinstance(of, Term) else of
    return dim % max(val.ndim, 1) if isinstance(dim, int) and is_tensor(val) else dim


def _is_scalar_number(i: Arg) -> bool:
    return isinstance(i, Term) and not is_tensor(i.val) and i.val is not None


def _is_bool_mask(i: Arg) -> bool:
    return isinstance(i, Term) and is_tensor(i.val) and i.val.dtype in (torch.bool, torch.uint8)


def _new_axes_only_reshape(index: tuple[Arg, ...]) -> bool:
    """Whether `x[index]` is `x[index without None]` with unit axes put in: true when the advanced entries are adjacent."""
    kinds = ["a" if isinstance(i, Term) or isinstance(i, (int, tuple)) else "n" if i is None else "s" for i in index]
    text = "".join(kinds)
    first, last = text.find("a"), text.rfind("a")
    return first >= 0 and "s" not in text[first:last] and "n" not in text[first:last]


def _counts(x: Arg) -> bool:
    """Whether a term is made of indices, which are not negative: rounding down and towards zero are the same."""
    if isinstance(x, Term) and x.op == "item_of" and isinstance(x.args[0], Term):
        return x.args[1] == 1 and x.args[0].op in ("sort", "topk")
    return isinstance(x, Term) and x.op == "arange"


def _takes_one(args: tuple[Arg, ...], size: object) -> bool:
    """Whether a slice (x, dim, start, end, step) of a dim of that size is one entry, surely inside the dim."""
    _, _, start, end, step = args
    known = isinstance(size, int) and isinstance(start, int) and isinstance(end, int)
    return known and step in (1, None) and end == start + 1 and 0 <= start < size


def _without_unit_tail(x: Arg) -> Term | None:
    """The tensor before unit dims were appended to it, None when there are none."""
    if not (isinstance(x, Term) and x.op == "reshape" and isinstance(x.args[0], Term)):
        return None
    inner = x.args[0]
    if not (is_tensor(x.val) and is_tensor(inner.val)) or inner.val.ndim >= x.val.ndim:
        return None
    n = inner.val.ndim
    return (
        inner
        if _same_shape(x.val.shape[:n], inner.val.shape) and all(s == 1 for s in map(_size, x.val.shape[n:]))
        else None
    )


def kept_as_index(kept: tuple[Arg, ...]) -> tuple[Arg, ...]:
    """Canonical entries as an index again."""
    return tuple(slice(None) if k == "whole" and isinstance(k, str) else k for k in kept)


def _without_new_axes(val: object, index: tuple[Arg, ...]) -> object:
    """The fake result of `x[index]` with the unit axes of its `None` entries taken off."""
    if not is_tensor(val) or not _new_axes_only_reshape(index):
        return None
    ranks = [i.val.ndim for i in index if isinstance(i, Term) and is_tensor(i.val) and not _is_bool_mask(i)]
    block, dim, placed = max(ranks, default=1), 0, False
    drop = []
    for i in index:
        if i is None:
            drop.append(dim)
            dim += 1
        elif isinstance(i, slice):
            dim += 1
        elif not placed:
            dim, placed = dim + block, True
    return Meta(tuple(s for d, s in enumerate(val.shape) if d not in drop), val.dtype, val.device)


def _copies(name: str, args: tuple[Arg, ...], target: fx.Node, node: fx.Node) -> bool:
    """Whether an operation that can return a view returns memory of its own here."""
    before, after = _val(target), _val(node)
    if name == "getitem" and is_tensor(before):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, tuple) or (isinstance(i, Term) and is_tensor(i.val)) for i in index)
    if name == "getitem":  # one of several results: a view only if the results are views
        return (
            not may_alias(target, canonical_name(target)[0]) if target.op in ("call_function", "call_method") else False
        )
    if name in CASTS and is_tensor(before) and is_tensor(after):
        return before.dtype != after.dtype or before.device != after.device
    return False


def _is_no_dropout(args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return training is False or p == 0 or (isinstance(p, float) and math.isclose(p, 0.0))
