"""lower: regions become `moec::` ops. Decides nothing: what to do was settled by detect and schedule.

    order, inverse, offsets = moec::route(topk_ids, E)
    rows = moec::dispatch(x, order, inverse, offsets, K)               # TokenRows
    a    = moec::dispatch(topk_weights.flatten(), ..., 1)              # SlotValue
    y    = ... moec::grouped_linear(rows, weights, biases, offsets) ... # the rolled body, on slot rows in sorted order
    out  = moec::combine(y, order, inverse, offsets, K)                # in place of the root

or, for a body that the schedule wants in one go, `out = moec::experts(x, order, inverse, offsets, topk_weights, ...)`.

Everything is written right after the root, under the state in force there; what only the root needed is taken out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from moec import ops as _ops  # noqa: F401  (defines torch.ops.moec)
from moec.fx import value
from moec.ir import (
    Apply,
    ExpertRows,
    Expr,
    Feedforward,
    GroupedLinear,
    MoERegion,
    Outer,
    Separate,
    SlotValue,
    Stacked,
    Theta,
    TokenRows,
    reshape_features,
)
from moec.passes.detect import Detection

OPS = torch.ops.moec
NONE: Mapping[MoERegion, Feedforward] = {}


@dataclass(frozen=True, eq=False)
class Lowered:
    """What was written for one region: the nodes, the last of which holds the routed sum."""

    region: MoERegion
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    names: dict[fx.Node, str]  # of inputs that are other regions' results: the name the original had there


@dataclass(eq=False)
class Emitter:
    """Writes one region into a graph, at its current insertion point. `names` maps outer nodes to the nodes to read instead."""

    graph: fx.Graph
    region: MoERegion
    names: dict[fx.Node, fx.Node] = field(default_factory=dict)
    whole: Feedforward | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    renamed: dict[fx.Node, str] = field(default_factory=dict)
    routing: tuple[fx.Node, ...] = ()
    _known: dict[int, object] = field(default_factory=dict)
    _gathered: dict[tuple[str, fx.Node], fx.Node] = field(default_factory=dict)

    def call(
        self,
        target: Callable[..., object] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """One node, with its fake value; a string is a method."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs or {}, name=name)
        trace = self.region.root.meta.get("stack_trace")
        if trace:
            node.meta["stack_trace"] = trace
        self.nodes.append(node)
        node.meta["moec_proven"] = True  # what reads rows here treats each alone
        propagate(node)
        return node

    def emit(self) -> fx.Node:
        """The whole region; returns the node that holds the routed sum, in the shape of the root."""
        region = self.region
        ids = self.expr(region.topk_ids)
        if region.clamp_ids:
            ids = self.call(torch.clamp, (ids, 0, region.num_experts - 1))
        if region.check_ids:
            low = self.call(operator.ge, (ids, 0))
            high = self.call(operator.lt, (ids, region.num_experts))
            inside = self.call(torch.all, (self.call(operator.and_, (low, high)),))
            self.call(torch._assert_async, (inside, "moec: expert ids out of range"))
        routed = self.call(OPS.route.default, (ids, region.num_experts), name="route")
        names = ("order", "inverse", "expert_offsets")
        self.routing = tuple(self.call(operator.getitem, (routed, i), name=n) for i, n in enumerate(names))
        out = self.in_one(self.whole) if self.whole is not None else self.in_steps()
        wanted = region.out_shape
        return out if wanted is None else self.call("reshape", (out, wanted))

    def in_steps(self) -> fx.Node:
        """The rolled body on slot rows, then their sums [T, ...]."""
        rows = self.expr(self.region.body)
        if _dtype(rows) != self.region.out_dtype and _dtype(rows) is not None:
            rows = self.call("to", (rows, self.region.out_dtype))
        return self.call(OPS.combine.default, (rows, *self.routing, self.region.top_k), name="routed_sum")

    def in_one(self, whole: Feedforward) -> fx.Node:
        """One op for the whole body and the sums [T, D]."""
        x = self.expr(whole.x)
        scale = None if whole.scale is None else self.call("reshape", (self.expr(whole.scale), (-1,)))
        parameters = [[] if theta is None else self.theta(theta) for theta in whole.parameters]
        kind = (self.region.top_k, whole.activation, whole.gating, whole.up_transposed, whole.down_transposed)
        args = (x, *self.routing, scale, *parameters, *kind, self.region.out_dtype)
        return self.call(OPS.experts.default, args, name="experts")

    def expr(self, expr: Expr) -> fx.Node:
        """The node for an expression; a shared expression is written once."""
        if id(expr) not in self._known:
            self._known[id(expr)] = self._expr(expr)
        return self._known[id(expr)]  # type: ignore[return-value]

    def _expr(self, expr: Expr) -> fx.Node:
        if isinstance(expr, Outer):
            node = self.names.get(expr.node, expr.node)
            if node is not expr.node:
                self.renamed[node] = expr.node.name
            return node
        if isinstance(expr, TokenRows):
            return self._dispatch("token", self.expr(expr.value), self.region.top_k)
        if isinstance(expr, SlotValue):
            slots = self.call("reshape", (self.expr(expr.value), (-1, *expr.feature)))
            return self._dispatch("slot", slots, 1)
        if isinstance(expr, ExpertRows):
            rows = self.call(torch.ops.aten.sym_size.int, (self.routing[0], 0))
            return self.call(
                OPS.expert_rows.default, (self.theta(expr.theta), self.routing[2], rows), name="expert_rows"
            )
        if isinstance(expr, GroupedLinear):
            x = self.expr(expr.x)
            biases = self.theta(expr.bias) if expr.bias is not None else []
            args = (x, self.theta(expr.weight), biases, self.routing[2], expr.transposed, self._autocast(x))
            return self.call(OPS.grouped_linear.default, args, name="grouped_linear")
        return self._apply(expr)

    def _apply(self, expr: Apply) -> fx.Node:
        args = tuple(self._operand(a) for a in expr.args)
        kwargs = {k: self._operand(v) for k, v in expr.kwargs}
        if expr.target is reshape_features:
            rows, feature = args
            return self.call("reshape", (rows, (-1, *feature)))  # type: ignore[misc]
        if expr.target is torch.Tensor.to:
            return self.call("to", args, kwargs)
        if expr.target == "getitem":
            return self.call(operator.getitem, args)
        return self.call(expr.target, args, kwargs)

    def _operand(self, arg: object) -> object:
        if isinstance(arg, (Outer, TokenRows, SlotValue, ExpertRows, GroupedLinear, Apply)):
            return self.expr(arg)
        if isinstance(arg, tuple):
            return tuple(self._operand(a) for a in arg)
        return arg

    def theta(self, theta: Theta) -> list[fx.Node]:
        """Parameters as the ops take them: a list of one stack, or of one tensor per expert."""
        if isinstance(theta, Stacked):
            return [self.expr(theta.value)]
        assert isinstance(theta, Separate)
        return [self.names.get(n, n) for n in theta.values]

    def _dispatch(self, kind: str, source: fx.Node, slots_per_row: int) -> fx.Node:
        key = (kind, source)
        if key not in self._gathered:
            self._gathered[key] = self.call(
                OPS.dispatch.default, (source, *self.routing, slots_per_row), name=f"{kind}_rows"
            )
        return self._gathered[key]

    def _autocast(self, x: fx.Node) -> torch.dtype | None:
        known = value(x)
        device = known.device.type if isinstance(known, torch.Tensor) else "cpu"
        return dict(self.region.autocast).get(device)


