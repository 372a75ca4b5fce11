"""`moec.parallelize`: the experts of a model spread over the ranks of a mesh.

    mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("ep",))
    moec.parallelize(model, mesh["ep"])
    compiled = torch.compile(model, backend="moec")

Every rank starts with the whole model (the same on all) and ends with its own experts and all the rest. Nothing is changed before
everything is known to work: the layers are found by tracing a copy without data, the plan is held against them, and the ranks
compare what they found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moec.errors import ParallelError
from moec.passes import exchange
from moec.passes.dispatchers import DISPATCHERS, Dispatcher, Place, Traffic, cheapest
from moec.placement import PlacementError, Plan, Topology

from . import local
from .discovery import Found, find

P = TypeVar("P")

STATE = "_moec_parallel"  # the attribute of a model that holds its State


@dataclass(eq=False)
class Sharded:
    """One layer as it lies on the ranks. `slots` [S]: the expert in each slot of the group, -1 for none."""

    found: Found
    slots: np.ndarray
    site: int
    tables: local.Tables
    spare: int  # slots that may hold copies: at most so many experts have some

    def experts(self, rank: int, ranks: int) -> list[int]:
        """The experts in the slots of a rank."""
        held: list[int] = self.slots.reshape(ranks, -1)[rank].tolist()
        return held

    def refresh(self, rank: int, ranks: int) -> None:
        """Writes the plan into the tables that the graph reads."""
        width = self.tables.copies.shape[1]
        copies = local.copies_of(self.slots, self.found.num_experts, width)
        self.tables.show(copies, local.shared_of(self.slots, self.found.num_experts, self.spare, rank, ranks))


@dataclass(eq=False)
class State:
    """What a parallelized model knows of itself."""

    mesh: DeviceMesh
    layers: list[Sharded]
    plan: Plan | None

    @property
    def rank(self) -> int:
        return int(self.mesh.get_local_rank())

    @property
    def ranks(self) -> int:
        return int(self.mesh.size())


@dataclass(frozen=True)
class Placed:
    """What was done with one layer, for the report."""

    name: str
    num_experts: int
    here: int
    dispatcher: str
    sent: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ParallelReport:
    """What `moec.parallelize` did, on this rank."""

    rank: int
    ranks: int
    layers: tuple[Placed, ...]

    def __str__(self) -> str:
        before, after = (sum(getattr(p, k) for p in self.layers) for k in ("bytes_before", "bytes_after"))
        lines = [
            f"moec: experts of {len(self.layers)} layers spread over {self.ranks} ranks; rank {self.rank} keeps "
            f"{after / 2**20:.1f} of {before / 2**20:.1f} MiB"
        ]
        for p in self.layers:
            lines.append(
                f"{p.name}: {p.here} of {p.num_experts} experts here, {p.dispatcher}, {p.sent / 2**20:.2f} MiB sent per forward"
            )
        return "\n".join(lines)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    dispatcher: str | None = None,
    topology: Topology | None = None,
    tokens: int = 4096,
) -> ParallelReport:
    """Spreads the experts of `model` over the ranks of `mesh`, in place; then compile it with backend="moec".

    mesh          of one dimension, for instance mesh["ep"] of a larger one
    plan          which expert lies in which slot, as `moec.placement.solve` makes it, or the file of one; None: experts in order
    args, kwargs  inputs that the model runs on, to find its experts; transformers' language models need none
    dispatcher    "all-gather" or "all-to-all"; None: whichever the cost model expects to be faster
    topology      of the group, for the cost model; None: one box
    tokens        per rank and step, for the cost model; all ranks must pass the same

    Every rank must hold the same weights and call this with the same arguments. Raises ParallelError, on every rank and before
    anything is changed, where a layer of experts is not recognized, where mesh or plan do not fit, or where ranks differ.
    """
    _check_mesh(mesh)
    state, report = agreed(
        mesh,
        lambda: _prepare(model, mesh, plan, args, kwargs, dispatcher, topology, tokens),
        lambda found: _digest(found[0]),
    )
    before = [_bytes(model, layer.found) for layer in state.layers]
    for layer in state.layers:
        _shard(model, layer, state)
    vars(model)[STATE] = state
    _keep_from_ddp(model, state)
    placed = []
    for layer, p, was in zip(state.layers, report, before):
        placed.append(Placed(*p, bytes_before=was, bytes_after=_bytes(model, layer.found)))
    return ParallelReport(state.rank, state.ranks, tuple(placed))


def state_of(model: nn.Module) -> State:
    """What `parallelize` noted on the model. Raises ParallelError for a model that was not parallelized."""
    state = vars(getattr(model, "_orig_mod", model)).get(STATE)
    if not isinstance(state, State):
        raise ParallelError("this model was not parallelized; call moec.parallelize(model, mesh) first")
    return state


def _check_mesh(mesh: object) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise ParallelError(
            f"mesh is a DeviceMesh of one dimension, not {type(mesh).__name__}: "
            'init_device_mesh("cuda", (8,), mesh_dim_names=("ep",))'
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ()
        raise ParallelError(
            f"the mesh has {mesh.ndim} dimensions {names}; pass the one that the experts are spread over, "
            f'mesh["{names[-1] if names else "ep"}"]'
        )
    if mesh.get_coordinate() is None:
        raise ParallelError("this rank is not part of the mesh")


def agreed(mesh: DeviceMesh, prepare: Callable[[], P], describe: Callable[[P], str]) -> P:
    """What `prepare` returns, if it succeeds on all ranks and they found the same by their descriptions; else an error on all."""
    found: P | None = None
    error: Exception | None = None
    try:
        found = prepare()
        told = describe(found)
    except Exception as fault:
        error, told = fault, f"!{type(fault).__name__}: {fault}"
    everyone: list[str] = [""] * mesh.size()
    dist.all_gather_object(everyone, told, group=mesh.get_group())
    if error is not None:
        raise error
    assert found is not None
    for rank, other in enumerate(everyone):
        if other.startswith("!"):
            raise ParallelError(f"rank {rank} of the mesh failed: {other[1:]}")
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ParallelError(
                f"ranks 0 and {rank} of the mesh differ in their models, plans or arguments; pass the same on all ranks"
            )
    return found


def _digest(state: State) -> str:
    text = []
    for layer in state.layers:
        at = exchange.registered(layer.site)
        text.append(repr((layer.found, layer.slots.tolist(), at.dispatcher)))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _prepare(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Plan | str | os.PathLike[str] | None,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    dispatcher: str | None,
    topology: Topology | None,
    tokens: int,
) -> tuple[State, list[tuple[str, int, int, str, float]]]:
    _check(model, dispatcher, topology, mesh.size(), tokens)
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    found = find(model, args, kwargs)
    rank, ranks = int(mesh.get_local_rank()), int(mesh.size())
    group = mesh.get_group().group_name
    slots = rows_of(plan, found, ranks)
    for layer, row in zip(found, slots):
        idle = np.flatnonzero((row.reshape(ranks, -1) < 0).all(axis=1))
        if layer.separate and len(idle):
            raise ParallelError(
                f"the plan leaves rank {idle[0]} without experts of {layer.name}, which are separate parameters; "
                "give each rank one"
            )
    layers, report = [], []
    for layer, row in zip(found, slots):
        first = model.get_parameter(layer.parameters[0])
        traffic = _traffic(layer, first, topology, ranks, tokens)
        chosen = _dispatcher(dispatcher, traffic)
        per_rank = len(row) // ranks
        held = tuple(row.reshape(ranks, -1)[rank].tolist())
        place = Place(rank, ranks, per_rank, group)
        spare = len(row) - layer.num_experts if plan is not None else 0
        copies = local.copies_of(row, layer.num_experts, min(ranks, spare + 1))
        shared = local.shared_of(row, layer.num_experts, spare, rank, ranks)
        copied = tuple(n for e, n in zip(held, shared.tolist()) if e >= 0)
        site = exchange.register(exchange.Layout(layer.name, layer.num_experts, place, chosen, spare, held, copied))
        tables = local.Tables(copies, shared, site, _device(first, mesh))
        layers.append(Sharded(layer, row, site, tables, spare))
        report.append((layer.name, layer.num_experts, sum(e >= 0 for e in held), chosen.name, chosen.sent(traffic)))
    return State(mesh, layers, plan), report


def _check(model: nn.Module, dispatcher: str | None, topology: Topology | None, ranks: int, tokens: int) -> None:
    if not isinstance(model, nn.Module):
        raise ParallelError(f"parallelize takes the nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ParallelError(
            "the model is compiled already; parallelize it first, then torch.compile(model, backend='moec')"
        )
    if any(STATE in vars(m) or local.TABLES in vars(m) for m in model.modules()):
        raise ParallelError(
            "the model, or a part of it, is parallelized already; to move its experts use moec.rebalance"
        )
    names = [d.name for d in DISPATCHERS]
    if dispatcher is not None and dispatcher not in names:
        raise ParallelError(f"dispatcher is one of {', '.join(map(repr, names))}, or None; not {dispatcher!r}")
    if topology is not None and topology.num_gpus != ranks:
        raise ParallelError(f"the topology has {topology.num_gpus} GPUs, the mesh {ranks} ranks")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ParallelError(f"tokens is a whole number of at least 1, not {tokens!r}")


def rows_of(plan: Plan | None, found: Sequence[Found], ranks: int) -> list[np.ndarray]:
    """[S] for each layer: the expert in each slot. Without a plan, experts in order, as evenly as they go."""
    if plan is None:
        return [_in_order(layer.num_experts, ranks) for layer in found]
    if not isinstance(plan, Plan):
        raise ParallelError(f"plan is a moec.placement.Plan or the path of one, not {type(plan).__name__}")
    if plan.num_gpus != ranks:
        raise ParallelError(f"the plan is for {plan.num_gpus} GPUs, the mesh has {ranks} ranks; solve for this cluster")
    if plan.num_layers != len(found):
        raise ParallelError(
            f"the plan has {plan.num_layers} layers, the model {len(found)} with experts; solve for this model"
        )
    for layer in found:
        if layer.num_experts != plan.num_experts:
            raise ParallelError(
                f"the plan is for {plan.num_experts} experts, {layer.name} has {layer.num_experts}; solve for this model"
            )
    if len(plan.duplicates):
        where, gpu = plan.duplicates[0]
        raise ParallelError(
            f"the plan has two copies of an expert on GPU {gpu} in layer {where}; one would get no tokens"
        )
    return [row.astype(np.int64) for row in plan.physical_to_logical]


def _in_order(num_experts: int, ranks: int) -> np.ndarray:
    """Sizes that differ by at most one; a rank with one expert less has an empty slot."""
    room = -(-num_experts // ranks)
    slots = np.full((ranks, room), -1, dtype=np.int64)
    for rank, part in enumerate(np.array_split(np.arange(num_experts), ranks)):
        slots[rank, : len(part)] = part
    return slots.reshape(-1)


def _traffic(layer: Found, weight: torch.Tensor, topology: Topology | None, ranks: int, tokens: int) -> Traffic:
    links = [topology.link(0, g) for g in range(1, ranks)] if topology is not None else []
    bandwidth = min((link.bandwidth for link in links), default=450e9)
    latency = max((link.latency for link in links), default=2e-6)
    return Traffic(tokens, layer.top_k, ranks, layer.d_model, weight.element_size(), bandwidth, latency)


def _dispatcher(name: str | None, traffic: Traffic) -> Dispatcher:
    return cheapest(traffic) if name is None else next(d for d in DISPATCHERS if d.name == name)


def _device(weight: torch.Tensor, mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type) if weight.is_meta else weight.device


def _shard(model: nn.Module, layer: Sharded, state: State) -> None:
    stacked = bool(layer.found.stacked)
    experts = layer.experts(state.rank, state.ranks)
    owners: dict[nn.Module, list[str]] = {}
    for name in layer.found.parameters:
        path, _, own = name.rpartition(".")
        owners.setdefault(model.get_submodule(path), []).append(own)
    for name in layer.found.stacked:
        local.keep(model.get_parameter(name), experts)
    for each in layer.found.separate:
        for e, name in enumerate(each):
            if e not in experts:
                local.drop(model.get_parameter(name))
    # a module that owns parameters, since nobody iterates over the children of one as over a ModuleList's
    next(iter(owners)).add_module(local.TABLES, layer.tables)
    for module, names in owners.items():
        local.shard(module, names, layer.tables, stacked)
    for path in {p for n in layer.found.parameters for p in _above(n)}:
        around = model.get_submodule(path)
        if local.only_compiled not in around._forward_pre_hooks.values():
            around.register_forward_pre_hook(local.only_compiled, prepend=True)


def _keep_from_ddp(model: nn.Module, state: State) -> None:
    """DistributedDataParallel would average experts that differ from rank to rank, and send rank 0's tables to all. It goes by
    names, so this holds for the model itself and for torch.compile(model), not for a module around it.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    own = {n for layer in state.layers for n in layer.found.parameters}
    own |= {n for n, _ in model.named_buffers() if f"{local.TABLES}." in n}
    ignored |= own | {f"_orig_mod.{n}" for n in own} | {f".{n}" for n in own}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def _above(name: str) -> list[str]:
    """The paths of all modules around a parameter, "" for the model itself."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _bytes(model: nn.Module, found: Found) -> int:
    storages = {
        p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in map(model.get_parameter, found.parameters)
    }
    return sum(storages.values())


__all__ = ["ParallelReport", "PlacementError", "parallelize"]
