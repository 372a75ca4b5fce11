"""FX helpers: what is alive, which state is in force where, cutting a region out. Editing happens here and in `passes.lower`.

The graphs are Dynamo's (torch functions and methods, with in-place writes) or torch.export's (ATen), before autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

ASSERTS = {
    "_assert_scalar", "_assert_async", "_check", "_check_is_size", "sym_constrain_range", "sym_constrain_range_for_size",
    "_assert_tensor_metadata", "_check_with", "_check_value", "_check_index", "_check_tensor_all",
}  # fmt: skip


@dataclass(frozen=True)
class Ambient:
    """The state in force at a node: grad mode, and for each device type the autocast dtype if autocast is on."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]


def value(node: fx.Node) -> object:
    """The fake tensor or symbolic number of a node, from either producer; None when it has none."""
    return node.meta.get("example_value", node.meta.get("val"))


def target_name(node: fx.Node) -> str:
    """The bare name of what a node calls."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_assert(node: fx.Node) -> bool:
    """Whether a node only checks something and computes nothing."""
    return node.op == "call_function" and target_name(node) in ASSERTS


def is_sharded(node: fx.Node) -> bool:
    """Whether a node stands for a parameter that is spread over ranks: a marker of expert parallelism."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in ("moec::logical", "moec::resident")


def ambient_states(graph: fx.Graph) -> dict[fx.Node, Ambient]:
    """The state in force at each node. Before the first node it is the state in force now: Dynamo calls backends under it."""
    grad = torch.is_grad_enabled()
    autocast: dict[str, torch.dtype] = {}
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            autocast[device] = torch.get_autocast_dtype(device)
    entered: dict[fx.Node, dict[str, torch.dtype]] = {}
    states: dict[fx.Node, Ambient] = {}
    for node in graph.nodes:
        name = target_name(node) if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif name == "_enter_autocast":
            entered[node] = dict(autocast)
            args = [*node.args, None, None, None]
            device, dtype, enabled = str(args[0]), args[1], args[2]
            enabled = node.kwargs.get("enabled", True if enabled is None else enabled)
            dtype = node.kwargs.get("dtype", dtype) or torch.get_autocast_dtype(device)
            autocast.pop(device, None)
            if enabled:
                autocast[device] = dtype
        elif name == "_exit_autocast" and isinstance(node.args[0], fx.Node):
            autocast = entered.get(node.args[0], {})
        states[node] = Ambient(grad, tuple(sorted(autocast.items(), key=lambda item: item[0])))
    return states


@dataclass(frozen=True)
class Buffers:
    """What each node may be a view of (None: nothing), and who writes each buffer, by the node that made it."""

    view_of: Mapping[fx.Node, fx.Node | None]
    writes: Mapping[fx.Node, list[fx.Node]]

    def of(self, node: fx.Node, cut: frozenset[tuple[fx.Node, fx.Node]]) -> fx.Node:
        """The node that made the buffer; a view of a read that is cut is a view of something new."""
        while (base := self.view_of.get(node)) is not None and (node, base) not in cut:
            node = base
        return node


def live_nodes(
    graph: fx.Graph,
    buffers: Buffers,
    roots: Iterable[fx.Node],
    cut: frozenset[tuple[fx.Node, fx.Node]] = frozenset(),
    ignore: Callable[[fx.Node], bool] = lambda node: False,
) -> set[fx.Node]:
    """What is needed when the reads in `cut` (user, argument) are gone and the nodes in `roots` are needed besides.

    Needed are: the output, calls with side effects that `ignore` does not name, writes to a buffer that something needed reads or
    that belongs to an input, and whatever those read.
    """
    live: set[fx.Node] = set()
    work = list(roots)
    writers = {w for group in buffers.writes.values() for w in group}
    for node in graph.nodes:
        effect = _has_effect(node) and node not in writers and not ignore(node)
        if node.op in ("output", "placeholder", "get_attr") or effect:
            work.append(node)
    while work:
        node = work.pop()
        if node in live:
            continue
        live.add(node)
        for arg in node.all_input_nodes:
            if (node, arg) not in cut:
                work.append(arg)
                work.extend(buffers.writes.get(buffers.of(arg, cut), ()))
        if node.op in ("placeholder", "get_attr"):
            work.extend(buffers.writes.get(node, ()))
    return live


PURE_HELPERS = ("_log_api_usage_once",)


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("call_module",):
        return True
    if node.op != "call_function":
        return False
    name = target_name(node)
    if is_assert(node) or name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", *PURE_HELPERS):
        return True
    module = getattr(node.target, "__module__", "") or ""
    if module.startswith("moec.capture"):
        return True
    return node.is_impure()


def ancestors(node: fx.Node, stop: set[fx.Node] | frozenset[fx.Node] = frozenset()) -> set[fx.Node]:
    """Everything the node is computed from, `stop` and what is behind it left out."""
    found: set[fx.Node] = set()
    work = list(node.all_input_nodes)
    while work:
        n = work.pop()
        if n not in found and n not in stop:
            found.add(n)
            work.extend(n.all_input_nodes)
    return found


def extract(
    owner: torch.nn.Module,
    nodes: Iterable[fx.Node],
    inputs: list[fx.Node],
    output: fx.Node,
    name: str,
    same: Mapping[fx.Node, fx.Node] | None = None,
    names: Mapping[fx.Node, str] | None = None,
) -> fx.GraphModule:
    """A module that computes `output` from `inputs` by copies of `nodes` (in graph order); `same` maps nodes to inputs, `names`
    renames inputs.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder((names or {}).get(node, node.name))
        copies[node].meta = dict(node.meta)
    for node, source in (same or {}).items():
        copies.setdefault(node, copies[source])
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[output])
    return graph_module(owner, graph, name)


def graph_module(owner: torch.nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule whose Python code is written when somebody asks for it, where torch can do that, as Dynamo's are."""
    try:
        from torch.fx._lazy_graph_module import _LazyGraphModule as Module
    except ImportError:
        return fx.GraphModule(owner, graph, class_name=name)
    return Module(owner, graph, class_name=name)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A module of its own with the same graph, node for node and in the same order; parameters and submodules are shared."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapped)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(last.meta)
    graph._codegen = copy.deepcopy(gm.graph._codegen)
    made = graph_module(gm, graph, type(gm).__name__)
    made.meta = dict(gm.meta)
    return made
