"""Trains a small decoder whose experts are spread over ranks. One process per rank:

    torchrun --nproc-per-node 2 examples/expert_parallel.py
    torchrun --nproc-per-node 4 examples/expert_parallel.py --plan copies --dispatcher all-to-all

Every rank builds the same model, keeps its share of the experts, and reads its own sequences. Every few steps the experts move to
where another plan wants them (at random here; `moec.placement.solve` makes good ones). On CPU over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import moec
from moec.placement import Plan

VOCABULARY, WIDTH, HEADS, LENGTH = 64, 64, 4, 32


class Block(nn.Module):
    """Attention and experts, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = moec.nn.MoE(
            WIDTH, 4 * WIDTH, expansion=2, granularity=4, activation="silu", gated=True, init_scale=1.0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.moe(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step: int, rank: int, sequences: int) -> torch.Tensor:
    """Sequences that count up by a stride of their own, modulo the vocabulary: something to learn in a minute."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(VOCABULARY, (sequences, 1), generator=generator)
    stride = torch.randint(1, 6, (sequences, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def plan_of(kind: str, layers: int, experts: int, ranks: int, seed: int) -> Plan | None:
    """None: experts in order. "random": any. "copies": one slot more on each rank, which holds a copy."""
    if kind == "in order":
        return None
    rng = np.random.default_rng(seed)
    room = -(-experts // ranks) + (kind == "copies")
    slots = np.full((layers, ranks, room), -1)
    for layer in range(layers):
        for i, e in enumerate(rng.permutation(experts)):
            slots[layer, i % ranks, i // ranks] = e
        if kind == "copies" and ranks > 1:
            for rank in range(ranks):
                slots[layer, rank, -1] = rng.choice(np.setdiff1d(np.arange(experts), slots[layer, rank]))
    return Plan(slots.reshape(layers, -1), experts, np.zeros(ranks, dtype=np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8, help="of each rank and step")
    parser.add_argument("--plan", choices=["in order", "random", "copies"], default="random")
    parser.add_argument("--dispatcher", choices=["all-gather", "all-to-all"], default=None)
    parser.add_argument("--every", type=int, default=10, help="steps between two plans; 0: one plan")
    parser.add_argument(
        "--inner", default="inductor", help='what compiles the rewritten graph: "inductor", "aot_eager"'
    )
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("ep",))

    torch.manual_seed(0)  # the same model on every rank
    model = Decoder(given.layers).to(device)
    experts = model.blocks[0].moe.num_experts
    plan = plan_of(given.plan, given.layers, experts, ranks, seed=0)
    report = moec.parallelize(model, mesh["ep"], plan, args=(batch(0, 0, 2).to(device),), dispatcher=given.dispatcher)
    if rank == 0:
        print(report)
    compiled = torch.compile(model, backend="moec", options={"moec.inner": given.inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(given.steps):
        ids = batch(step, rank, given.sequences).to(device)
        loss = F.cross_entropy(compiled(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        moec.parallel.sync_gradients(model)  # all ranks minimize the mean of their losses
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step % 5 == 0 or step == given.steps - 1):
            print(f"step {step:3d}  loss {float(mean) / ranks:.4f}", flush=True)
        if plan is not None and given.every and step % given.every == given.every - 1:
            plan = plan_of(given.plan, given.layers, experts, ranks, seed=step)
            moved = moec.rebalance(model, plan, optimizer)
            if rank == 0:
                print(f"step {step:3d}  another plan: {moved.slots} experts moved", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
