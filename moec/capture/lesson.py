"""What three traced iterations of a loop teach: how to write the next one, and when not to.

`Lesson.learned` takes the state before, between and after the iterations 1 and 2 and what was seen while iteration 2 was
watched. Variables that a later iteration or the code after the loop reads must be unchanged, or computed at the same place of
both iterations. `checked_names` looks at all that iteration j could read differently, and only then `repeat` writes.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined,index,union-attr"
from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, SymNodeVariable, TensorVariable, VariableTracker
from torch._dynamo.variables.base import AttributeMutationNew
from torch._guards import Guard, Source

from . import frames, seams, stamp, twins, watch
from .fakes import Resizer, only_data_differ
from .indices import COMPARISONS, Path, Uses
from .liveness import live_locals
from .stamp import Yielded
from .trees import NoStamp


@dataclasses.dataclass(frozen=True)
class Moment:
    """The state between two iterations."""

    last: fx.Node
    locals: dict[str, VariableTracker]
    stack: list[VariableTracker]
    lists: dict[int, tuple[VariableTracker, int]]  # by id: the lists among these, and their lengths
    guards: int
    size_guards: int

    @staticmethod
    def now(tx: InstructionTranslatorBase, depth: int) -> Moment:
        output = tx.output
        lists = {
            id(value): (value, len(items))
            for value in (*tx.symbolic_locals.values(), *tx.stack[:depth])
            if (items := watch.items_of(value)) is not None
        }
        last = output.graph._root.prev
        guards = len(output.guards), len(output.shape_env.guards)
        return Moment(last, dict(tx.symbolic_locals), tx.stack[:depth], lists, *guards)

    def nodes_until(self, end: Moment) -> list[fx.Node]:
        nodes, node = [], self.last
        while node is not end.last:
            node = node.next
            nodes.append(node)
        return nodes


@dataclasses.dataclass
class Lesson:
    """What three traced iterations taught: how to write the next one."""

    stamp: stamp.Stamp
    item: Yielded  # of iteration 2
    elements: dict[Path, tuple[Source, twins.Field]]  # elements with a name, and where in it the key stands
    children: dict[Source, Path]  # names of children that a number looked up
    known: dict[Source, bool]  # whether the object was seen before its iteration
    compared: list[tuple[Path, str, int, bool]]
    carried: dict[str, int]  # local variable -> position of its node
    appended: list[tuple[VariableTracker, list[int]]]  # lists, and the positions of the nodes appended
    models: dict[int, VariableTracker]  # by position, for carried and appended values
    previous: list[fx.Node]

    @staticmethod
    def learned(
        tx: InstructionTranslatorBase, moments: list[Moment], items: list[Yielded], watched: watch.Watch
    ) -> Lesson:
        _, before, between, after = moments
        if watched.uses.escaped is not None:
            raise NoStamp(watched.uses.escaped)
        if not (_same(before.stack, between.stack) and _same(between.stack, after.stack)):
            raise NoStamp("the stack changes")
        if between.size_guards != after.size_guards:
            raise NoStamp("a guard on sizes")
        first, second = before.nodes_until(between), between.nodes_until(after)
        guards = list(itertools.islice(tx.output.guards, between.guards, after.guards))
        lesson = Lesson(
            stamp=None,
            item=items[2],
            elements=_elements(items[1], items[2]),
            children=_children(tx, items[2], watched.uses, guards, second),
            known={},
            compared=watched.uses.compared,
            carried={},
            appended=[],
            models={},
            previous=second,
        )
        names = lesson.names(items[1])
        done: dict[int, Source] = {}
        about = [g for g in guards if twins.rename(g.originating_source, names, done) is not g.originating_source]
        if any(map(twins.mentions_others, about)):
            raise NoStamp("a guard compares two objects")
        lesson.stamp = stamp.read(
            first,
            second,
            (items[1], items[2]),
            names,
            about,
            Resizer.of(first, second, [list(item.nodes.values()) for item in items], watched.lessons),
        )
        lesson.known = {old: id(twins.resolve(tx, old)) in watched.known_objects for old in names}
        lesson._learn_variables(tx, before, between, after, first, second)
        lasting = frozenset(lesson.models)
        if seams.borrowing_on and frames.may_borrow(tx) and lesson.stamp.resizer.may_borrow(second, lasting):
            lesson.stamp = dataclasses.replace(lesson.stamp, borrow=True, lasting=lasting)
        return lesson

    def _learn_variables(
        self,
        tx: InstructionTranslatorBase,
        before: Moment,
        between: Moment,
        after: Moment,
        first: list[fx.Node],
        second: list[fx.Node],
    ) -> None:
        place = [{node: i for i, node in enumerate(nodes)} for nodes in (first, second)]

        def position(name: str, old: VariableTracker, new: VariableTracker) -> int:
            """Where in its iteration a variable was computed; the same place for both."""
            found = place[1].get(_node(new), -1)
            if found < 0 or place[0].get(_node(old), -1) != found or not _alike_variables(old, new):
                raise NoStamp(f"{name} changes")
            self.models[found] = new
            return found

        live = live_locals(tx.instructions, tx.current_instruction)
        for name, new in after.locals.items():
            old = between.locals.get(name)
            if name in live and old is not new and not _equal_constants(old, new):
                self.carried[name] = position(name, old, new)
        if not live & between.locals.keys() <= after.locals.keys():
            raise NoStamp("a variable disappears")
        for values, length in after.lists.values():
            start, middle = (moment.lists.get(id(values), (None, -1))[1] for moment in (before, between))
            if start == length or start < 0:
                continue  # lists that an iteration makes for itself are covered as variables
            items = watch.items_of(values)
            if middle - start != length - middle:
                raise NoStamp("a list grows unevenly")
            places = [position("a list", old, new) for old, new in zip(items[start:middle], items[middle:length])]
            self.appended.append((values, places))

    def repeat(self, tx: InstructionTranslatorBase, item: Yielded, names: dict[Source, Source]) -> None:
        """Write the iteration that got `item`; `names` are its `checked_names`."""
        self.previous = self.stamp.press(tx, item, names, self.previous)
        for values, places in self.appended:
            values.items.extend(_variable(tx, self.models[place], self.previous[place]) for place in places)

    def settle(self, tx: InstructionTranslatorBase) -> None:
        """Give the local variables the values that they have after the last iteration written."""
        if self.previous is not self.stamp.nodes:
            fresh = {
                place: _variable(tx, self.models[place], self.previous[place]) for place in set(self.carried.values())
            }
            tx.symbolic_locals.update({name: fresh[place] for name, place in self.carried.items()})

    def names(self, item: Yielded) -> dict[Source, Source]:
        """The names of the iteration's objects, by those of iteration 2."""
        names = {}
        for path, (element, way) in self.elements.items():
            found = list(twins.differences(element, item.sources[path]))
            if [field for field, *_ in found] != ([way] if way else []):
                raise NoStamp("an element is named in another way")
            if way:
                names[twins.prefix(element, way)] = twins.prefix(item.sources[path], way)
        for child, path in self.children.items():
            field = _key_field(child, self.item.numbers[path])
            names[child] = dataclasses.replace(child, **{field: type(getattr(child, field))(item.numbers[path])})
        return names

    def checked_names(self, tx: InstructionTranslatorBase, item: Yielded) -> dict[Source, Source]:
        """`names`, if all that the iteration reads is what iteration 2 read; raises NoStamp otherwise."""
        if item.numbers.keys() != self.item.numbers.keys() or item.sources.keys() != self.item.sources.keys():
            raise NoStamp("the iterator yields something else")
        if item.nodes.keys() != self.item.nodes.keys() or not all(
            _alike_values(node, item.nodes[path]) for path, node in self.item.nodes.items()
        ):
            raise NoStamp("the iterator yields another kind of tensor")
        for path, op, bound, answer in self.compared:
            if COMPARISONS[op](item.numbers[path], bound) is not answer:
                raise NoStamp(f"{item.numbers[path]} {op} {bound}")
        names = self.names(item)
        for old, new in names.items():
            try:
                model, value = twins.resolve(tx, old), twins.resolve(tx, new)
            except (LookupError, AttributeError) as missing:
                raise NoStamp(f"no such object: {missing}") from missing
            if (id(value) in tx.output.side_effects.id_to_variable) != self.known[old]:
                raise NoStamp("the object was met before")
            if not twins.alike(model, value):
                raise NoStamp(f"{new} differs from {old}")
        return names


