"""Example values for the nodes of a stamped iteration.

Dynamo runs every node on fake tensors, which is most of what tracing costs. The nodes of iteration j have the shapes of
iteration 2, but for sizes that only the data know: the u7 tokens of expert 2 are the u31 of expert j. Nodes that make such
symbols, compute with them, or teach the ShapeEnv something are run as always; for the rest, iteration 2's example is
taken and its symbols are exchanged.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import get_fake_value, set_example_value
from torch.fx.experimental.symbolic_shapes import free_symbols

_SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


@dataclasses.dataclass
class Resizer:
    """What is to be run, and what can be taken over, by node of iteration 2."""

    run: set[fx.Node]
    outside: dict[int, object]  # example values made before iteration 1, by id: shared, not copied

    @staticmethod
    def of(first: list[fx.Node], second: list[fx.Node], teaching: set[fx.Node]) -> Resizer:
        inside = {id(leaf) for node in (*first, *second) for leaf in _leaves(node.meta.get("example_value"))}
        earlier = {id(leaf) for node in first for leaf in _leaves(node.meta.get("example_value"))}
        outside: dict[int, object] = {}
        for node in second[0].graph.nodes if second else ():
            if node is first[0]:
                break
            for leaf in _leaves(node.meta.get("example_value")):
                outside[id(leaf)] = leaf
        loose = {symbol for node in first for symbol in node.meta.get("unbacked_bindings", ())}
        run = {
            node
            for node in second
            if node in teaching
            or "unbacked_bindings" in node.meta
            or any(
                isinstance(leaf, _SYMBOLIC) or (id(leaf) in earlier and id(leaf) not in outside) or free_symbols(leaf) & loose
                for leaf in _leaves(node.meta.get("example_value"))
            )
        }
        return Resizer(run, {key: leaf for key, leaf in outside.items() if key in inside or key in earlier})

    def start(self, tx: InstructionTranslatorBase) -> Pressing:
        return Pressing(self, tx)


class Pressing:
    """The example values of one iteration, node after node."""

    def __init__(self, resizer: Resizer, tx: InstructionTranslatorBase) -> None:
        self.resizer, self.tx = resizer, tx
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.done: dict[int, object] = {}  # example value of iteration 2, by id -> the one of this iteration

    def set_value(self, model: fx.Node, node: fx.Node) -> None:
        value = model.meta["example_value"]
        if model in self.resizer.run:
            new = get_fake_value(node, self.tx, allow_non_graph_fake=True)
            set_example_value(node, new)
            by_path = {path: symbol for symbol, path in node.meta.get("unbacked_bindings", {}).items()}
            for symbol, path in model.meta.get("unbacked_bindings", {}).items():
                self.symbols[symbol] = by_path[path]
            for old, leaf in zip(_leaves(value), _leaves(new), strict=True):
                self.done[id(old)] = leaf
        else:
            node.meta["example_value"] = self.converted(value)

    def converted(self, value: object) -> object:
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, torch.Tensor):
            new = self.resizer.outside.get(id(value))
            if new is None:
                new = self.done[id(value)] = self.resized(value)
            return new
        if isinstance(value, torch.Size):
            return torch.Size(map(self.size, value))
        if isinstance(value, (tuple, list)):
            items = [self.converted(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def resized(self, value: torch.Tensor) -> torch.Tensor:
        with self.tx.fake_mode:
            new = torch.empty_strided(
                [self.size(n) for n in value.shape],
                [self.size(n) for n in value.stride()],
                dtype=value.dtype,
                device=value.device,
            )
        return new.requires_grad_() if value.requires_grad else new

    def size(self, number: int | torch.SymInt) -> int | torch.SymInt:
        if not isinstance(number, torch.SymInt):
            return number
        expr = number.node.expr
        new = expr.xreplace(self.symbols)
        return number if new == expr else number.node.shape_env.create_symintnode(new, hint=None)


def _leaves(value: object) -> list[object]:
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, (torch.Tensor, *_SYMBOLIC)) else []
