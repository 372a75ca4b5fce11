"""What a plan is worth on recorded routings: balance and traffic, token by token, with the split that would run.

    plan.evaluate(topk_LTK)                       # all tokens as one batch
    plan.evaluate(topk_LTK, batch=1024)           # as batches of 1024 tokens, each split on its own
    plan.evaluate(topk_LTK, split="even")         # with another split than the plan's own

A *remote-node send* is one token that goes to one node other than its home, however many of its experts are there: a
dispatch that sends a token once per node and fans it out inside. Homes are given, or else token t lives on GPU t % G.

Shape letters: L layers, T tokens, K top-k, S slots, G GPUs, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import Tables, prefer, settle, split
from .errors import PlacementError
from .plan import Plan, Split


@dataclass(frozen=True)
class Evaluation:
    """Measured on tokens. Imbalance is max over mean of the GPUs' loads, of every layer and batch.

    imbalance              mean over layers and batches;     imbalance_p50, imbalance_p95, imbalance_max   of the same
    imbalance_total        sum of the busiest GPUs' loads over the sum of the means: what barriers between layers cost
    remote_node_sends      per token and layer
    remote_gpu_sends       per token and layer, to GPUs of the home node and of others, other than the home GPU
    """

    imbalance: float
    imbalance_p50: float
    imbalance_p95: float
    imbalance_max: float
    imbalance_total: float
    remote_node_sends: float
    remote_gpu_sends: float


def evaluate(
    plan: Plan,
    topk_LTK: np.ndarray,
    *,
    batch: int | None = None,
    split: Split | None = None,
    slack: float | None = None,
    home_T: np.ndarray | None = None,
) -> Evaluation:
    """Routes the tokens under the plan and counts.

    topk_LTK  [L, T, K] integers, expert ids; negative ones are no expert
    batch     tokens per batch (the last one may be short); None: all of them
    split     None: the plan's own             slack  of the flow; None: the plan's own
    home_T    [T] the GPU that each token lives on

    Raises PlacementError where layers or ids do not fit the plan.
    """
    topk = np.asarray(topk_LTK)
    if topk.ndim != 3 or topk.shape[0] != plan.num_layers or not topk.size or topk.max() >= plan.num_experts:
        raise PlacementError(
            f"topk {topk.shape} with ids up to {topk.max(initial=-1)}; the plan is for {plan.num_layers} layers "
            f"and {plan.num_experts} experts: topk_LTK is [layers, tokens, top-k]"
        )
    tokens = topk.shape[1]
    homes = torch.as_tensor(
        np.arange(tokens) % plan.num_gpus if home_T is None else np.asarray(home_T).astype(np.int64)
    )
    ids = torch.as_tensor(topk.astype(np.int64))
    loads, nodes, gpus = [], 0, 0
    for layer in range(plan.num_layers):
        tables = plan.tables(layer)
        for part, home in zip(ids[layer].split(batch or tokens), homes.split(batch or tokens)):
            if (split or plan.split) == "even":
                slots = evenly(tables, part)
            else:
                slots = flowing(tables, part, home, plan.slack if slack is None else slack)
            real = slots >= 0
            at = tables.gpu_of[slots.clamp(min=0)]
            loads.append(torch.bincount(at[real], minlength=plan.num_gpus))
            gpus += _visited(at, real, home, plan.num_gpus)
            nodes += _visited(tables.node_of_gpu[at], real, tables.node_of_gpu[home], plan.num_nodes)
    load = torch.stack(loads).double().numpy()
    load = load[load.sum(axis=1) > 0]
    imbalance = load.max(axis=1) / load.mean(axis=1) if len(load) else np.ones(1)
    return Evaluation(
        imbalance=float(imbalance.mean()),
        imbalance_p50=float(np.percentile(imbalance, 50)),
        imbalance_p95=float(np.percentile(imbalance, 95)),
        imbalance_max=float(imbalance.max()),
        imbalance_total=float(load.max(axis=1).sum() / load.mean(axis=1).sum()) if len(load) else 1.0,
        remote_node_sends=nodes / (tokens * plan.num_layers),
        remote_gpu_sends=gpus / (tokens * plan.num_layers),
    )


def evenly(tables: Tables, topk_TK: Tensor) -> Tensor:
    """EPLB's split: the j-th token of an expert goes to its copy j % copies. Slots [T, K] int64, -1 for no expert."""
    ids = topk_TK.reshape(-1)
    order = ids.argsort(stable=True)
    turn = torch.empty_like(ids)
    turn[order] = torch.arange(len(ids)) - torch.searchsorted(ids[order], ids[order])
    copies = tables.copies_of[ids.clamp(min=0)]
    slots = copies.gather(1, (turn % (copies >= 0).sum(1))[:, None])[:, 0]
    return torch.where(ids < 0, -1, slots).reshape(topk_TK.shape)


def flowing(tables: Tables, topk_TK: Tensor, home_T: Tensor, slack: float) -> Tensor:
    """The per-batch split of all ranks at once, as the ranks would do it one by one. Slots [T, K] int64."""
    slots, gpus = len(tables.expert_of), len(tables.node_of_gpu)
    wanted = prefer(tables, topk_TK, home_T)
    cell = (home_T[:, None] * slots + wanted)[wanted >= 0]
    demand = torch.bincount(cell, minlength=gpus * slots).reshape(gpus, slots)
    quota = torch.from_numpy(split(tables, demand.numpy(), slack))
    found = torch.empty_like(wanted)
    for gpu in range(gpus):
        mine = home_T == gpu
        found[mine] = settle(tables, topk_TK[mine], wanted[mine], quota[gpu])
    return found


def _visited(at: Tensor, real: Tensor, home: Tensor, places: int) -> int:
    """Distinct places other than home, summed over tokens."""
    seen = torch.zeros(len(at), places + 1, dtype=torch.bool).scatter_(1, torch.where(real, at, places), True)
    seen.scatter_(1, home[:, None], False)
    return int(seen[:, :places].sum())
