"""Python numbers that count the experts that have tokens.

    for e in range(E):
        token, slot = torch.where(ids == e)
        if token.numel() == 0: continue            assume(n == 0, False)
        used += 1                                  a number in the traced program, not a node in its graph
    return out / used

The marker says what was assumed, but the graph holds only `out / 8`: nobody could see there that 8 is part of the assumption. So
loops in which something was assumed must leave the numbers, strings and flags alone that a later iteration or the code after
the loop reads, attributes of objects (but for tensors made in the loop), and what is not a tensor in lists and dicts. If one has
changed, the frame is traced again without the assumptions of this loop.

Not handled: loops left by `break`, loops in generators (Dynamo's own `enumerate` is one), `len()` of a list of tensors that the
loop appended to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, ConstDictVariable, ListVariable, TensorVariable, VariableTracker

from . import frames
from .liveness import is_generator, live_locals
from .seams import wrap_opcode


def install() -> None:
    wrap_opcode(InstructionTranslatorBase, "FOR_ITER", _compare_constants)


def _compare_constants(original: Callable[..., None]) -> Callable[..., None]:
    def FOR_ITER(self: InstructionTranslatorBase, inst: Instruction) -> None:
        if not frames.ours(self) or is_generator(self.f_code):
            return original(self, inst)
        begun = vars(self).setdefault("_moec_begun", {})
        iterator = self.stack[-1]
        if id(inst) not in begun or begun[id(inst)][0] is not iterator:
            # A loop over hit experts was assumed about just before it began.
            began = [place for place in frames.assumptions(self)[-1:] if place == frames.where(self)]
            kept = (_constants(self), _attributes(self), _objects(self), _containers(self))
            last = self.output.graph._root.prev
            begun[id(inst)] = (iterator, kept, len(frames.assumptions(self)) - len(began), last)
        body = self.instruction_pointer
        original(self, inst)
        if self.instruction_pointer == body:
            return None
        _, (before, attributes, objects, containers), assumed, last = begun.pop(id(inst))
        places = set(frames.assumptions(self)[assumed:])
        if places:
            after = _constants(self)
            counting = [
                name for name in live_locals(self.instructions, inst) & after.keys() if before.get(name) != after[name]
            ]
            counting += sorted(
                name
                for (item, name), value in _attributes(self).items()
                if item in objects and attributes.get((item, name)) is not value and not _made_since(last, value)
            )
            now = _containers(self)
            counting += ["a list" for key, was in containers.items() if _remembers(now.get(key, was), was)]
            if counting:
                frames.retrace_without(places, f"`{min(counting)}` counts or remembers which experts have tokens")
        return None

    return FOR_ITER


def _attributes(tx: InstructionTranslatorBase) -> dict[tuple[int, str], object]:
    """What has been assigned so far to attributes of objects and to cells, by the object's variable."""
    stored = getattr(tx.output.side_effects, "store_attr_mutations", {})
    return {(id(item), name): value for item, values in stored.items() for name, value in values.items()}


def _made_since(last: fx.Node, value: object) -> bool:
    """Whether a tensor was stored that the loop made, after node `last`: the graph returns it, and so shows who made it.

    One that was there before is not: whether it is stored may depend on an expert all the same.
    """
    value = value.unwrap() if isinstance(value, VariableTracker) else value
    if not isinstance(value, TensorVariable) or value.source is not None:
        return False
    node, wanted = last.next, value.as_proxy().node
    while node.op != "root":
        if node is wanted:
            return True
        node = node.next
    return False


def _objects(tx: InstructionTranslatorBase) -> set[int]:
    """The objects that Dynamo knows so far."""
    effects = tx.output.side_effects
    known = getattr(effects, "id_to_variable", {})
    return {id(v) for v in (*known.values(), *getattr(effects, "store_attr_mutations", {}))}


def _containers(tx: InstructionTranslatorBase) -> dict[int, tuple[VariableTracker, ...]]:
    """The items of the lists and dicts that this frame or the user's objects hold."""
    known = getattr(tx.output.side_effects, "id_to_variable", {})
    found = {}
    for value in (*tx.symbolic_locals.values(), *known.values()):
        value = value.unwrap()
        if isinstance(value, ListVariable):
            found[id(value)] = tuple(value.items)
        elif isinstance(value, ConstDictVariable):
            found[id(value)] = (*(k.vt for k in value.items), *value.items.values())
    return found


def _remembers(items: tuple[VariableTracker, ...], before: tuple[VariableTracker, ...]) -> bool:
    """Whether anything but tensors was added: those stay visible in the graph, a number does not."""
    if items[: len(before)] != before:
        return len(items) < len(before) or any(a is not b and not a.is_tensor() for a, b in zip(items, before))
    return any(not item.is_tensor() for item in items[len(before) :])


def _constants(tx: InstructionTranslatorBase) -> dict[str, object]:
    return {name: constant for name, value in tx.symbolic_locals.items() if (constant := _constant(value)) is not None}


def _constant(value: VariableTracker) -> object:
    value = value.unwrap()
    if isinstance(value, ConstantVariable) and value.source is None and value.value is not None:
        return type(value.value), value.value
    return None
