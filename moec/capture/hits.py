"""Loops over the experts that were hit, traced as loops over all experts.

    hit = torch.greater(expert_mask.sum((-1, -2)), 0)          # [E]
    for expert_idx in hit.nonzero():                            assume_every(hit)
        idx, top_x = torch.where(expert_mask[expert_idx])  ->   for each e in range(E): ... expert_mask[[e]]
        out.index_add_(0, top_x, self.experts[expert_idx](x[top_x]))

Rows of `nonzero()` are [1]-vectors, elements of `nonzero().flatten()` and the like are scalars; in the graph they are the list
`[e]` and the number `e`. Both behave as the tensors they stand for where such loops use them: as an index of tensors and
ModuleLists, compared with a number or an id tensor, and through `[0]`, `.item()`, `int()`, `.squeeze()`. Anything else is a
graph break, after which the marker in the first half makes the frame be traced again as before.

The same for `for e in hit.nonzero().flatten().tolist()` and for `torch.unique(topk_ids)`, if the ids come from a `topk` over E.

Not handled: `enumerate(hit.nonzero())` and `zip`, whose positions would not be those of the real loop, and `len()` of it.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined,misc,operator,return-value"
from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.exc import unimplemented
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, ListVariable, VariableTracker
from torch._dynamo.variables.base import ValueMutationNew
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.misc import GetAttrVariable
from torch._dynamo.variables.tensor import TensorVariable

from . import frames, histogram, markers
from .indices import Index, Path, Uses, marked
from .provenance import hit_vector, id_range, name_of, operands, value_of
from .seams import wrap, wrap_opcode

_TO_NUMBER = ("item", "__int__", "__index__", "tolist")
_TO_SCALAR = ("squeeze", "__getitem__")
_UNCHANGED = ("long", "int", "cpu", "detach", "clone", "contiguous")
_TENSOR_METHODS = frozenset((*_TO_NUMBER, *_TO_SCALAR, *_UNCHANGED))
_COMPARISONS = {
    "__eq__": operator.eq, "__ne__": operator.ne, "__lt__": operator.lt,
    "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge,
}  # fmt: skip
_REFLECTED = {"__lt__": "__gt__", "__gt__": "__lt__", "__le__": "__ge__", "__ge__": "__le__"}


class HitId(Index):
    """Expert e as the scalar tensor that iterating `hit.nonzero().flatten()` yields; the number `e` in the graph."""

    def var_getattr(self, tx: InstructionTranslatorBase, name: str) -> VariableTracker:
        return GetAttrVariable(self, name) if name in _TENSOR_METHODS else super().var_getattr(tx, name)

    def tp_getattro_impl(
        self, tx: InstructionTranslatorBase, name: str
    ) -> VariableTracker:  # the same since torch 2.14
        return GetAttrVariable(self, name) if name in _TENSOR_METHODS else super().tp_getattro_impl(tx, name)

    def call_method(
        self, tx: InstructionTranslatorBase, name: str, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
    ) -> VariableTracker:
        if name in _TO_NUMBER:
            return Index(self._number, self.uses, self.path)
        if name == "squeeze" or name in _UNCHANGED:
            return self
        return super().call_method(tx, name, args, kwargs)


class HitRow(VariableTracker):
    """Expert e as the row [1] that iterating `hit.nonzero()` yields; the list `[e]` in the graph."""

    _nonvar_fields = {"expert", "uses", "path", *VariableTracker._nonvar_fields}

    def __init__(self, expert: int, uses: Uses | None = None, path: Path = (), **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.expert, self.uses, self.path = expert, uses, path

    def as_proxy(self) -> list[int]:
        return [marked(self.expert, self.uses, self.path)]

    def python_type(self) -> type:
        return torch.Tensor

    def var_getattr(self, tx: InstructionTranslatorBase, name: str) -> VariableTracker:
        return GetAttrVariable(self, name) if name in _TENSOR_METHODS else super().var_getattr(tx, name)

    def tp_getattro_impl(
        self, tx: InstructionTranslatorBase, name: str
    ) -> VariableTracker:  # the same since torch 2.14
        return GetAttrVariable(self, name) if name in _TENSOR_METHODS else super().tp_getattro_impl(tx, name)

    def _id(self) -> HitId:
        return HitId(self.expert, self.uses, self.path)

    def nb_index_impl(self, tx: InstructionTranslatorBase) -> VariableTracker:
        return self._id().nb_index_impl(tx)

    def nb_int_impl(self, tx: InstructionTranslatorBase) -> VariableTracker:
        return Index(self.expert, self.uses, self.path)

    def __index__(self) -> int:
        return self._id().value  # torch 2.11 applies operator.index to the tracker itself

    def mp_subscript_impl(self, tx: InstructionTranslatorBase, key: VariableTracker) -> VariableTracker:
        if key.is_python_constant() and key.as_python_constant() in (0, -1):
            return self._id()
        raise _unsupported(f"row[{key}]")

    def richcompare_impl(self, tx: InstructionTranslatorBase, other: VariableTracker, op: str) -> VariableTracker:
        compare = _COMPARISONS[op]
        if other.is_python_constant() and isinstance(other.as_python_constant(), int):
            return ConstantVariable.create(compare(self._id().value, other.as_python_constant()))
        if other.is_tensor() and value_of(other.as_proxy().node).dim():
            flipped = _COMPARISONS[_REFLECTED.get(op, op)]
            return wrap_fx_proxy(
                tx, tx.output.create_proxy("call_function", flipped, (other.as_proxy(), self._id().as_proxy()), {})
            )
        raise _unsupported(f"{op} with {other}")

    def call_method(
        self, tx: InstructionTranslatorBase, name: str, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
    ) -> VariableTracker:
        if name == "tolist":
            return ListVariable([self.nb_int_impl(tx)], mutation_type=ValueMutationNew())
        if name in _TO_NUMBER:
            return self.nb_int_impl(tx)
        if name == "squeeze":
            return self._id()
        if name == "__getitem__":
            return self.mp_subscript_impl(tx, args[0])
        if name in _COMPARISONS:
            return self.richcompare_impl(tx, args[0], name)
        if name in _UNCHANGED:
            return self
        raise _unsupported(name)


class HitList(VariableTracker):
    """`hit.nonzero().flatten().tolist()`, whose length is known only at run time: good for iterating over, nothing else."""

    def __init__(self, rows: TensorVariable, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.rows = rows

    def python_type(self) -> type:
        return list

    def reconstruct(self, codegen: object) -> None:
        codegen(self.rows)
        codegen.load_method("tolist")
        codegen.call_method(0)


def install() -> None:
    wrap_opcode(InstructionTranslatorBase, "GET_ITER", _iterate_over_all)
    wrap(TensorVariable, "call_method", _list_of_hits)
    wrap(OutputGraph, "compile_and_call_fx_graph", _drop_unread_nonzeros)


def _drop_unread_nonzeros(original: Callable[..., object]) -> Callable[..., object]:
    """Once all experts are looped over, nobody reads `nonzero()`; left in place, its unknown size would be asserted about."""

    def compile_and_call_fx_graph(
        self: OutputGraph, tx: InstructionTranslatorBase, rv: list[VariableTracker], root: object
    ) -> object:
        returned = {value.as_proxy().node for value in rv if isinstance(value.as_proxy(), fx.Proxy)}
        for rows, hit in vars(self).get("_moec_looped_over", ()):
            node = rows
            while node is not hit and not node.users and node not in returned:
                unread, node = node, node.args[0]
                unread.graph.erase_node(unread)
        return original(self, tx, rv, root)

    return compile_and_call_fx_graph


def _iterate_over_all(original: Callable[..., None]) -> Callable[..., None]:
    def GET_ITER(self: InstructionTranslatorBase, inst: Instruction) -> None:
        if frames.may_assume(self) and not _is_polyfill(self):
            elements = _all_experts(self, self.stack[-1])
            if elements is not None:
                self.stack[-1] = ListVariable(elements, mutation_type=ValueMutationNew())
        original(self, inst)

    return GET_ITER


def _list_of_hits(original: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    def call_method(
        self: TensorVariable,
        tx: InstructionTranslatorBase,
        name: str,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if name == "tolist" and frames.ours(tx):
            rows = self.as_proxy().node
            if value_of(rows).dim() == 1 and _hits(tx, rows, dry=True) is not None:
                return HitList(self)
        return original(self, tx, name, args, kwargs)

    return call_method


def _is_polyfill(tx: InstructionTranslatorBase) -> bool:
    """Dynamo traces `enumerate` and others as Python loops of its own; their positions would be wrong."""
    return "_dynamo/polyfills" in tx.f_code.co_filename.replace("\\", "/")


def _all_experts(tx: InstructionTranslatorBase, iterated: VariableTracker) -> list[VariableTracker] | None:
    """What iterating over `iterated` yields if all experts are hit, with the assumption recorded in the graph."""
    rows = iterated.rows if isinstance(iterated, HitList) else iterated
    if not isinstance(rows, TensorVariable):
        return None
    node = rows.as_proxy().node
    hit = _hits(tx, node)
    if hit is None:
        return None
    frames.assume(tx, markers.assume_every, hit)
    vars(tx.output).setdefault("_moec_looped_over", []).append((node, hit.node))
    num_experts = value_of(hit.node).shape[0]
    if isinstance(iterated, HitList):
        return [ConstantVariable.create(e) for e in range(num_experts)]
    element = HitId if value_of(node).dim() == 1 else HitRow
    return [element(e) for e in range(num_experts)]


def _hits(tx: InstructionTranslatorBase, rows: fx.Node, dry: bool = False) -> fx.Proxy | None:
    """The hit vector [E] whose nonzero positions `rows` lists; `dry` emits nothing (the answer is then only truthy)."""
    hit = hit_vector(rows)
    if hit is not None:
        return fx.Proxy(hit, tx.output.current_tracer)
    if name_of(rows) == "unique" and len(operands(rows)) == 1:
        ids = rows.args[0]
        num_experts = id_range(ids)
        if num_experts is not None:
            return True if dry else histogram.emit(tx, fx.Proxy(ids, tx.output.current_tracer), num_experts).as_proxy()
    return None


def _unsupported(what: str) -> Exception:
    try:
        unimplemented(
            gb_type="moec: use of a hit expert's id",
            context=what,
            explanation="The loop over hit experts is traced as a loop over all; this use of an element is not understood.",
            hints=[],
        )
    except Exception as error:
        return error
