"""Whether a branch that steps over an expert without tokens does nothing else.

    if n == 0: continue                 fine: straight on to the next iteration
    if n > 0: out[i] += f(x[i])         fine: straight on to the statement after it
    if n == 0: empty += 1; continue     not fine: the branch that is not traced does work
    if n == 0: break                    not fine

Only the branch taken with tokens is traced, so what the other one does has to be read off the bytecode: it must lead, over jumps
alone, to the head of a `for` loop, or to where the traced branch arrives as well. Anything else is left to break the graph.
"""

from __future__ import annotations

from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase

_NOTHING = ("NOP", "CACHE", "EXTENDED_ARG", "RESUME", "NOT_TAKEN")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")


def steps_over(tx: InstructionTranslatorBase, inst: Instruction, some: bool) -> bool:
    """Whether the jump `inst`, answered with `some` when there are tokens, does nothing when there are none."""
    beyond = tx.instruction_pointer
    if beyond is None or inst.target is None:
        return False
    jumped = tx.indexof[inst.target]
    jumps_if_true = "IF_TRUE" in inst.opname
    with_tokens, without = (jumped, beyond) if some == jumps_if_true else (beyond, jumped)
    arrives = _destination(tx, without)
    if arrives is None:
        return False
    return tx.instructions[arrives].opname == "FOR_ITER" or _falls_into(tx, with_tokens, arrives)


def _destination(tx: InstructionTranslatorBase, at: int) -> int | None:
    """The first instruction from `at` on that does something, jumps followed."""
    for _ in range(len(tx.instructions)):
        if at >= len(tx.instructions):
            return None
        inst = tx.instructions[at]
        if inst.opname in _NOTHING:
            at += 1
        elif inst.opname.startswith("JUMP") and "_IF_" not in inst.opname and inst.target is not None:
            at = tx.indexof[inst.target]
        else:
            return at
    return None


def _falls_into(tx: InstructionTranslatorBase, start: int, end: int) -> bool:
    """Whether the straight code from `start` runs into `end` and can leave nowhere else."""
    if start >= end:
        return False
    for at in range(start, end):
        inst = tx.instructions[at]
        if inst.opname in _ENDS:
            return False
        if inst.target is not None and not start <= tx.indexof[inst.target] <= end:
            return False
    last = next(
        (tx.instructions[at] for at in range(end - 1, start - 1, -1) if tx.instructions[at].opname not in _NOTHING),
        None,
    )
    return last is None or not (last.opname.startswith("JUMP") and "_IF_" not in last.opname)
