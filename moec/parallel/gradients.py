"""Gradients after a backward on every rank. Which loss is minimized has to be said, since no rank sees all of it.

Rank r computes a loss L_r on its own tokens. Without a further step

    an expert's gradient, on the rank that holds it     d (L_1 + ... + L_R) / dW     over the R ranks of the group, copies summed
    every other gradient, on rank r                     d L_r / dW

`sync_gradients` makes both the gradient of one loss, on all ranks:

    reduction="mean"   L = (L_1 + ... + L_R) / R   as DDP does. If L_r is a mean over the tokens of rank r, this is the mean over
                                                   all tokens only where ranks have equally many
    reduction="sum"    L = L_1 + ... + L_R         for an L_r that is a sum over tokens, divided by one number on all ranks (for
                                                   the mean: that of all their tokens)

On a mesh of several dimensions, for instance ("dp", "ep"), R counts the ranks of all dimensions, and experts are summed over the
others too.
Call it once, after the last backward before a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moec.errors import ParallelError

from .entry import State, state_of

REDUCTIONS = ("mean", "sum")


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold experts of this rank; those of remote experts are not among them."""
    from .local import dropped

    model = getattr(model, "_orig_mod", model)
    named = [model.get_parameter(n) for layer in state_of(model).layers for n in layer.found.parameters]
    return [p for p in named if not dropped(p)]


@torch.no_grad()
def sync_gradients(
    model: nn.Module, mesh: DeviceMesh | None = None, reduction: str = "mean", experts_only: bool = False
) -> None:
    """All gradients become those of one loss; see above.

    mesh          all ranks that compute a part of the loss, the dimension of the experts among them; None: that one alone
    experts_only  leave all but the experts to someone else, such as DDP, who averages

    Every rank must call it. A parameter without a gradient on some ranks counts as zero there, on all it stays without.
    """
    model = getattr(model, "_orig_mod", model)
    state = state_of(model)
    if reduction not in REDUCTIONS:
        raise ParallelError(f"reduction is one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}")
    others = _others(state, mesh)
    ranks = state.ranks
    for group in others:
        ranks *= dist.get_world_size(group)
    scale = 1 / ranks if reduction == "mean" else 1.0
    experts = expert_parameters(model)
    known = {id(model.get_parameter(n)) for layer in state.layers for n in layer.found.parameters}
    _reduce(experts, others, scale)
    if not experts_only:
        _reduce([p for p in model.parameters() if id(p) not in known], [state.mesh.get_group(), *others], scale)


def _others(state: State, mesh: DeviceMesh | None) -> list[dist.ProcessGroup]:
    """The groups of the other dimensions of the mesh."""
    if mesh is None:
        return []
    own = sorted(dist.get_process_group_ranks(state.mesh.get_group()))
    groups = [mesh.get_group(i) for i in range(mesh.ndim)]
    others = [g for g in groups if sorted(dist.get_process_group_ranks(g)) != own]
    if len(others) != len(groups) - 1:
        raise ParallelError(
            f"the mesh {tuple(mesh.mesh_dim_names or ())} of {tuple(mesh.shape)} has not one dimension over the ranks {own}, "
            "which hold the experts; pass the mesh that the one for moec.parallelize was taken from"
        )
    return others


def _reduce(parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup], scale: float) -> None:
    """Sums gradients over groups in turn, then scales them; one collective for each dtype, in float32 for 16 bits."""
    with_grad = [p for p in parameters if p.requires_grad]
    if groups and with_grad:
        told = torch.tensor([p.grad is not None for p in with_grad], dtype=torch.int64, device=with_grad[0].device)
        for group in groups:
            dist.all_reduce(told, group=group)
        for p, any_rank in zip(with_grad, told.tolist()):
            if any_rank and p.grad is None:
                p.grad = torch.zeros_like(p)
    grads: dict[torch.dtype, list[Tensor]] = {}
    for p in with_grad:
        if p.grad is not None:
            grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            grads.setdefault(grad.dtype, []).append(grad)
    for dtype, same in grads.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        if groups:
            flat = torch.cat([g.reshape(-1).to(wide) for g in same])
            for group in groups:
                dist.all_reduce(flat, group=group)
            for g, summed in zip(same, (flat * scale).split([g.numel() for g in same])):
                g.copy_(summed.view_as(g))
        elif scale != 1:
            torch._foreach_mul_(same, scale)
