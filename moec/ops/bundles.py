"""Bundles: E separate parameters cross autograd and a compiler as one tensor.

    key, (up,) = Bundle().tie([[w_0, ..., w_127]], grad=True)          up: [128, F, D], one element of memory, requires a gradient
    out = moec::experts(x, ..., up=[up], ..., key)                     the kernel finds w_0, ..., w_127 under the number in `key`
    out.sum().backward()                                               up's gradient, a real [128, F, D], falls apart into theirs

A compiler spends milliseconds on every tensor that enters a graph, forward and backward, and a layer of 128 separate experts
has 384. What stands for them has their shape and dtype, so that everything a compiler asks is answered truly, but no values.
Kernels never read it: they `resolve` the key, an ordinary tensor, so that saving it for the backward, or packing and
unpacking what was saved, keeps its meaning. As autograd does for what it saves, a backward checks that no parameter was
written meanwhile.

An entry lives as long as its bundle refers to it, and with its parameters as long as a key of it or a backward does: a bundle
alone keeps no parameter alive.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Groups = list[list[Tensor]]

_numbers = itertools.count(1)
_entries: weakref.WeakValueDictionary[int, _Entry] = weakref.WeakValueDictionary()


class _Entry:
    """Groups of parameters, at one state of their values."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.groups = [[weakref.ref(t) for t in group] for group in groups]
        self.versions = versions(groups)
        self.number = next(_numbers)
        _entries[self.number] = self

    def key(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """int64 [1]. As long as it lives, in a call or among what a graph has saved, so do this entry and its parameters."""
        key = torch.tensor([self.number])
        key.held = (self, groups)  # type: ignore[attr-defined]
        return key

    def is_for(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        same = all(r() is t for refs, group in zip(self.groups, groups) for r, t in zip(refs, group))
        return same and self.versions == versions(groups)


def versions(groups: Sequence[Sequence[Tensor]]) -> list[int]:
    """How often each was written in place; inference tensors do not count."""
    return [-1 if t.is_inference() else t._version for group in groups for t in group]


def resolve(key: Tensor, unwritten: bool) -> Groups:
    """The parameters behind a key, group by group. With `unwritten` it raises if one of them was written in place since."""
    entry = _entries.get(int(key))
    if entry is None:
        raise RuntimeError("moec: a bundle of parameters is gone: its compiled function or its graph was freed")
    groups = [[r() for r in refs] for refs in entry.groups]
    if any(t is None for group in groups for t in group):
        raise RuntimeError("moec: a parameter of a bundle is gone")
    if unwritten and versions(groups) != entry.versions:  # type: ignore[arg-type]
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            "a parameter of the experts was written between the forward and the backward"
        )
    return groups  # type: ignore[return-value]


class _Tie(torch.autograd.Function):
    """Parameters -> what stands for each group; backward, the gradient of a stand-in falls apart into those of its parameters."""

    @staticmethod
    def forward(ctx: Any, entry: _Entry, sizes: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.held, ctx.sizes = (entry, parameters), sizes
        ctx.set_materialize_grads(False)
        firsts = (parameters[i] for i in itertools.accumulate((0, *sizes[:-1])))
        return tuple(stand_in(t, n) for t, n in zip(firsts, sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        for grad, n in zip(grads, ctx.sizes):
            found += [None] * n if grad is None else grad.unbind()
        return (None, None, *found)


def stand_in(like: Tensor, n: int) -> Tensor:
    """[n, *like.shape], one element of memory."""
    return like.new_empty(()).expand(n, *like.shape)


class Bundle:
    """Ties the same groups of parameters in every call of one compiled function."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def tie(self, groups: Sequence[Sequence[Tensor]], grad: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The key, and for each group of E tensors a stand-in [E, ...]; with `grad` a gradient of it reaches the parameters."""
        entry = self._entry
        if entry is None or not entry.is_for(groups):
            self._entry = entry = _Entry(groups)  # another thread may put its own here meanwhile
        key, sizes = entry.key(groups), tuple(map(len, groups))
        if grad:
            parameters = itertools.chain.from_iterable(groups)
            stand_ins: tuple[Tensor, ...] = _Tie.apply(entry, sizes, *parameters)
            return key, stand_ins
        return key, tuple(stand_in(group[0], n) for group, n in zip(groups, sizes))
