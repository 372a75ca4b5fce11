"""Example values for the nodes of a stamped iteration.

Dynamo runs every node on fake tensors, which is most of what tracing costs. The nodes of iteration j have the shapes of
iteration 2, but for sizes that only the data know: the u7 tokens of expert 2 are the u31 of expert j. So iteration 2's example
values are taken, with its own symbols exchanged for new ones. Nodes whose values depend on the iteration before, or that
teach the ShapeEnv something (a bound, an assertion), are run as always.

Even that is most of the time spent on an iteration, and for nothing when the loop is rewritten: its nodes go. So where no size of
the loop reaches the code after it, the nodes of iteration j *borrow* the values of iteration 2 as they are, u7 and all. That is
wrong, and marked so: if such a node is left when the graph has been rewritten, the frame is traced again with exact values.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,import-untyped,union-attr"
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import sympy
import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import get_fake_value, set_example_value
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .markers import BORROWED
from .watch import Lessons

_SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


@dataclasses.dataclass(frozen=True)
class Resizer:
    """How iteration 2's example values are to be used."""

    run: set[fx.Node]  # these nodes are run
    outside: dict[int, object]  # example values made before iteration 1, by id: the same object again
    given: list[tuple[fx.Node, sympy.Symbol]]  # what the iterator yielded to iteration 2, and a size that came with it
    lessons: Lessons
    own: frozenset[sympy.Symbol]  # the sizes that came up in iteration 2
    foreign: frozenset[sympy.Symbol]  # those of the iterations before, and of what the iterator yielded to them
    sized: frozenset[fx.Node]  # nodes of iteration 2 with such a size

    @staticmethod
    def of(
        first: list[fx.Node],
        second: list[fx.Node],
        yielded: list[list[fx.Node]],
        lessons: Lessons,
    ) -> Resizer:
        """`yielded`: the nodes that the iterator gave to the iterations 0, 1 and 2."""
        outside: dict[int, object] = {}
        for node in second[0].graph.nodes if second else ():
            if node is first[0]:
                break
            outside.update((id(leaf), leaf) for leaf in _leaves(node))
        earlier = {id(leaf) for node in first for leaf in _leaves(node)} - outside.keys()
        given = [(node, size) for node in yielded[-1] for size in _sizes(node) if size.is_Symbol]
        foreign = {symbol for node in first for symbol in node.meta.get("unbacked_bindings", ())}
        foreign |= {
            symbol for node in itertools.chain(*yielded) for size in _sizes(node) for symbol in size.free_symbols
        }
        foreign -= {symbol for _, symbol in given}

        def must_run(node: fx.Node) -> bool:
            own = node.meta.get("unbacked_bindings", {}).keys()
            if node in lessons.others or lessons.bounds.get(node, set()) - own:
                return True
            if any(expr.free_symbols & foreign for expr, _ in lessons.asserts.get(node, ())):
                return True
            return any(id(leaf) in earlier or free_symbols(leaf) & foreign for leaf in _leaves(node))

        inside = {id(leaf) for node in second for leaf in _leaves(node)}
        run = {node for node in second if must_run(node)}
        own = {symbol for node in second for symbol in node.meta.get("unbacked_bindings", ())}
        shared = {key: leaf for key, leaf in outside.items() if key in inside}
        sized = frozenset(node for node in second if any(free_symbols(leaf) & own for leaf in _leaves(node)))
        return Resizer(run, shared, given, lessons, frozenset(own), frozenset(foreign), sized)

    def may_borrow(self, nodes: list[fx.Node], lasting: frozenset[int]) -> bool:
        """Whether the sizes of an iteration say nothing about another, nor about anything outside; `nodes` of iteration 2."""
        taught = set().union(*self.lessons.bounds.values())
        taught |= {s for asserts in self.lessons.asserts.values() for expr, _ in asserts for s in expr.free_symbols}
        if self.given or self.lessons.others or not taught <= self.own:
            return False
        leaves = [leaf for node in nodes for leaf in _leaves(node)]
        if any(free_symbols(leaf) & self.foreign for leaf in leaves):
            return False
        if any(isinstance(leaf, _SYMBOLIC) and free_symbols(leaf) & self.own for leaf in leaves):
            return False  # a number that is computed from a size: Dynamo makes equal ones one node
        return not any(nodes[place] in self.sized for place in lasting)

    def start(self, tx: InstructionTranslatorBase, exchange: Callable[[fx.Node], fx.Node]) -> Pressing:
        """Begin an iteration; `exchange` tells what it was given instead of a node that iteration 2 was given."""
        pressing = Pressing(self, tx)
        for node, symbol in self.given:
            place = _sizes(node).index(symbol)
            pressing.symbols[symbol] = _sizes(exchange(node))[place]
        return pressing


