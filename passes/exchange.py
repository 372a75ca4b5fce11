"""exchange: a rewritten layer whose experts are spread over ranks sends its tokens to them and gets the sums back.

    route(ids, E)                                slots = assign(ids, copies); who goes where; route(slots of this rank)
    rows = dispatch(x, ...)                      rows = dispatch(bring(x), ...)
    y = ... grouped_linear(rows, [W], ...) ...   y = ... grouped_linear(rows, [W of this rank], ...) ...
    out = combine(y, ...)                        out = back(combine(y, ...))

It reads graphs that are already in `moec::` ops, from lowering or from `moec.nn`, and knows a sharded weight by its marker
(`moec::logical`, `moec::resident`) at the end of a chain of views that leave the expert dim alone. Between `dispatch` and
`combine` everything works row by row, which detection proved; the same nodes are written again for the rows that came here.

Refused, with the reason: weights that are read in any other way, rows that leave the layer, offsets that are no `route`'s (expert
choice), several kinds of marker in one layer.

Shape letters: T tokens of this rank, K top-k, E experts, P tokens that came here.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

from moec import ops as _ops  # noqa: F401  (defines torch.ops.moec)
from moec.errors import ParallelError
from moec.fx import target_name, value
from moec.ops import collectives
from moec.ops import exchange as _exchange  # noqa: F401
from moec.passes.dispatchers import Dispatcher, Place
from moec.passes.lower import propagate
from moec.passes.rowwise import is_pointwise
from moec.passes.terms import location

OPS = torch.ops.moec
MARKERS = (OPS.logical.default, OPS.resident.default)


@dataclass(frozen=True)
class Layout:
    """How one layer's experts lie on the ranks of a group: what the graph does not say. The plan itself is a graph input."""

    name: str  # of the module that holds the experts
    num_experts: int
    place: Place
    dispatcher: Dispatcher
    spare: int = 0  # slots beyond one for each expert: at most so many experts have copies
    # the expert in each slot of this rank, -1 for none; with separate weights the graph depends on it
    experts: tuple[int, ...] = ()
    # for each expert of this rank, the how-manieth with copies it is; `spare` if it has none
    copied: tuple[int, ...] = ()


_layouts: dict[int, Layout] = {}
_numbers = itertools.count(1)


def registered(number: int) -> Layout:
    """The layout behind a number."""
    return _layouts[number]


def register(layout: Layout) -> int:
    """A number for the layout, which the markers carry into the graph."""
    number = next(_numbers)
    _layouts[number] = layout
    return number


@dataclass(frozen=True, eq=False)
class Layer:
    """One routed sum in `moec::` ops: its route, the products, and what reads rows of slots."""

    route: fx.Node
    products: tuple[fx.Node, ...]

    @property
    def order(self) -> tuple[fx.Node | None, ...]:
        """The nodes of (order, inverse, offsets)."""
        found: list[fx.Node | None] = [None, None, None]
        for user in self.route.users:
            if user.target is operator.getitem and isinstance(user.args[1], int):
                found[user.args[1]] = user
        return tuple(found)


# The ops that take weights: which arguments hold them, and which the offsets.
PRODUCTS: dict[object, tuple[tuple[int, ...], int]] = {
    OPS.grouped_linear.default: ((1, 2), 3),
    OPS.expert_rows.default: ((0,), 1),
}


def weights(product: fx.Node) -> Iterator[tuple[int, list[fx.Node]]]:
    """The lists of weights of a product, by the position of the argument; empty ones are left out."""
    for i in PRODUCTS[product.target][0]:
        if len(product.args) > i and product.args[i]:
            yield i, list(product.args[i])  # type: ignore[arg-type]


def layers(graph: fx.Graph) -> list[Layer]:
    """All routed sums of a graph, in order. Calls of `torch.ops.moec.x` become calls of its one overload, in place."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverloadPacket) and node.target._qualified_op_name.startswith("moec::"):
            node.target = node.target.default
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS:
            found.setdefault(_route_of(node), []).append(node)
    return [Layer(route, tuple(products)) for route, products in found.items()]


def _route_of(product: fx.Node) -> fx.Node:
    offsets = product.args[PRODUCTS[product.target][1]]
    route = offsets.args[0] if isinstance(offsets, fx.Node) and offsets.target is operator.getitem else None
    if isinstance(route, fx.Node) and route.target is OPS.route.default:
        return route
    return offsets  # type: ignore[return-value]


def root(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Where a weight comes from, through views and casts that leave the expert dim alone; and the first node that does not."""
    while node.op in ("call_function", "call_method") and node.target not in MARKERS:
        if not _per_expert(node):
            return node, node
        node = node.all_input_nodes[0]
    return node, None