def _elements(first: Yielded, second: Yielded) -> dict[Path, tuple[Source, twins.Field]]:
    elements = {}
    for path, source in second.sources.items():
        found = list(twins.differences(first.sources[path], source)) if path in first.sources else []
        if len(found) != 1 or not found[0][0]:
            raise NoStamp("elements are not named by one key")
        elements[path] = (source, found[0][0])
    return elements


def _children(
    tx: InstructionTranslatorBase, item: Yielded, uses: Uses, guards: list[Guard], nodes: list[fx.Node]
) -> dict[Source, Path]:
    """The names, in guards and parameters, of what the number looked up in ModuleLists."""
    children: dict[Source, Path] = {}
    inputs = {operand for node in nodes for operand in node.all_input_nodes if operand.op == "placeholder"}
    sources = [guard.originating_source for guard in guards] + [
        stamp.source_of(node) for node in inputs if "grapharg" in node.meta
    ]
    parts = set(twins.parts(sources))
    for path, containers in uses.looked_up.items():
        number = item.numbers[path]
        for container in set(containers):
            child = twins.resolve(tx, container)[number]
            found = [part for part in parts if _key_field(part, number) and twins.resolve(tx, part) is child]
            if not found:
                raise NoStamp("cannot tell what a number looked up")
            children.update((part, path) for part in found)
    return children


