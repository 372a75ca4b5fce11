"""One traced iteration of a loop, made into a stamp.

    iteration 1                        iteration 2                        stamp
    w = experts.1.weight               w = experts.2.weight               w = experts.{j}.weight
    m = ids == 1                       m = ids == 2                       m = ids == {j}
    o1 = index_add(o0, 0, t, ...)      o2 = index_add(o1, 0, t, ...)      o{j} = index_add(o{j-1}, 0, t, ...)

`read` puts two consecutive iterations side by side. An operand is the same in both, or a node at the same place of its own
or of the previous iteration, or what the iterator yielded, or its number, or a tensor whose name differs in the iteration's
key. Anything else, and there is no stamp. `press` writes the nodes of iteration j.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,call-overload"
from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import Guard, Source

from . import twins
from .fakes import Resizer
from .indices import Mark, Path
from .trees import NoStamp, map_leaves, zip_leaves

_OWN, _PREVIOUS, _ITEM, _NUMBER, _NAMED = "own", "previous", "item", "number", "named"


@dataclasses.dataclass(frozen=True)
class Ref:
    """A varying operand: its kind, and the position, path or placeholder that tells which."""

    kind: str
    which: object


@dataclasses.dataclass(frozen=True)
class Yielded:
    """What the iterator yielded: the leaves of the (nested) tuple by path, as numbers, graph nodes and names of objects."""

    numbers: dict[Path, int]
    nodes: dict[Path, fx.Node]
    sources: dict[Path, Source]


@dataclasses.dataclass(frozen=True)
class Stamp:
    nodes: list[fx.Node]  # of iteration 2
    operands: list[tuple[object, object]]  # their args and kwargs, with Refs in them
    named: list[fx.Node]  # placeholders behind _NAMED operands, in the order they were lifted
    yielded: dict[fx.Node, Path]  # what the iterator gave to iteration 2
    guards: list[Guard]  # of iteration 2, about its objects
    resizer: Resizer
    borrow: bool = False  # see `fakes`
    lasting: frozenset[int] = frozenset()  # positions of nodes that the code after the loop can reach

    def press(
        self, tx: InstructionTranslatorBase, item: Yielded, names: dict[Source, Source], previous: list[fx.Node]
    ) -> list[fx.Node]:
        """Write the iteration that got `item`: `names` are its objects' names by those in iteration 2."""
        lifted = {}
        renamed: dict[int, Source] = {}
        for node in self.named:
            source = twins.rename(source_of(node), names, renamed)
            lifted[node] = VariableBuilder(tx, source)(twins.resolve(tx, source)).as_proxy().node
        twins.repeat_guards(tx, self.guards, names, renamed)

        written: list[fx.Node] = []
        look_up: dict[str, Callable[..., object]] = {
            _OWN: written.__getitem__,
            _PREVIOUS: previous.__getitem__,
            _ITEM: item.nodes.__getitem__,
            _NUMBER: item.numbers.__getitem__,
            _NAMED: lifted.__getitem__,
        }

        def fill(leaf: object) -> object:
            return look_up[leaf.kind](leaf.which) if isinstance(leaf, Ref) else leaf

        values = self.resizer.start(tx, lambda node: item.nodes[self.yielded[node]])
        for place, (model, (args, kwargs)) in enumerate(zip(self.nodes, self.operands)):
            node = tx.output.graph.create_node(model.op, model.target, map_leaves(args, fill), map_leaves(kwargs, fill))
            node.meta.update((k, v) for k, v in model.meta.items() if k not in ("example_value", "unbacked_bindings"))
            if "example_value" in model.meta:
                if self.borrow and place not in self.lasting:
                    values.borrow(model, node)
                else:
                    values.set_value(model, node)
            written.append(node)
        return written


def read(
    first: list[fx.Node],
    second: list[fx.Node],
    items: tuple[Yielded, Yielded],
    names: dict[Source, Source],
    guards: list[Guard],
    resizer: Resizer,
) -> Stamp:
    """The stamp of two consecutive iterations; `names` are those of iteration 1 by those of 2. Raises NoStamp."""
    if len(first) != len(second):
        raise NoStamp(f"{len(first)} nodes, then {len(second)}")
    place = [{node: i for i, node in enumerate(nodes)} for nodes in (first, second)]
    yielded = {node: path for path, node in items[1].nodes.items()}
    named: dict[fx.Node, None] = {}

    def varying(a: object, b: object) -> object:
        if isinstance(b, fx.Node):
            return node(a, b)
        if type(b) is Mark:
            if a != items[0].numbers[b.path]:
                raise NoStamp("a number stands elsewhere")
            return Ref(_NUMBER, b.path)
        if a is not b and (type(a) is not type(b) or a != b):
            raise NoStamp(f"the constant {a} became {b}")
        return b

    def node(a: object, b: fx.Node) -> object:
        if b in place[1]:
            if place[0].get(a) != place[1][b]:
                raise NoStamp("wired differently")
            return Ref(_OWN, place[1][b])
        if b in place[0]:
            if a in place[0]:
                raise NoStamp("wired differently")
            return Ref(_PREVIOUS, place[0][b])
        if b in yielded:
            if a is b or a is not items[0].nodes[yielded[b]]:
                raise NoStamp("the iterator's value is used in two ways")
            return Ref(_ITEM, yielded[b])
        if a is b:
            return b
        if b.op == "placeholder" and isinstance(a, fx.Node) and a.op == "placeholder":
            if twins.rename(source_of(b), names) != source_of(a):
                raise NoStamp(f"{b} is not named by the iteration")
            named[b] = None
            return Ref(_NAMED, b)
        raise NoStamp(f"{a} became {b}")

    operands = []
    for a, b in zip(first, second):
        if (a.op, a.target) != (b.op, b.target):
            raise NoStamp(f"{a.target} became {b.target}")
        operands.append((zip_leaves(a.args, b.args, varying), zip_leaves(a.kwargs, b.kwargs, varying)))
    order = (
        {placeholder: i for i, placeholder in enumerate(second[0].graph.find_nodes(op="placeholder"))} if named else {}
    )
    return Stamp(second, operands, sorted(named, key=order.__getitem__), yielded, guards, resizer)


def source_of(placeholder: fx.Node) -> Source:
    return placeholder.meta["grapharg"].source
