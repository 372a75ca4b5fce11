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

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import sys
from collections.abc import Callable

from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, SymNodeVariable, TensorVariable, TupleVariable, VariableTracker

from . import frames, seams, watch
from .hits import HitId, HitRow
from .indices import Index, Path, Uses
from .lesson import Lesson, Moment
from .liveness import is_generator
from .seams import log, wrap_opcode
from .stamp import Yielded
from .trees import NoStamp, unmark


def install() -> None:
    # 3.15 keeps two values on the stack for an iterator
    if sys.version_info < (3, 15) and watch.complete:
        wrap_opcode(InstructionTranslatorBase, "FOR_ITER", _stamp_equal_iterations)


def _stamp_equal_iterations(original: Callable[..., None]) -> Callable[..., None]:
    def FOR_ITER(self: InstructionTranslatorBase, inst: Instruction) -> None:
        if not (seams.stamping_on and frames.ours(self) and self.output.current_tracer.parent is None) or is_generator(
            self.f_code
        ):
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

    def _give_up(self, why: Exception) -> None:
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
            except Exception as why:  # nothing is written yet; whatever was not understood, the loop can be traced
                self._give_up(why)
            finally:
                unmark(self.moments[2].nodes_until(self.moments[3]))

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
            item = leaves(self.tx.stack[-1])
            names = self.lesson.checked_names(self.tx, item)
        except Exception as why:  # as above
            log.debug("moec.capture: %s: an iteration is traced on its own: %s", frames.where(self.tx), why)
            self.settle()
            self._start_over()
            return False
        self.lesson.repeat(self.tx, item, names)
        return True

    def settle(self) -> None:
        """Give the local variables their values of the last iteration."""
        if self.lesson is not None:
            self.lesson.settle(self.tx)


def leaves(value: VariableTracker) -> Yielded:
    """What the iterator yielded, taken apart."""
    found = Yielded({}, {}, {})

    def visit(part: VariableTracker, path: Path) -> None:
        part = part.unwrap()  # and no isinstance: it would build what the iteration may never look at
        if type(part) is TupleVariable:
            for i, item in enumerate(part.items):
                visit(item, (*path, i))
        elif type(part) is HitRow:
            found.numbers[path] = part.expert
        elif type(part) is HitId:
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
    if type(value) is HitRow:
        return HitRow(value.expert, uses, path)
    if type(value) is HitId:
        return HitId(value._number, uses, path)
    if type(value) is ConstantVariable and type(value.value) is int:
        return Index(value.value, uses, path)
    return value
