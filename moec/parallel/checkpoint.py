"""Checkpoints under logical names: what is saved does not say how experts were spread.

    state = moec.parallel.state_dict(model)
    torch.distributed.checkpoint.save(state, checkpoint_id=path)          # on 2 ranks
    torch.distributed.checkpoint.load(state, checkpoint_id=path)          # on 4, or under another plan, or in one process

A stack appears as one tensor [E, ...], of which each rank writes and reads the rows it has; copies are written once. Loading goes
straight into the parameters. `load_state_dict` takes a full state, as the whole model had it.

A remote expert's own parameter is left out: the rank that holds it has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moec.errors import ParallelError

from .entry import Sharded, State, state_of
from .local import dropped


class Experts(torch.Tensor):
    """A stack [E, ...] of which this rank has some rows, as torch.distributed.checkpoint sees it. It holds no data of its own:
    reading it as a tensor gives NaN. `rows` [slots, ...] are the data, `held` the expert in each, -1 for none.
    """

    rows: Tensor
    held: tuple[int, ...]

    @staticmethod
    def of(rows: Tensor, held: Sequence[int], num_experts: int) -> Experts:
        empty = rows.new_full((), float("nan") if rows.is_floating_point() else 0).expand(num_experts, *rows.shape[1:])
        shards: Experts = torch.Tensor._make_subclass(Experts, empty)
        shards.rows, shards.held = rows.detach(), tuple(held)
        return shards

    def _chunk(self, expert: int) -> ChunkStorageMetadata:
        offsets = torch.Size([expert] + [0] * (self.dim() - 1))
        return ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([1, *self.shape[1:]]))

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.rows)
        items = []
        for e in self.held:
            if e >= 0:
                chunk = self._chunk(e)
                data = TensorWriteData(chunk=chunk, properties=properties, size=self.shape)
                items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(e) for e in self.held if e >= 0]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if index.offset is None:
            raise ParallelError(f"{index.fqn}: a row of experts was asked for without saying which")
        slot = self.held.index(index.offset[0])
        return self.rows[slot : slot + 1]


def state_dict(model: nn.Module) -> dict[str, Any]:
    """The state of the model under its own names and shapes, for torch.distributed.checkpoint. Tensors are the model's own."""
    model = getattr(model, "_orig_mod", model)
    state = state_of(model)
    stacks, separate = _parameters(state)
    found: dict[str, Any] = {}
    for name, entry in model.state_dict().items():
        if name in stacks:
            layer = stacks[name]
            found[name] = Experts.of(entry, layer.experts(state.rank, state.ranks), layer.found.num_experts)
        elif name not in separate or not dropped(model.get_parameter(name)):
            found[name] = entry
    return found


@torch.no_grad()
def load_state_dict(model: nn.Module, full: Mapping[str, Any]) -> None:
    """Takes a full state, as the model had it before `parallelize`, or one from `state_dict` of this model after loading it.

    Raises ParallelError, before anything is changed, where names or shapes do not fit.
    """
    model = getattr(model, "_orig_mod", model)
    state = state_of(model)
    stacks, separate = _parameters(state)
    own = model.state_dict()
    needed = {n for n in own if n not in separate or not dropped(model.get_parameter(n))}
    if missing := sorted(needed - set(full)):
        raise ParallelError(f"the state lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}")
    if unknown := sorted(set(full) - set(own)):
        raise ParallelError(f"the state has {', '.join(unknown[:5])}, which the model has not")
    for name in needed:
        wanted = (stacks[name].found.num_experts, *own[name].shape[1:]) if name in stacks else tuple(own[name].shape)
        if isinstance(full[name], Tensor) and tuple(full[name].shape) != wanted:
            raise ParallelError(f"{name} is {tuple(full[name].shape)} in the state and {wanted} in the model")
    for name in needed:
        given, mine = full[name], own[name]
        if isinstance(given, Experts):
            if given.rows.data_ptr() != mine.data_ptr():
                raise ParallelError(f"{name} is the state of another model; load it with torch.distributed.checkpoint")
        elif name in stacks:
            for slot, e in enumerate(stacks[name].experts(state.rank, state.ranks)):
                if e >= 0:
                    mine[slot].copy_(given[e])
        elif isinstance(mine, Tensor) and given is not mine:
            mine.copy_(given)
    for layer in state.layers:
        layer.refresh(state.rank, state.ranks)


def _parameters(state: State) -> tuple[dict[str, Sharded], dict[str, Sharded]]:
    """The layers by the names of their stacks, and by those of their separate parameters."""
    stacks = {n: layer for layer in state.layers for n in layer.found.stacked}
    separate = {n: layer for layer in state.layers for names in layer.found.separate for n in names}
    return stacks, separate
