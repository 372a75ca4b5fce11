"""Branches on "are there tokens?", answered while tracing.

    if top_x.shape[0] == 0: continue        assume(n == 0, False)
    if mask.any():                          assume(mask.any(), True)
    if counts[e]:                           assume(counts[e], True)

Dynamo breaks the graph where a Python branch hangs on data. Here the condition on top of the interpreter's stack is looked at
before the jump: if it is a count compared with nothing (a size, a number of tokens, `any`), it is answered so that *there
are* tokens, and the assumption goes into the graph. Whoever rewrites the region must prove that the body does nothing
for an expert without tokens.

Not answered (breaks as before): branches that do something when there are no tokens (see `skips`), other comparisons, `all`,
floats, NaN checks, integers that are no count by construction, `while` and `x and y` on tensors kept as values.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import BuiltinVariable, ConstantVariable, SymNodeVariable, VariableTracker
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from . import frames, markers
from .provenance import is_count, name_of, operands
from .seams import wrap_opcode
from .skips import steps_over

_JUMPS = tuple(f"POP_JUMP_{way}IF_{what}" for way in ("", "FORWARD_", "BACKWARD_") for what in ("TRUE", "FALSE"))
_KEEPING_JUMPS = ("JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP")

# What `count <op> bound` says when there are tokens, for the bounds that separate none from some.
_SOME = {
    ("eq", 0): False, ("ne", 0): True, ("gt", 0): True, ("le", 0): False, ("ge", 1): True, ("lt", 1): False,
}  # fmt: skip
_MIRROR = {"eq": "eq", "ne": "ne", "gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}
_NEGATIONS = ("not_", "sym_not", "logical_not", "invert", "inv", "bitwise_not")


def install() -> None:
    for name in _JUMPS:
        wrap_opcode(InstructionTranslatorBase, name, lambda original: _answering(original, keeps=False))
    for name in _KEEPING_JUMPS:
        wrap_opcode(InstructionTranslatorBase, name, lambda original: _answering(original, keeps=True))


def _answering(original: Callable[..., None], keeps: bool) -> Callable[..., None]:
    def jump(self: InstructionTranslatorBase, inst: Instruction) -> None:
        if frames.ours(self):
            answer = _answer(self, inst, self.stack[-1], keeps)
            if answer is not None:
                self.stack[-1] = ConstantVariable.create(answer)
            elif not keeps and _is_unknown_number(self.stack[-1]):
                # `if n:` fails hard on an unknown size, where `if n != 0:` breaks the graph; they ask the same
                call = BuiltinVariable(operator.ne).call_function
                self.stack[-1] = call(self, [self.stack[-1], ConstantVariable.create(0)], {})
        original(self, inst)

    return jump


def _is_unknown_number(value: VariableTracker) -> bool:
    if not isinstance(value, SymNodeVariable) or not isinstance(value.sym_num, torch.SymInt):
        return False
    return bool(free_unbacked_symbols(value.sym_num)) and not _is_known(value.sym_num)


def _answer(tx: InstructionTranslatorBase, inst: Instruction, value: VariableTracker, keeps: bool) -> bool | None:
    """The assumed truth of `value`, recorded in the graph; None to leave the branch alone."""
    if isinstance(value, SymNodeVariable):
        if not free_unbacked_symbols(value.sym_num) or _is_known(value.sym_num):
            return None
        if keeps and not isinstance(value.sym_num, torch.SymBool):
            return None  # `n or default` goes on with n itself, not with its truth
    elif not value.is_tensor() or keeps or value.as_proxy() is None:
        return None
    node = value.as_proxy().node
    answer = some_tokens(node)
    if answer is None or not frames.may_assume(tx) or not steps_over(tx, inst, answer):
        return None
    frames.assume(tx, markers.assume, value.as_proxy(), answer)
    return answer


def _is_known(number: torch.SymBool | torch.SymInt) -> bool:
    truth = number if isinstance(number, torch.SymBool) else number != 0
    return statically_known_true(truth) or statically_known_true(torch.sym_not(truth))


def some_tokens(cond: fx.Node) -> bool | None:
    """The truth of `cond` if the count it asks about is not zero; None if it is not such a question."""
    name, args = name_of(cond), operands(cond)
    if name in _NEGATIONS:
        inner = some_tokens(args[0]) if isinstance(args[0], fx.Node) else None
        return None if inner is None else not inner
    if name == "any" and len(args) == 1:
        return None if name_of(args[0]) in ("isnan", "isinf", "isfinite") else True
    if name in ("item", "bool", "sym_bool") and isinstance(args[0], fx.Node):
        return some_tokens(args[0])
    if name in _MIRROR and len(args) == 2:
        left, right = args
        if isinstance(right, fx.Node):
            left, right, name = right, left, _MIRROR[name]
        if isinstance(left, fx.Node) and isinstance(right, int) and is_count(left):
            return _SOME.get((name, right))
        return None
    return True if is_count(cond) else None
