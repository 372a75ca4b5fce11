"""`torch.bincount(ids, minlength=E)` with a length that is known while tracing.

    counts = torch.bincount(ids, minlength=E)     ->     counts = zeros(E).scatter_add(0, ids, ones_like(ids))

bincount's length depends on the data, so that `counts.tolist()` cannot be traced; with ids below E it is E. Where the graph
shows that they are (ids chosen by `topk` among E) nothing is assumed. Otherwise `assume((ids < E).all(), True)` goes into the
graph: eager code with a larger id would see a longer result, and so must the frame, which is then traced again.
(An id out of range is an error in scatter_add, never a lost token.)

Not handled: `weights`, a minlength that is missing or not a constant.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,assignment,attr-defined"
from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

from . import frames, markers
from .provenance import id_range, value_of
from .seams import wrap


def install() -> None:
    wrap(TorchInGraphFunctionVariable, "call_function", _function)
    wrap(TensorVariable, "call_method", _method)


def _function(original: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    def call_function(
        self: TorchInGraphFunctionVariable,
        tx: InstructionTranslatorBase,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if self.value is torch.bincount and frames.ours(tx) and args:
            counts = _fixed_size(tx, *args, **kwargs)
            if counts is not None:
                return counts
        return original(self, tx, args, kwargs)

    return call_function


def _method(original: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    def call_method(
        self: TensorVariable,
        tx: InstructionTranslatorBase,
        name: str,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if name == "bincount" and frames.ours(tx):
            counts = _fixed_size(tx, self, *args, **kwargs)
            if counts is not None:
                return counts
        return original(self, tx, name, args, kwargs)

    return call_method


def _fixed_size(
    tx: InstructionTranslatorBase,
    input: VariableTracker,
    weights: VariableTracker | None = None,
    minlength: VariableTracker | None = None,
) -> VariableTracker | None:
    if minlength is None or not minlength.is_python_constant() or not input.is_tensor():
        return None
    if weights is not None and not (weights.is_python_constant() and weights.as_python_constant() is None):
        return None
    ids, num_experts = input.as_proxy(), minlength.as_python_constant()
    if value_of(ids.node).dim() != 1 or num_experts <= 0:
        return None
    known = id_range(ids.node)
    if known is None or known > num_experts:
        if not frames.may_assume(tx):
            return None
        below = _call(tx, torch.all, _call(tx, operator.lt, ids, num_experts))
        frames.assume(tx, markers.assume, below.as_proxy(), True)
    return emit(tx, ids, num_experts)


def emit(tx: InstructionTranslatorBase, ids: fx.Proxy, num_experts: int) -> VariableTracker:
    """Put the histogram [E] of `ids` (integers, any shape) into the graph."""
    value = value_of(ids.node)
    if value.dim() != 1:
        ids = _call(tx, torch.flatten, ids)
    if value.dtype != torch.int64:
        ids = _call(tx, torch.Tensor.to, ids, torch.int64)
    zeros = _call(tx, torch.zeros, num_experts, dtype=torch.int64, device=value.device)
    return _call(tx, torch.scatter_add, zeros, 0, ids, _call(tx, torch.ones_like, ids))


def _call(
    tx: InstructionTranslatorBase, function: Callable[..., object], *args: object, **kwargs: object
) -> VariableTracker:
    operands = tuple(arg.as_proxy() if isinstance(arg, VariableTracker) else arg for arg in args)
    return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", function, operands, kwargs))