CASTS = ("to", "float", "half", "bfloat16", "double", "detach", "contiguous", "type_as", "alias", "clone")


def _per_expert(node: fx.Node) -> bool:
    """Whether row e of the result depends on row e of the one input alone, found in the same way for any number of rows."""
    if len(node.all_input_nodes) != 1 or node.args[0] is not node.all_input_nodes[0]:
        return False
    source = value(node.all_input_nodes[0])
    if not isinstance(source, torch.Tensor):
        return False
    name, rest = target_name(node), node.args[1:]
    if node.kwargs and name not in CASTS:
        return False
    if name in CASTS:
        return True
    if name == "permute":
        dims = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return bool(dims) and dims[0] == 0  # type: ignore[return-value]
    if name == "transpose":
        return all(isinstance(d, int) and d % source.dim() != 0 for d in rest)
    if name in ("select", "narrow", "slice"):
        return isinstance(rest[0], int) and rest[0] % source.dim() != 0
    if name == "getitem":
        index = rest[0]
        return isinstance(index, tuple) and index[0] == slice(None) and all(isinstance(i, (slice, int)) for i in index)
    if name == "getattr":
        return rest[0] == "mT"
    return False


# -- rewriting -----------------------------------------------------------------------------------------------------------


def spread(gm: fx.GraphModule) -> list[Layout]:
    """Rewrites all layers of a graph whose weights are sharded, in place; their layouts in order.

    Raises ParallelError where one cannot be, or where a marker is left.
    """
    shared: dict[object, fx.Node] = {}
    done: list[Layout] = []
    for layer in layers(gm.graph):
        sites = {int(m.args[4]) for p in layer.products for m in _markers(p)}  # type: ignore[arg-type]
        if sites:
            done.append(_Spread(gm.graph, layer, sites, shared).run())
    for node in reversed(list(gm.graph.nodes)):  # markers that nothing reads any more, and views of them
        if node.op in ("call_function", "call_method") and not node.users and root(node)[0].target in MARKERS:
            gm.graph.erase_node(node)
    if done:
        gm.graph.lint()
        gm.recompile()
    return done


