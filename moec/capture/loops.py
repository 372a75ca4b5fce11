"""Loops over equal experts, traced three times instead of E times.

    for e in range(128):                          iterations 0, 1, 2: traced as always
        token, slot = torch.where(ids == e)       iterations 3 ... 127: the nodes of iteration 2, stamped again
        out[token] += self.experts[e](x[token])

Iteration 0 warms up (it builds what Dynamo builds once), 1 and 2 are compared (`stamp`), and 2 is watched: its number may only
go into the graph, look up children of ModuleLists and be compared with constants (`indices`); lists may only be appended
to; nothing else that was there before may change. What iteration j reads must be what iteration 2 read, but for the weights
(`twins`). Then running the bytecode again could only write the same nodes, and they are written without running it.

If any of this does not hold, the loop is traced as always; if it stops holding at some expert, that one is traced and the
loop is looked at afresh from there on. The graph is the same in either case.

Not handled: loops in the body of a higher-order op (checkpointing), a loop variable that is read after the loop, Python numbers
that change from iteration to iteration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import fx
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, ListVariable, SymNodeVariable, TensorVariable, TupleVariable, VariableTracker
from torch._dynamo.variables.base import AttributeMutationNew
from torch._guards import Guard, Source

from . import frames, stamp, twins, watch
from .fakes import Resizer
from .hits import HitId, HitRow
from .indices import COMPARISONS, Index, Path, Uses
from .liveness import is_generator, live_locals
from .seams import log, wrap_opcode
from .stamp import NoStamp, Yielded

_stamping = True


@contextlib.contextmanager
def stamping(on: bool) -> Iterator[None]:
    """Switch the stamping of equal iterations on or off (the graphs are the same, tracing is slower without)."""
    global _stamping
    before, _stamping = _stamping, on
    try:
        yield
    finally:
        _stamping = before


def install() -> None:
    if sys.version_info < (3, 15):  # 3.15 keeps two values on the stack for an iterator
        wrap_opcode(InstructionTranslatorBase, "FOR_ITER", _stamp_equal_iterations)


def _stamp_equal_iterations(original: Callable[..., None]) -> Callable[..., None]:
    def FOR_ITER(self: InstructionTranslatorBase, inst: Instruction) -> None:
        if not (_stamping and frames.ours(self) and self.output.current_tracer.parent is None) or is_generator(self.f_code):
            return original(self, inst)
        loops = vars(self).setdefault("_moec_loops", {})
        iterator = self.stack[-1].realize()
        loop = loops.get(id(inst))
        if loop is None or loop.iterator is not iterator:
            loop = loops[id(inst)] = Loop(self, iterator)
        loop.body_ended()
        while True:
            body = self.instruction_pointer
            original(self, inst)
            if self.instruction_pointer != body:  # it jumped: the iterator is exhausted
                loop.settle()
                del loops[id(inst)]
                return None
            if not loop.stamped():
                return loop.body_begins()
            self.pop()

    return FOR_ITER


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


class Loop:
    def __init__(self, tx: InstructionTranslatorBase, iterator: VariableTracker) -> None:
        self.tx, self.iterator, self.depth = tx, iterator, len(tx.stack) - 1
        self.hopeless = False
        self._start_over()

    def _start_over(self) -> None:
        self.moments: list[Moment] = []
        self.items: list[Yielded] = []
        self.watched: watch.Watch | None = None
        self.lesson: Lesson | None = None

    def _give_up(self, why: NoStamp) -> None:
        log.debug("moec.capture: %s: loop not stamped: %s", frames.where(self.tx), why)
        self.hopeless = True

    def body_ended(self) -> None:
        if self.hopeless or self.lesson is not None:
            return
        self.moments.append(Moment.now(self.tx, self.depth))
        if self.watched is not None:
            self.watched.close()
            try:
                self.lesson = Lesson.learned(self.tx, self.moments, self.items, self.watched)
            except NoStamp as why:
                self._give_up(why)
            finally:
                stamp.unmark(self.moments[2].nodes_until(self.moments[3]))

    def body_begins(self) -> None:
        if self.hopeless:
            return
        if not self.moments:  # after an iteration that was not like the others
            self.moments.append(Moment.now(self.tx, self.depth))
        try:
            if self.tx.output.graph._root.prev is not self.moments[-1].last:
                raise NoStamp("the iterator itself computes")
            self.items.append(leaves(self.tx.stack[-1]))
        except NoStamp as why:
            return self._give_up(why)
        if len(self.items) == 3:
            uses = Uses(self.tx.output)
            self.tx.stack[-1] = watched_value(self.tx.stack[-1], uses)
            self.watched = watch.Watch(self.tx, uses, self.depth)

    def stamped(self) -> bool:
        """Write the iteration whose value is on the stack, if it is like the ones before."""
        if self.lesson is None:
            return False
        try:
            self.lesson.repeat(self.tx, leaves(self.tx.stack[-1]))
        except NoStamp as why:
            log.debug("moec.capture: %s: an iteration is traced on its own: %s", frames.where(self.tx), why)
            self.settle()
            self._start_over()
            return False
        return True

    def settle(self) -> None:
        """Give the local variables their values of the last iteration."""
        if self.lesson is not None:
            self.lesson.settle(self.tx)


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
    def learned(tx: InstructionTranslatorBase, moments: list[Moment], items: list[Yielded], watched: watch.Watch) -> Lesson:
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
        about = [guard for guard in guards if twins.rename_all(guard.originating_source, names) is not guard.originating_source]
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
            if old is new or _equal_constants(old, new):
                continue
            try:
                self.carried[name] = position(name, old, new)
            except NoStamp:
                if name in live:
                    raise
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

    def repeat(self, tx: InstructionTranslatorBase, item: Yielded) -> None:
        names = self.checked_names(tx, item)
        self.previous = self.stamp.press(tx, item, names, self.previous)
        for values, places in self.appended:
            values.items.extend(_variable(tx, self.models[place], self.previous[place]) for place in places)

    def settle(self, tx: InstructionTranslatorBase) -> None:
        if self.previous is not self.stamp.nodes:
            fresh = {place: _variable(tx, self.models[place], self.previous[place]) for place in set(self.carried.values())}
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


def leaves(value: VariableTracker) -> Yielded:
    """What the iterator yielded, taken apart."""
    found = Yielded({}, {}, {})

    def visit(part: VariableTracker, path: Path) -> None:
        if type(part) is TupleVariable:
            for i, item in enumerate(part.items):
                visit(item, (*path, i))
        elif isinstance(part, HitRow):
            found.numbers[path] = part.expert
        elif isinstance(part, HitId):
            found.numbers[path] = part._number
        elif type(part) is ConstantVariable and type(part.value) is int and part.source is None:
            found.numbers[path] = part.value
        elif type(part) in (TensorVariable, SymNodeVariable):
            found.nodes[path] = part.as_proxy().node
        elif part.source is not None:
            found.sources[path] = part.source
        else:
            raise NoStamp(f"the iterator yields {part}")

    visit(value, ())
    if len(set(found.nodes.values())) != len(found.nodes):
        raise NoStamp("the iterator yields one tensor twice")
    return found


def watched_value(value: VariableTracker, uses: Uses, path: Path = ()) -> VariableTracker:
    """`value` with its numbers replaced by ones that report what is done with them."""
    if type(value) is TupleVariable:
        return TupleVariable([watched_value(item, uses, (*path, i)) for i, item in enumerate(value.items)])
    if isinstance(value, HitRow):
        return HitRow(value.expert, uses, path)
    if isinstance(value, HitId):
        return HitId(value._number, uses, path)
    if type(value) is ConstantVariable and type(value.value) is int:
        return Index(value.value, uses, path)
    return value


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
    parts = {part for source in sources for part in twins.parts(source)}
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
        return isinstance(x, torch.SymInt) and _only_data_differ(x, y)
    same = all(getattr(x, what) == getattr(y, what) for what in ("dtype", "device", "layout", "requires_grad"))
    return same and x.dim() == y.dim() and all(map(_only_data_differ, (*x.shape, *x.stride()), (*y.shape, *y.stride())))


def _only_data_differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt):
        return type(a) is type(b) and a == b
    if a.node.expr == b.node.expr:
        return True
    env = a.node.shape_env
    symbols = a.node.expr.free_symbols | b.node.expr.free_symbols
    return all(map(env.is_unbacked_symint, symbols)) and env.bound_sympy(a.node.expr) == env.bound_sympy(b.node.expr)
