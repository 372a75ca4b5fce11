"""Watching one iteration of a loop for everything but graph nodes that it leaves behind.

Dynamo reports writes to its `SideEffects`; while a `Watch` is open, a write to anything that existed before the iteration is an
escape, except for appending to a list that is a local variable, as long as that list is not read as well. Comparing two
objects by identity, asking for an id or a hash, looking an object up by key and advancing an iterator that was there before are
escapes too. What the iteration teaches the ShapeEnv is remembered by node.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined,import-untyped"
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
from torch import fx
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables import BuiltinVariable, ConstantVariable, ConstDictVariable, ListVariable, VariableTracker
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .indices import COMPARISONS, Index, Uses
from .seams import with_subclasses, wrap, wrap_opcode
from .trees import unmark

try:
    from torch._dynamo.variables.hashable import HashableTracker
except ImportError:  # torch 2.11
    HashableTracker = ConstDictVariable._HashableTracker  # type: ignore[misc]

_WRITES = ("mutation", "store_attr", "store_instance_dict_attr", "store_cell", "store_global", "register_hook")


# The ways into ShapeEnv's knowledge: a range, an equality, an assertion to be made at run time.
_LESSONS = ("_update_var_to_range", "_set_replacement", "guard_or_defer_runtime_assert")


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What nodes taught the ShapeEnv."""

    bounds: dict[fx.Node, set[sympy.Symbol]] = dataclasses.field(default_factory=dict)
    asserts: dict[fx.Node, list[tuple[sympy.Expr, str]]] = dataclasses.field(default_factory=dict)
    others: set[fx.Node] = dataclasses.field(default_factory=set)

    def learn(self, name: str, node: fx.Node, args: tuple[object, ...]) -> None:
        if name == "_update_var_to_range":
            self.bounds.setdefault(node, set()).add(args[0])
        elif name == "guard_or_defer_runtime_assert":
            self.asserts.setdefault(node, []).append((args[0], args[1]))
        else:
            self.others.add(node)


class AppendedList(ListVariable):
    """A list variable under watch: `append` is fine, all else is an escape."""

    @property
    def items(self) -> list[VariableTracker]:
        items, uses = self.__dict__["_watched"]
        if uses is not None:
            uses.escape("a list from before the iteration was read")
        return items

    @items.setter
    def items(self, items: list[VariableTracker]) -> None:
        self.__dict__["_watched"][0][:] = items

    def call_method(
        self, tx: InstructionTranslatorBase, name: str, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
    ) -> VariableTracker:
        items, uses = self.__dict__["_watched"]
        if name != "append":
            uses.escape(f"list.{name}")
            return super().call_method(tx, name, args, kwargs)
        self.__dict__["_watched"] = (items, None)
        try:
            return super().call_method(tx, name, args, kwargs)
        finally:
            self.__dict__["_watched"] = (items, uses)


def items_of(value: VariableTracker) -> list[VariableTracker] | None:
    """The items of a list variable, read without being noticed; None for anything else."""
    if type(value) is AppendedList:
        return value.__dict__["_watched"][0]
    return value.items if type(value) is ListVariable else None


complete = False  # whether everything that can escape is seen; without that no loop is stamped


def install() -> None:
    global complete
    seen = [wrap_opcode(InstructionTranslatorBase, "COMPARE_OP", _note_comparison)]
    seen += [wrap_opcode(InstructionTranslatorBase, name, _note_identity) for name in ("IS_OP", "CONTAINS_OP")]
    seen += [wrap(BuiltinVariable, name, _note_number_of_object) for name in ("call_id", "call_hash")]
    getattr(BuiltinVariable, "call_function_handler_cache", {}).clear()  # it keeps the methods that it found
    iterators = [
        wrap(cls, name, _note_next)
        for cls in with_subclasses(VariableTracker)
        for name in ("next_variable", "tp_iternext_impl")
        if name in vars(cls)
    ]
    seen += [wrap(HashableTracker, "__init__", _note_key), wrap(OutputGraph, "compile_and_call_fx_graph", _close_all)]
    complete = all(seen) and len(iterators) > 1


def _escape(output: OutputGraph, how: str) -> None:
    """Tell every open watch of a frame."""
    for watch in vars(output).get("_moec_watches", ()):
        watch.uses.escape(how)


def _note_number_of_object(original: Callable[..., object]) -> Callable[..., object]:
    """id(expert) and hash(expert) are constants in the trace, and another one for each expert."""

    def call(self: BuiltinVariable, tx: InstructionTranslatorBase, *args: object, **kwargs: object) -> object:
        _escape(tx.output, "an object was asked for its id or hash")
        return original(self, tx, *args, **kwargs)

    return call


def _note_key(original: Callable[..., None]) -> Callable[..., None]:
    """An object that is looked up in a dict or set is there or not; another one need not be."""

    def __init__(self: HashableTracker, vt: VariableTracker) -> None:
        original(self, vt)
        if not isinstance(self.vt.unwrap(), ConstantVariable):
            _escape(InstructionTranslator.current_tx().output, "an object was used as a key")

    return __init__


def _note_next(original: Callable[..., object]) -> Callable[..., object]:
    """An iterator from before the iteration that is advanced in it yields something else next time."""

    def step(self: VariableTracker, tx: InstructionTranslatorBase) -> object:
        for watch in vars(tx.output).get("_moec_watches", ()):
            if self.source is not None or id(self) in watch.reachable:
                watch.uses.escape("an iterator from before the iteration was advanced")
        return original(self, tx)

    return step