def markers(gm: fx.GraphModule) -> list[fx.Node]:
    """The markers of a graph that something reads, and of the graphs that it calls."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return [n for g in graphs for n in g.nodes if n.target in MARKERS and n.users]


def layout_of(marker: fx.Node) -> Layout:
    return registered(int(marker.args[4]))  # type: ignore[arg-type]


def _markers(product: fx.Node) -> list[fx.Node]:
    roots = [root(w)[0] for _, ws in weights(product) for w in ws]
    return [r for r in roots if r.target in MARKERS]


@dataclass(eq=False)
class _Spread:
    """One layer on its way. `here` maps nodes of rows in the original to those for the rows that came here."""

    graph: fx.Graph
    layer: Layer
    sites: set[int]
    shared: dict[object, fx.Node]
    here: dict[fx.Node, fx.Node] = field(default_factory=dict)
    brought: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    at: fx.Node | None = None

    def run(self) -> Layout:
        route = self.layer.route
        if route.target is not OPS.route.default:
            raise self.refusal(
                "the experts choose their tokens, or the rows are not in the order of `moec::route`", route
            )
        if len(self.sites) > 1:
            names = sorted(_layouts[s].name for s in self.sites)
            raise self.refusal(f"one layer reads the experts of several modules ({', '.join(names)})", route)
        self.layout = _layouts[next(iter(self.sites))]
        if route.args[1] != self.layout.num_experts:
            raise self.refusal(f"{route.args[1]} experts, where the plan has {self.layout.num_experts}", route)
        marked = value(next(m for p in self.layer.products for m in _markers(p)))
        assert isinstance(marked, torch._subclasses.FakeTensor)
        self.mode = marked.fake_mode
        nodes = list(self.graph.nodes)
        start = nodes.index(route)
        self.top_k = self._top_k()
        old = [n for n in self.layer.order if n is not None]
        self._open(route)
        gone = []
        for node in nodes[start + 1 :]:
            if node in old or not any(a in self.here or a in old for a in node.all_input_nodes):
                continue
            self.at = node
            with self.graph.inserting_before(node):
                self._step(node)
            gone.append(node)
        for node in reversed([route, *old, *gone]):
            if node.users:
                user = next(iter(node.users))
                raise self.refusal("rows or numbers of slots are read outside the layer", user)
            self.graph.erase_node(node)
        return self.layout

    def refusal(self, why: str, node: fx.Node) -> ParallelError:
        names = sorted(_layouts[s].name for s in self.sites)
        return ParallelError(
            f"the experts of {', '.join(names)} cannot be spread over ranks: {why}; at {node} ({location(node)})"
        )

    def write(self, target: Callable[..., object] | str, *args: object) -> fx.Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args)  # type: ignore[arg-type]
        self._propagate(node)
        return node

    def _propagate(self, node: fx.Node) -> None:
        if self.at is not None and "stack_trace" in self.at.meta:
            node.meta["stack_trace"] = self.at.meta["stack_trace"]
        propagate(node, self.mode)
        if bindings := compute_unbacked_bindings(self.mode.shape_env, value(node)):
            node.meta["unbacked_bindings"] = bindings

    def _top_k(self) -> int:
        order = self.layer.order
        ks = {u.args[4] for u in (order[1].users if order[1] is not None else ()) if u.target is OPS.combine.default}
        if len(ks) != 1 or not isinstance(k := next(iter(ks)), int):
            raise self.refusal(
                f"sums over {sorted(map(str, ks))} choices per token, where one number was expected", self.layer.route
            )
        return k

    def _open(self, route: fx.Node) -> None:
        place = self.layout.place
        self.at = route
        with self.graph.inserting_before(route):
            ids = self.write("reshape", route.args[0], (-1, self.top_k))
            marker = next(m for p in self.layer.products for m in _markers(p))
            slots = self.write(OPS.assign.default, ids, marker.args[1], place.rank)
            tokens = shape(slots)[0]
            key = tokens if isinstance(tokens, int) else str(tokens.node.expr)
            at = replace(place, tokens=key)
            self.layout = replace(self.layout, place=at)
            self.channel = self.layout.dispatcher.open(self.write, self.shared, slots, at)
            local = self.write(torch.sub, self.channel.slots, place.rank * place.slots_per_rank)
            routed = self.write(OPS.route.default, local, place.slots_per_rank)
            order, inverse, offsets = (self.write(operator.getitem, routed, i) for i in range(3))
            order = self.write(OPS.trim_rows.default, order, self.write(collectives.last, offsets))
            self.rows = shape(order)[0]
        self.routing = (order, inverse, offsets)
        for node, new in zip(self.layer.order, self.routing):
            if node is not None:
                self.here[node] = new

    def _step(self, node: fx.Node) -> None:
        """One node of the original, written for the rows that came here."""
        if node.target is OPS.dispatch.default:
            self.here[node] = self._dispatch(node)
        elif node.target is OPS.combine.default:
            if node.args[0] not in self.here:
                raise self.refusal("sums of rows that are no rows of this layer", node)
            summed = self.write(OPS.combine.default, self.here[node.args[0]], *self.routing, self.top_k)  # type: ignore[index]
            node.replace_all_uses_with(self.channel.back(summed))
        elif node.target in PRODUCTS:
            self.here[node] = self._product(node)
        elif node.target is torch.ops.aten.sym_size.int and node.args[0] in self.here and node.args[1] == 0:
            self.here[node] = self.write(torch.ops.aten.sym_size.int, self.here[node.args[0]], 0)  # type: ignore[index]
        else:
            self.here[node] = self._again(node)

    def _dispatch(self, node: fx.Node) -> fx.Node:
        x, *_, per_row = node.args
        if x in self.here or per_row not in (1, self.top_k):
            raise self.refusal("rows are gathered in a way that is not known here", node)
        return self.write(OPS.dispatch.default, self._bring(x, per_row), *self.routing, per_row)  # type: ignore[arg-type]

    def _bring(self, x: fx.Node, per_row: int) -> fx.Node:
        """x by token, or by slot: then a token's K values travel together."""
        key = (x, per_row)
        if key not in self.brought:
            if per_row == self.top_k:
                self.brought[key] = self.channel.bring(x)
            else:
                feature = tuple(shape(x)[1:])
                by_token = self.write("reshape", x, (-1, self.top_k, *feature))
                self.brought[key] = self.write("reshape", self.channel.bring(by_token), (-1, *feature))
        return self.brought[key]

    def _product(self, node: fx.Node) -> fx.Node:
        args = list(node.args)
        if node.kwargs or args[PRODUCTS[node.target][1]] not in self.here:
            raise self.refusal("a product of rows in an order that is not known here", node)
        for i, ws in weights(node):
            args[i] = self._local(node, ws)
        args = [self.here.get(a, a) if isinstance(a, fx.Node) else a for a in args]
        return self.write(node.target, *args)

    def _local(self, product: fx.Node, ws: list[fx.Node]) -> list[fx.Node]:
        """The weights of this rank's slots in place of those of all experts."""
        stacked = len(ws) == 1
        for w in ws:
            source, odd = root(w)
            if odd is not None or source.target not in MARKERS or (source.target is MARKERS[0]) != stacked:
                what = f"`{target_name(source)}`" if odd is not None else "a value that is not sharded with them"
                raise self.refusal(f"its weights are computed by {what} before they are used", source)
        if stacked:
            return [self._replayed(ws[0], self._stack(root(ws[0])[0]))]
        held = [e for e in self.layout.experts if e >= 0]
        own = self._each([_node(root(ws[e])[0].args[0]) for e in held])
        local = [self._replayed(ws[e], w) for e, w in zip(held, own)]
        if len(local) == len(self.layout.experts):
            return local
        # an empty slot has no rows: any weight of the shape will do, without a gradient
        filler = self.write("detach", local[0] if local else self._replayed(ws[0], _node(root(ws[0])[0].args[0])))
        at = iter(local)
        return [next(at) if e >= 0 else filler for e in self.layout.experts]

    def _replayed(self, w: fx.Node, own: fx.Node) -> fx.Node:
        """The chain of views from the marker on, on what stands for what the marker marks."""
        if w.target in MARKERS:
            return own
        source = w.all_input_nodes[0]
        below = self._replayed(source, own)
        new = self.graph.node_copy(w, lambda n: below if n is source else n)
        self._propagate(new)
        return new

    def _stack(self, marker: fx.Node) -> fx.Node:
        """A rank's stack; where experts have copies, the gradients of these are summed on the way back."""
        local, _, shared = marker.args[:3]
        if not self.layout.spare:
            return local  # type: ignore[return-value]
        if (key := (local, -1)) not in self.brought:
            at = self.layout.place
            self.brought[key] = self.write(collectives.share_gradients, local, shared, self.layout.spare, at.group)  # type: ignore[index]
        return self.brought[key]  # type: ignore[index]

    def _each(self, own: list[fx.Node]) -> list[fx.Node]:
        """The same for experts in parameters of their own. Every rank takes part, whatever it holds."""
        if not self.layout.spare:
            return own
        told = self.write(
            collectives.share_each, own, list(self.layout.copied), self.layout.spare, self.layout.place.group
        )
        return [self.write(operator.getitem, told, i) for i in range(len(own))]

    def _again(self, node: fx.Node) -> fx.Node:
        """A row-wise operation, on the rows that came here."""
        if node.op not in ("call_function", "call_method") or node.is_impure():
            raise self.refusal("rows of slots leave the layer", node)
        if not _row_wise(node):
            raise self.refusal(f"{target_name(node)} is not known to work row by row", node)
        new = self.graph.node_copy(node, lambda n: self.here.get(n, n))
        try:
            self._propagate(new)
        except Exception as fault:
            raise self.refusal(
                f"{target_name(node)} does not work on another number of rows ({fault})", node
            ) from fault
        was, now = value(node), value(new)
        for a, b in zip(
            was if isinstance(was, (tuple, list)) else [was], now if isinstance(now, (tuple, list)) else [now]
        ):
            if isinstance(a, torch.Tensor) and (b.shape[1:] != a.shape[1:] or not _same(b.shape[0], self.rows)):
                raise self.refusal(f"{target_name(node)} does not keep to rows", node)
        return new


def _row_wise(node: fx.Node) -> bool:
    """Whether an operation on rows treats each alone: detection proved it, or it is one of those that layers of `moec.nn` are
    written in, along the last dim.
    """
    name, rest = target_name(node), node.args[1:]
    if node.meta.get("moec_proven") or is_pointwise(name) or name in CASTS:
        return True
    if name in ("chunk", "split"):
        dim = node.kwargs.get("dim", rest[1] if len(rest) > 1 else 0)
        return isinstance(dim, int) and (dim < 0 or dim > 0)
    if name == "unsqueeze":
        return bool(rest) and isinstance(rest[0], int) and rest[0] in (-1, 1)
    return name == "getitem" and isinstance(rest[0], int) and isinstance(value(node.all_input_nodes[0]), (tuple, list))


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of a node that is known to hold a tensor."""
    known = value(node)
    assert isinstance(known, torch.Tensor)
    return tuple(known.shape)


def _node(arg: object) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg


def _same(a: object, b: object) -> bool:
    left, right = (getattr(getattr(s, "node", None), "expr", s) for s in (a, b))
    return bool(left == right)