def _key_field(source: Source, number: int) -> str | None:
    for field in ("index", "member"):
        key = getattr(source, field, None)
        if type(key) in (int, str) and str(key) == str(number):
            return field
    return None


def _variable(tx: InstructionTranslatorBase, model: VariableTracker, node: fx.Node) -> VariableTracker:
    """A variable for `node`, like `model`."""
    proxy = tx.output.current_tracer.proxy(node)
    if isinstance(model, SymNodeVariable):
        return SymNodeVariable.create(tx, proxy, node.meta.pop("example_value"))
    value = node.meta["example_value"]
    if value.requires_grad and value.is_leaf:
        with tx.fake_mode:  # code after the loop may write into it, which a leaf forbids
            copied = value.clone().as_strided(value.shape, value.stride(), value.storage_offset())
        node.meta["example_value"] = copied
    variable = model.clone(proxy=proxy, mutation_type=None)
    tx.output.side_effects._track_obj(proxy, variable, mutation_type_cls=AttributeMutationNew)
    return variable


def _node(variable: VariableTracker | None) -> fx.Node | None:
    return variable.as_proxy().node if type(variable) in (TensorVariable, SymNodeVariable) else None


def _same(a: list[object], b: list[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def _equal_constants(a: VariableTracker | None, b: VariableTracker | None) -> bool:
    return (
        type(a) is ConstantVariable
        and type(b) is ConstantVariable
        and type(a.value) is type(b.value)
        and a.value == b.value
    )


def _alike_variables(a: VariableTracker, b: VariableTracker) -> bool:
    """Whether Python code sees no difference between two variables, up to sizes that only the data know."""
    if type(a) is not type(b):
        return False
    if isinstance(a, SymNodeVariable):
        return a.python_type() is b.python_type()
    statics = ("dtype", "device", "layout", "ndim", "_size", "requires_grad", "class_type", "has_grad_fn")
    return all(getattr(a, what) == getattr(b, what) for what in statics) and _alike_values(_node(a), _node(b))


def _alike_values(a: fx.Node, b: fx.Node) -> bool:
    """The same for the example values of two nodes."""
    x, y = a.meta.get("example_value"), b.meta.get("example_value")
    if type(x) is not type(y):
        return False
    if not isinstance(x, torch.Tensor):
        return isinstance(x, torch.SymInt) and only_data_differ(x, y)
    same = all(getattr(x, what) == getattr(y, what) for what in ("dtype", "device", "layout", "requires_grad"))
    return same and x.dim() == y.dim() and all(map(only_data_differ, (*x.shape, *x.stride()), (*y.shape, *y.stride())))