def _close_all(original: Callable[..., object]) -> Callable[..., object]:
    """An iteration that left its loop is still being watched when the graph is finished."""

    def compile_and_call_fx_graph(self: OutputGraph, *args: object, **kwargs: object) -> object:
        for watch in list(vars(self).get("_moec_watches", ())):
            watch.close()
            unmark(self.graph.nodes)
        return original(self, *args, **kwargs)

    return compile_and_call_fx_graph


def _note_comparison(original: Callable[..., None]) -> Callable[..., None]:
    """A watched number may be compared with a constant; the answer must then be the same for every number."""

    def COMPARE_OP(self: InstructionTranslatorBase, inst: Instruction) -> None:
        left, right = self.stack[-2:]
        if inst.argval in COMPARISONS and isinstance(left, Index) and left.uses is not None:
            bound = right.as_python_constant() if right.is_python_constant() and not isinstance(right, Index) else None
            if type(bound) is int:
                answer = COMPARISONS[inst.argval](left._number, bound)
                left.uses.compared.append((left.path, inst.argval, bound, answer))
                self.popn(2)
                return self.push(ConstantVariable.create(answer))
        return original(self, inst)

    return COMPARE_OP


def _note_identity(original: Callable[..., None]) -> Callable[..., None]:
    """`expert is self.special` is decided while tracing; only comparisons with constants are sure to come out alike."""

    def compare(self: InstructionTranslatorBase, inst: Instruction) -> None:
        operands = self.stack[-2:]
        constant = (
            operands[0] if inst.opname == "CONTAINS_OP" else next((x for x in operands if x.is_python_constant()), None)
        )
        if constant is None or not constant.is_python_constant():
            _escape(self.output, "an object was compared by identity")
        return original(self, inst)

    return compare


class Watch:
    def __init__(self, tx: InstructionTranslatorBase, uses: Uses, depth: int) -> None:
        self.uses = uses
        self.lessons = Lessons()
        effects = tx.output.side_effects
        self.known_objects = set(effects.id_to_variable)
        self._undo: list[Callable[[], None]] = []
        vars(tx.output).setdefault("_moec_watches", []).append(self)
        self._undo.append(lambda: tx.output._moec_watches.remove(self))
        before = self.reachable = _reachable(tx)
        for value in tx.stack[:depth]:
            if type(value) is ListVariable:
                before.pop(id(value))  # a comprehension's list, which nothing but the loop can reach
        for name in _WRITES:
            if hasattr(effects, name):
                self._replace(effects, name, self._reporting(getattr(effects, name), name, before))
        for name in _LESSONS:
            if hasattr(tx.output.shape_env, name):
                self._replace(tx.output.shape_env, name, self._remembering(tx, name))
        for value in tx.symbolic_locals.values():
            if type(value) is ListVariable and value.source is None:
                self._watch_list(value)

    def close(self) -> None:
        self.uses.watching = False
        for undo in reversed(self._undo):
            undo()

    def _reporting(
        self, original: Callable[..., object], name: str, before: dict[int, object]
    ) -> Callable[..., object]:
        def write(target: VariableTracker, *args: object, **kwargs: object) -> object:
            if id(target) in before and type(target) is not AppendedList:
                self.uses.escape(f"{name} of {target}")
            return original(target, *args, **kwargs)

        return write

    def _remembering(self, tx: InstructionTranslatorBase, name: str) -> Callable[..., object]:
        env, graph = tx.output.shape_env, tx.output.graph
        original = getattr(env, name)

        def teach(*args: object, **kwargs: object) -> object:
            before = _knowledge(env, args[0])
            try:
                return original(*args, **kwargs)
            finally:
                if _knowledge(env, args[0]) != before:
                    self.lessons.learn(name, graph._root.prev, args)

        return teach

    def _replace(self, owner: object, name: str, value: object) -> None:
        """Shadow a method on the instance until the watch is closed."""
        shadowed = vars(owner).get(name)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if shadowed is None else setattr(owner, name, shadowed))

    def _watch_list(self, value: ListVariable) -> None:
        items = value.__dict__.pop("items")
        value.__dict__["_watched"] = (items, self.uses)
        value.__class__ = AppendedList

        def undo() -> None:
            value.__class__ = ListVariable
            value.__dict__["items"] = value.__dict__.pop("_watched")[0]

        self._undo.append(undo)


def _knowledge(env: ShapeEnv, symbol: object) -> tuple[object, ...]:
    asserts = sum(map(len, env.deferred_runtime_asserts.values()))
    return env.var_to_range.get(symbol), len(env.replacements), env.replacements.get(symbol), asserts


def _reachable(tx: InstructionTranslatorBase) -> dict[int, object]:
    """All variables that exist and can be written to, by id (and kept alive, so that ids stay theirs)."""
    found: dict[int, object] = {}
    effects = tx.output.side_effects
    roots: list[object] = [list(effects.id_to_variable.values())]
    roots += [list(attributes.values()) for attributes in effects.store_attr_mutations.values()]
    frame: InstructionTranslatorBase | None = tx
    while frame is not None:
        roots += [list(frame.symbolic_locals.values()), list(frame.stack), list(frame.symbolic_globals.values())]
        frame = frame.parent
    VariableTracker.visit(lambda variable: None, roots, found)
    return found
