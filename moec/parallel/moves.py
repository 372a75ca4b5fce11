"""`moec.rebalance`: another plan for a model that runs. Experts move between ranks, layer by layer; what is computed stays.

    moec.rebalance(model, plan, optimizer)       # between two steps, on every rank

Weights, gradients and the optimizer's state of an expert move together, in one all-to-all for each tensor; then the tables that
the graph reads are overwritten. Storages stay, shapes stay, so nothing compiles again.

Every rank checks the plan first and hears of the others' checks: one that fails leaves all as it was, on all ranks. A layer
changes when all of it has arrived on all ranks; if a transfer fails, the layers before it have moved, it and those after it have
not, and each layer still runs with the plan that it has.

Not handled: experts in separate parameters (the compiled code names those of a rank), another number of slots.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moec.errors import ParallelError
from moec.placement import Plan

from .entry import Sharded, State, agreed, rows_of, state_of


@dataclass(frozen=True)
class Moved:
    """What `rebalance` did: slots of all ranks that were filled from another rank, and the bytes that this rank sent."""

    slots: int
    sent: int


@torch.no_grad()
def rebalance(
    model: nn.Module, plan: Plan | str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> Moved:
    """Moves the experts of a parallelized model to where `plan` wants them. Call it on every rank, between steps.

    optimizer   its state moves along; without it the state would stay with the wrong experts, so pass it if there is one

    Raises ParallelError or PlacementError on every rank, with nothing changed, where the plan does not fit; ParallelError that
    names rank and layer where a transfer fails.
    """
    model = getattr(model, "_orig_mod", model)
    state = state_of(model)
    plan, rows = agreed(
        state.mesh, lambda: _prepare(model, state, plan, optimizer), lambda found: repr([r.tolist() for r in found[1]])
    )
    slots = sent = 0
    for layer, row in zip(state.layers, rows):
        if not np.array_equal(layer.slots, row):
            moved = _move(model, state, layer, row, optimizer)
            slots, sent = slots + moved.slots, sent + moved.sent
    state.plan = plan
    return Moved(slots, sent)


def _prepare(
    model: nn.Module, state: State, plan: Plan | str | os.PathLike[str], optimizer: torch.optim.Optimizer | None
) -> tuple[Plan, list[np.ndarray]]:
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if plan is None:
        raise ParallelError("rebalance needs a plan; make one with moec.placement.solve")
    rows = rows_of(plan, [layer.found for layer in state.layers], state.ranks)
    for layer, row in zip(state.layers, rows):
        if layer.found.separate:
            raise ParallelError(
                f"the experts of {layer.found.name} are separate parameters; rebalancing them is not handled"
            )
        if len(row) != len(layer.slots):
            raise ParallelError(
                f"the plan has {len(row)} slots in {layer.found.name}, which was parallelized with {len(layer.slots)}; solve "
                f"with slots_per_gpu={len(layer.slots) // state.ranks}"
            )
        for name in layer.found.stacked:
            p = model.get_parameter(name)
            for key, value in (optimizer.state.get(p, {}) if optimizer is not None else {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape[:1] != p.shape[:1]:
                    raise ParallelError(
                        f"the optimizer keeps {key!r} of {name} as {tuple(value.shape)}, which does not say what belongs to "
                        f"which of its {len(p)} experts; such an optimizer cannot be rebalanced"
                    )
    return plan, rows


def _move(
    model: nn.Module, state: State, layer: Sharded, row: np.ndarray, optimizer: torch.optim.Optimizer | None
) -> Moved:
    route = routes(layer.slots.reshape(state.ranks, -1), row.reshape(state.ranks, -1))
    targets: list[Tensor] = []
    for name in layer.found.stacked:
        p = model.get_parameter(name)
        targets.append(p.data)
        if p.grad is not None:
            targets.append(p.grad)
        known = optimizer.state.get(p, {}) if optimizer is not None else {}
        targets += [v for v in known.values() if isinstance(v, Tensor) and v.numel() > 1]
    arrived: list[Tensor] = []
    error: Exception | None = None
    try:
        for target in targets:
            arrived.append(_transfer(target, state, route))
    except Exception as fault:
        error = fault
    told = torch.tensor([0 if error is None else 1], device=targets[0].device)
    everyone = [torch.zeros_like(told) for _ in range(state.ranks)]
    if error is None:
        dist.all_gather(everyone, told, group=state.mesh.get_group())
    failed = [r for r, t in enumerate(everyone) if int(t)]
    if error is not None or failed:
        rank = state.rank if error is not None else failed[0]
        raise ParallelError(
            f"experts of {layer.found.name} could not be moved: rank {rank} failed ({error}); this layer and those after it keep "
            "the plan they had"
        ) from error
    for target, new in zip(targets, arrived):
        target.copy_(new)
    layer.slots = row
    layer.refresh(state.rank, state.ranks)
    sizes = sum(t.element_size() * t[0].numel() for t in targets)
    here = [rows for to, rows in enumerate(route[state.rank]) if to != state.rank]
    return Moved(
        sum(len(r) for f, tos in enumerate(route) for t, r in enumerate(tos) if f != t), sum(map(len, here)) * sizes
    )


Routes = list[list[list[tuple[int, int]]]]  # [from][to]: (slot there, slot here) on the two ranks


def routes(old: np.ndarray, new: np.ndarray) -> Routes:
    """From which rank each slot of `new` [R, n] is filled, given who has what in `old`: from its own, if it can be; else from the
    one that has sent least so far. -1 is an empty slot, which nobody fills.
    """
    ranks = len(old)
    found: Routes = [[[] for _ in range(ranks)] for _ in range(ranks)]
    load = [0] * ranks
    for to in range(ranks):
        for slot, e in enumerate(new[to].tolist()):
            if e < 0:
                continue
            owners = [r for r in range(ranks) if e in old[r]]
            source = to if to in owners else min(owners, key=lambda r: (load[r], r))
            load[source] += source != to
            found[source][to].append((int(np.flatnonzero(old[source] == e)[0]), slot))
    return found


def _transfer(target: Tensor, state: State, route: Routes) -> Tensor:
    """The rows of `target` [n, ...] as they will lie, in a tensor of their own."""
    rank, ranks = state.rank, state.ranks
    send = [source for to in range(ranks) for source, _ in route[rank][to]]
    place = [slot for source in range(ranks) for _, slot in route[source][rank]]
    given = target[torch.tensor(send, dtype=torch.int64, device=target.device)].contiguous()
    taken = given.new_empty((len(place), *given.shape[1:]))
    dist.all_to_all_single(
        taken,
        given,
        [len(route[source][rank]) for source in range(ranks)],
        [len(route[rank][to]) for to in range(ranks)],
        group=state.mesh.get_group(),
    )
    new = torch.zeros_like(target, memory_format=torch.contiguous_format)
    new[torch.tensor(place, dtype=torch.int64, device=target.device)] = taken
    return new