class Pressing:
    """The example values of one iteration, node after node."""

    def __init__(self, resizer: Resizer, tx: InstructionTranslatorBase) -> None:
        self.resizer, self.tx = resizer, tx
        self.env: ShapeEnv = tx.output.shape_env
        self.symbols: dict[sympy.Symbol, sympy.Expr] = {}
        self.done: dict[int, object] = {}  # example value of iteration 2, by id -> the one of this iteration

    def set_value(self, model: fx.Node, node: fx.Node) -> None:
        value = model.meta["example_value"]
        if model in self.resizer.run:
            new = get_fake_value(node, self.tx, allow_non_graph_fake=True)
            set_example_value(node, new)
            by_path = {path: symbol for symbol, path in node.meta.get("unbacked_bindings", {}).items()}
            for symbol, path in model.meta.get("unbacked_bindings", {}).items():
                self.symbols[symbol] = by_path[path]
            for old, leaf in zip(_leaves(model), _leaves(node)):
                self.done[id(old)] = leaf
            return
        for symbol in model.meta.get("unbacked_bindings", ()):
            self.symbols[symbol] = self.like(symbol)
        set_example_value(node, self.converted(value))
        for expr, message in self.resizer.lessons.asserts.get(model, ()):
            self.env.guard_or_defer_runtime_assert(expr.xreplace(self.symbols), message)

    def borrow(self, model: fx.Node, node: fx.Node) -> None:
        """The value of `model` as it is."""
        node.meta["example_value"] = model.meta["example_value"]
        if model in self.resizer.sized:
            node.meta[BORROWED] = True

    def like(self, symbol: sympy.Symbol) -> sympy.Symbol:
        """A new size that only the data know, with what is known about `symbol`."""
        new = self.env.create_unbacked_symint().node.expr
        self.env.var_to_range[new] = self.env.var_to_range[symbol]
        if symbol in self.env.size_like:
            self.env.size_like.add(new)
        return new

    def converted(self, value: object) -> object:
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, torch.Tensor):
            new = self.resizer.outside.get(id(value))
            if new is None:
                new = self.done[id(value)] = self.resized(value)
            return new
        if isinstance(value, _SYMBOLIC):
            return self.exchanged(value)
        if isinstance(value, torch.Size):
            return torch.Size(map(self.exchanged, value))
        if isinstance(value, (tuple, list)):
            items = [self.converted(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def resized(self, value: torch.Tensor) -> torch.Tensor:
        size, stride = tuple(map(self.exchanged, value.shape)), tuple(map(self.exchanged, value.stride()))
        offset = self.exchanged(value.storage_offset())
        with self.tx.fake_mode:
            new = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
            if isinstance(offset, torch.SymInt) or offset:
                new = new.as_strided(size, stride, offset)
        return new.requires_grad_() if value.requires_grad else new

    def exchanged(self, number: int | torch.SymInt | torch.SymBool) -> int | torch.SymInt | torch.SymBool:
        if not isinstance(number, _SYMBOLIC):
            return number
        expr = number.node.expr.xreplace(self.symbols)
        if expr == number.node.expr:
            return number
        return type(number)(SymNode(expr, self.env, number.node.pytype, None))


def _leaves(node: fx.Node) -> list[object]:
    """The tensors and symbolic numbers in the example value of a node."""
    found: list[object] = []

    def visit(value: object) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                visit(item)
        elif isinstance(value, (torch.Tensor, *_SYMBOLIC)):
            found.append(value)

    visit(node.meta.get("example_value"))
    return found


def _sizes(node: fx.Node) -> list[sympy.Expr]:
    """The sizes that the data decide in the example value of a node, or the number itself."""
    numbers: list[object] = []
    for leaf in _leaves(node):
        numbers += [*leaf.shape, *leaf.stride(), leaf.storage_offset()] if isinstance(leaf, torch.Tensor) else [leaf]
    exprs = [number.node.expr for number in numbers if isinstance(number, _SYMBOLIC)]
    return [expr for expr in exprs if any(symbol_is_type(s, SymT.UNBACKED_INT) for s in expr.free_symbols)]


def only_data_differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same, or alike in all but the data that decide them."""
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt):
        return type(a) is type(b) and a == b
    if a.node.expr == b.node.expr:
        return True
    env = a.node.shape_env
    symbols = a.node.expr.free_symbols | b.node.expr.free_symbols
    return all(map(env.is_unbacked_symint, symbols)) and env.bound_sympy(a.node.expr) == env.bound_sympy(b.node.expr)
