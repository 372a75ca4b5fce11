"""The split of one batch over replicas: integers only, from counts that all ranks have exchanged, so the same on every
rank.

    wanted  = prefer(tables, topk_TK, home_gpu)             on each rank: the slot each token would like best
    demand  = all_gather(bincount(wanted))                  [ranks, S]
    quota   = split(tables, demand, slack)                  on each rank, the same result: how many each slot takes from each rank
    slots   = settle(tables, topk_TK, wanted, quota[rank])  on each rank: who exceeds the quota goes to another copy

A token likes a copy on its own GPU, then on its own node, then on a node that it must visit anyway for another of its
experts. That is good for traffic and bad for balance; `moec.placement.flow` mends the balance with little change.

Shape letters: T tokens, K top-k, E experts, C copies at most, S slots, R ranks, G GPUs, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .errors import PlacementError
from .flow import level


@dataclass(frozen=True, eq=False)
class Tables:
    """What the split of one layer needs to know of the plan, as int64 tensors, so that a graph can take them as inputs.

    expert_of   [S], -1 for an empty slot     copies_of    [E, C], slots of each expert in order, padded with -1
    gpu_of      [S]                           node_of_gpu  [G]
    """

    expert_of: Tensor
    copies_of: Tensor
    gpu_of: Tensor
    node_of_gpu: Tensor
    num_nodes: int

    def to(self, device: torch.device | str) -> Tables:
        """The same on another device; `split` itself wants them on the CPU."""
        return replace(
            self,
            expert_of=self.expert_of.to(device),
            copies_of=self.copies_of.to(device),
            gpu_of=self.gpu_of.to(device),
            node_of_gpu=self.node_of_gpu.to(device),
        )


def prefer(tables: Tables, topk_TK: Tensor, home_T: Tensor) -> Tensor:
    """The slot that each choice of each token would like best, [T, K] int64; an id below 0 stays -1.

    topk_TK  integer expert ids    home_T  integer, the GPU that each token lives on

    Greedy cover: nodes that must be visited first (the home node, nodes of experts with one copy), then, expert by
    expert, a copy on a node already visited, else on the node that holds most of the token's experts.
    """
    copies, device = tables.copies_of, topk_TK.device
    real = copies >= 0
    place = tables.gpu_of[copies.clamp(min=0)]
    node = tables.node_of_gpu[place]
    valid = topk_TK >= 0
    ids = topk_TK.long().clamp(min=0)
    tokens, top_k = ids.shape
    home = home_T.long()[:, None]
    home_node = tables.node_of_gpu[home]
    on_node = torch.zeros(len(copies), tables.num_nodes, dtype=torch.int64, device=device)
    on_node = on_node.scatter_add(1, node, real.long()).clamp(max=1)
    offers = on_node[ids] * valid[..., None]  # [T, K, N]
    votes = offers.sum(1)
    visited = (offers * (offers.sum(-1, keepdim=True) == 1)).amax(1).scatter_(1, home_node, 1)  # [T, N]
    turn = torch.arange(tokens, device=device)[:, None]
    wanted = torch.full_like(ids, -1)
    for k in range(top_k):
        slot, gpu, at = copies[ids[:, k]], place[ids[:, k]], node[ids[:, k]]  # [T, C]
        # equal copies are taken in turn, by the token's number
        count = real[ids[:, k]].sum(1, keepdim=True)
        in_turn = (torch.arange(slot.shape[1], device=device) == turn % count).long()
        score = (gpu == home) * 8 + (at == home_node) * 4 + visited.gather(1, at) * 2
        score = (score * (top_k + 1) + votes.gather(1, at)) * 2 + in_turn
        best = score.masked_fill(slot < 0, -1).argmax(1, keepdim=True)
        wanted[:, k] = torch.where(valid[:, k], slot.gather(1, best)[:, 0], -1)
        visited.scatter_(1, at.gather(1, best), 1)
    return wanted


def split(tables: Tables, demand_RS: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """How many tokens each slot takes from each rank, [R, S] int64; every rank's tokens of every expert stay as many as
    they were.

    demand_RS  integers, tokens of each rank that want each slot; ranks lie on the GPUs in order
    slack      share by which a GPU may exceed the mean
    """
    demand = demand_RS.astype(np.int64)
    total = demand.sum(axis=0)
    if total[tables.expert_of.numpy() < 0].any():
        raise PlacementError("tokens want a slot that holds no expert; count what prefer() returned under this plan")
    take = level(total[None], tables.expert_of.numpy()[None], len(tables.node_of_gpu), slack)[0]
    return _divide(tables, demand, total, take)


def _divide(tables: Tables, demand: np.ndarray, total: np.ndarray, take: np.ndarray) -> np.ndarray:
    """Divides the change of every slot among the ranks: those that live on another node give up theirs first."""
    ranks = len(demand)
    givers, getters = np.flatnonzero(take < total), np.flatnonzero(take > total)
    expert, node_of_gpu = tables.expert_of.numpy(), tables.node_of_gpu.numpy()
    rank_node = node_of_gpu[np.arange(ranks) * len(node_of_gpu) // ranks]
    order = np.argsort(rank_node[:, None] == node_of_gpu[tables.gpu_of.numpy()[givers]], axis=0, kind="stable")
    upto = np.cumsum(np.take_along_axis(demand[:, givers], order, axis=0), axis=0)
    gives = np.empty_like(upto)
    np.put_along_axis(gives, order, np.diff(np.minimum(upto, (total - take)[givers]), axis=0, prepend=0), axis=0)
    # per expert, what ranks gave and what slots need are laid end to end; where the intervals overlap, tokens move
    getters = getters[np.argsort(expert[getters], kind="stable")]
    need = (take - total)[getters]
    end = np.cumsum(need)
    first = np.searchsorted(expert[getters], expert[getters])
    end -= (end - need)[first]
    pool = np.zeros((len(tables.copies_of), ranks), dtype=np.int64)
    np.add.at(pool, expert[givers], gives.T)
    pool_end = np.cumsum(pool, axis=1)[expert[getters]]
    begin = np.maximum(pool_end - pool[expert[getters]], (end - need)[:, None])
    quota = demand.copy()
    quota[:, givers] -= gives
    quota[:, getters] += np.maximum(np.minimum(pool_end, end[:, None]) - begin, 0).T
    return quota


def settle(tables: Tables, topk_TK: Tensor, wanted_TK: Tensor, quota_S: Tensor) -> Tensor:
    """The slot of each choice, [T, K] int64: as wanted up to the quota of each slot, the rest to copies that have quota
    left.

    quota_S  this rank's row of `split`; per expert it sums to the rank's tokens of that expert

    Static shapes, no synchronization.
    """
    slots = len(tables.expert_of)
    wanted, ids = wanted_TK.reshape(-1), topk_TK.reshape(-1).long()
    bucket = torch.where(wanted < 0, slots, wanted)
    count = bucket.new_zeros(slots + 1).scatter_add(0, bucket, torch.ones_like(bucket))
    over = _rank_within(bucket, count) >= torch.cat([quota_S.long(), count[-1:]])[bucket]
    experts = len(tables.copies_of)
    key = torch.where(over, ids, experts)
    excess = key.new_zeros(experts + 1).scatter_add(0, key, torch.ones_like(key))
    place = _rank_within(key, excess)
    copies = tables.copies_of
    need = torch.where(copies >= 0, (quota_S.long() - count[:-1]).clamp(min=0)[copies.clamp(min=0)], 0)
    ends = torch.cat([need.cumsum(1), need.new_zeros(1, copies.shape[1])])
    column = (place[:, None] >= ends[key]).sum(1).clamp(max=copies.shape[1] - 1)
    moved = copies[key.clamp(max=experts - 1), column]
    return torch.where(over, moved, wanted).reshape(wanted_TK.shape)


def _rank_within(bucket: Tensor, count: Tensor) -> Tensor:
    """The how-manieth of its bucket each entry is, in order."""
    order = bucket.argsort(stable=True)
    rank = torch.empty_like(bucket)
    rank[order] = torch.arange(len(bucket), device=bucket.device) - (count.cumsum(0) - count)[bucket[order]]
    return rank