class LoweringFault(Exception):
    """Something in us went wrong while a region was written. The graph is to be thrown away."""

    def __init__(self, region: MoERegion, fault: Exception) -> None:
        super().__init__(f"{type(fault).__name__}: {fault}")
        self.region = region


def lower(graph: fx.Graph, detection: Detection, whole: Mapping[MoERegion, Feedforward] = NONE) -> list[Lowered]:
    """Writes all regions of a detection into its graph, those in `whole` as one op each, and takes out what died."""
    names: dict[fx.Node, fx.Node] = {}
    done = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for region in sorted(detection.regions, key=lambda r: order[r.root]):
        emitter = Emitter(graph, region, names, whole.get(region))
        try:
            with graph.inserting_before(region.root.next):
                result = emitter.emit()
        except Exception as fault:
            raise LoweringFault(region, fault) from fault
        for user, arg in region.root_readers:
            if user not in detection.dead:
                user.replace_input_with(arg, result)
            names[arg] = result
        names[region.root] = result
        done.append(Lowered(region, tuple(emitter.nodes), result, emitter.renamed))
    for node in reversed(list(graph.nodes)):
        if node in detection.dead or node in detection.markers:
            if node.users:
                raise AssertionError(f"{node} was to die with its region but is read by {list(node.users)}")
            graph.erase_node(node)
    return done


def propagate(node: fx.Node, mode: FakeTensorMode | None = None) -> None:
    """Gives a new node its fake value, computed from those of its arguments (whose mode it is), without adding guards."""
    inputs = [value(n) for n in node.all_input_nodes]
    fakes = [v for v in inputs if isinstance(v, torch._subclasses.FakeTensor)]
    for v in inputs:
        for item in v if isinstance(v, (tuple, list)) else ():
            if isinstance(item, torch._subclasses.FakeTensor):
                fakes.append(item)
    if mode is None and not fakes:
        return
    mode = mode or fakes[0].fake_mode
    known: Any = value
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known)
    with mode, torch.no_grad():
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    key = "val" if any("val" in n.meta for n in node.all_input_nodes) else "example_value"
    node.meta[key] = result


def _dtype(node: fx.Node) -> torch.dtype | None:
    known = value(node)
    return known.dtype if isinstance(known, torch.Tensor) else None
