"""Which local variables are read before they are written, from an instruction on.

Dynamo's own analysis counts every variable that is read anywhere behind a jump as live, loop variables among them; to know what a
loop hands from one iteration to the next, the exact answer is needed. What an unknown instruction does counts as a read.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import inspect

from torch._dynamo.bytecode_analysis import JUMP_OPCODES, TERMINAL_OPCODES
from torch._dynamo.bytecode_transformation import Instruction


def live_locals(instructions: list[Instruction], start: Instruction) -> set[str]:
    """The classic backward analysis: live(i) = reads(i) | (live(successors) - writes(i)), to the fixed point."""
    index = {id(inst): i for i, inst in enumerate(instructions)}
    effects = [_effects(inst) for inst in instructions]
    successors = [_successors(inst, i, index) for i, inst in enumerate(instructions)]
    live: list[set[str]] = [set() for _ in instructions]
    changed = True
    while changed:
        changed = False
        for i in range(len(instructions) - 1, -1, -1):
            reads, writes = effects[i]
            after = set().union(*(live[j] for j in successors[i])) if successors[i] else set()
            now = reads | (after - writes)
            if now != live[i]:
                live[i], changed = now, True
    return live[index[id(start)]]


def _effects(inst: Instruction) -> tuple[set[str], set[str]]:
    """Names read and names written; none for what does not touch local variables."""
    names = inst.argval if isinstance(inst.argval, tuple) else (inst.argval,)
    parts = inst.opname.split("_FAST")
    if len(parts) == 1 or not all(isinstance(name, str) for name in names):
        return set(), set()
    if inst.opname == "STORE_FAST":
        return set(), set(names)
    if inst.opname == "STORE_FAST_STORE_FAST":
        return set(), set(names)
    if inst.opname == "STORE_FAST_LOAD_FAST":
        return {names[1]} - {names[0]}, {names[0]}
    return set(names), set()


def _successors(inst: Instruction, i: int, index: dict[int, int]) -> list[int]:
    following = [] if inst.opcode in TERMINAL_OPCODES or i + 1 == len(index) else [i + 1]
    if inst.opcode in JUMP_OPCODES and inst.target is not None:
        following.append(index[id(inst.target)])
    if inst.exn_tab_entry is not None:
        following.append(index[id(inst.exn_tab_entry.target)])
    return following


def is_generator(code: object) -> bool:
    return bool(code.co_flags & inspect.CO_GENERATOR)
