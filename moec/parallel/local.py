"""What one rank keeps of a layer: its own experts, under the old names.

    module.gate_up_proj       the Parameter that it was, now [slots of this rank, ...]
    expert.up_proj.weight     an expert in one of this rank's slots: as it was; else a Parameter of its shape without memory

While moec traces, reading such an attribute gives `moec::logical(local, ...)` [E, ...] or `moec::resident(local, ...)`: the
graph is that of the whole model, and says what is sharded. A property of the module's class does that, as in torch's own
parametrizations; so the class is a subclass of the module's own, of the same name. In eager code the attribute is the Parameter;
but calling the module, or one around it, raises, and so does code that reads the attribute in a call of moec's without being
traced.

A remote expert's Parameter is one NaN seen at every index (stride 0): reading it is safe and shows, writing to it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.decorators import skip_code  # type: ignore[attr-defined]

import moec.ops.exchange  # noqa: F401  (defines the markers)
from moec.capture import frames
from moec.errors import ParallelError

TABLES = "_moec_tables"  # the attribute of every module that owns sharded parameters
ops = torch.ops.moec


class Tables(nn.Module):
    """What the graph reads of the plan of one layer; another plan of equal shape is copied in place. The plan itself is kept
    beside, so that `to_empty` and the like do not lose it.

    copies [E, C]  the slots of each expert, padded with -1
    shared [n]     for each slot of this rank the how-manieth expert with several copies it holds; the number of spare slots for
                   all others
    """

    copies: Tensor
    shared: Tensor

    def __init__(self, copies: np.ndarray, shared: np.ndarray, site: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("copies", torch.from_numpy(copies).to(device), persistent=False)
        self.register_buffer("shared", torch.from_numpy(shared).to(device), persistent=False)
        self.site = site
        self.num_experts = len(copies)
        self._plan = (copies, shared)

    def show(self, copies: np.ndarray, shared: np.ndarray) -> None:
        """Another plan, of equal shape."""
        self._plan = (copies, shared)
        self.copies.copy_(torch.from_numpy(copies))
        self.shared.copy_(torch.from_numpy(shared))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Tables:
        super()._apply(fn, recurse)
        if not self.copies.is_meta:
            self.show(*self._plan)
        return self

    def forward(self) -> None:
        raise NotImplementedError


def copies_of(slots: np.ndarray, num_experts: int, width: int) -> np.ndarray:
    """[E, width] int64: the slots of each expert in order, padded with -1. `slots` [S]: the expert in each, -1 for none."""
    found = np.full((num_experts, width), -1, dtype=np.int64)
    for e in range(num_experts):
        (held,) = np.nonzero(slots == e)
        found[e, : len(held)] = held
    return found


def shared_of(slots: np.ndarray, num_experts: int, spare: int, rank: int, ranks: int) -> np.ndarray:
    """[n] int64: for each slot of the rank the how-manieth expert with several copies it holds; `spare` for all others."""
    copied = np.flatnonzero(np.bincount(slots[slots >= 0], minlength=num_experts) > 1)
    number = np.full(num_experts + 1, spare, dtype=np.int64)
    number[copied] = np.arange(len(copied))
    return number[slots.reshape(ranks, -1)[rank]]  # -1, an empty slot, reads the last


def shard(module: nn.Module, names: Sequence[str], tables: Tables, stacked: bool) -> None:
    """From now on the module reads these of its own parameters as sharded."""
    cls = type(module)
    properties = {name: _sharded(name, stacked) for name in names}
    body = {**properties, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    module.__class__ = type(cls.__name__, (cls,), body)
    vars(module)[TABLES] = tables  # not a child: the tables are registered once


def _sharded(name: str, stacked: bool) -> property:
    marker = ops.logical.default if stacked else ops.resident.default

    def read(self: nn.Module) -> object:
        local = self._parameters[name]
        if not torch.compiler.is_dynamo_compiling():
            _check_read(self, get_eval_frame_callback())
            return local
        tables = vars(self)[TABLES]
        return marker(local, tables.copies, tables.shared, tables.num_experts, tables.site)

    def write(self: nn.Module, new: object) -> None:
        if new is not None and not isinstance(new, nn.Parameter):
            raise TypeError(f"{name} is a parameter; assign a torch.nn.Parameter")
        self._parameters[name] = new

    skip_code(read.__code__)  # where Python calls it, it is to run and not to be compiled
    return property(read, write)


@torch.compiler.disable
def _check_read(module: nn.Module, callback: object) -> None:
    if callback and frames.is_ours(callback):
        raise ParallelError(
            f"the experts of {type(module).__name__} are spread over ranks, and code that reads them runs without being traced: "
            'the graph breaks around this layer. torch.compile(model, backend="moec", fullgraph=True) says where'
        )


@torch.compiler.disable
def _check_call(module: nn.Module, callback: object) -> None:
    if not callback or not frames.is_ours(callback):
        raise ParallelError(
            f"the experts of {type(module).__name__} are spread over ranks (moec.parallelize), and this call is not compiled "
            'with moec: use torch.compile(model, backend="moec")'
        )


def only_compiled(module: nn.Module, args: object) -> None:
    """A forward pre-hook of every module around sharded parameters."""
    if (
        not torch.compiler.is_dynamo_compiling()
    ):  # the callback of the call that Python is in, if it is one of a compiled model
        _check_call(module, get_eval_frame_callback())


skip_code(only_compiled.__code__)


@torch.no_grad()
def keep(parameter: nn.Parameter, experts: Sequence[int]) -> None:
    """Of a stack [E, ...], the experts in this rank's slots; an empty slot, -1, holds zeros."""
    local = parameter.new_zeros((len(experts), *parameter.shape[1:]))
    for slot, e in enumerate(experts):
        if e >= 0:
            local[slot] = parameter[e]
    parameter.data = local


@torch.no_grad()
def drop(parameter: nn.Parameter) -> None:
    """A parameter of the same shape without memory of its own."""
    parameter.data = parameter.new_full((), float("nan")).expand(parameter.shape)


def dropped(parameter: Tensor) -> bool:
    """Whether `drop` was called on the parameter."""
    return parameter.dim() > 0 and all(s == 0 for s in parameter.stride()) and parameter.numel() > 1
