"""Python numbers that count the experts that have tokens.

    for e in range(E):
        token, slot = torch.where(ids == e)
        if token.numel() == 0: continue            assume(n == 0, False)
        used += 1                                  a number in the traced program, not a node in its graph
    return out / used

The marker says what was assumed, but the graph holds only `out / 8`: nobody could see there that 8 is part of the assumption. So
loops in which something was assumed must leave the numbers, strings and flags alone that a later iteration or the code after
the loop reads. If one has changed, the frame is traced again without the assumptions of this loop.

Not handled: loops left by `break`, loops in generators (Dynamo's own `enumerate` is one), `len()` of a list that the loop
appended to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, VariableTracker

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
            begun[id(inst)] = (iterator, _constants(self), len(frames.assumptions(self)) - len(began))
        body = self.instruction_pointer
        original(self, inst)
        if self.instruction_pointer == body:
            return None
        _, before, assumed = begun.pop(id(inst))
        places = set(frames.assumptions(self)[assumed:])
        if places:
            after = _constants(self)
            counting = [
                name for name in live_locals(self.instructions, inst) & after.keys() if before.get(name) != after[name]
            ]
            if counting:
                frames.retrace_without(places, f"`{min(counting)}` counts or remembers which experts have tokens")
        return None

    return FOR_ITER


def _constants(tx: InstructionTranslatorBase) -> dict[str, object]:
    return {name: constant for name, value in tx.symbolic_locals.items() if (constant := _constant(value)) is not None}


def _constant(value: VariableTracker) -> object:
    value = value.unwrap()
    if isinstance(value, ConstantVariable) and value.source is None and value.value is not None:
        return type(value.value), value.value
    return None
