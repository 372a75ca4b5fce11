"""One of the processes of test_libraries.py::test_two_ranks: `python -m tests.nn.ranks RANK WORLD FOLDER BACKEND`.

Each rank takes its share of the tokens, one step of DDP over gloo, one step of the router's bias, and leaves both in FOLDER.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import moec

from . import oracle

TOKENS = (2, 6)  # sequences and their length, on each rank


def batch(rank: int) -> Tensor:
    return oracle.tokens(*TOKENS, seed=10 + rank)


def loss(call: torch.nn.Module, layer: moec.nn.MoE, x: Tensor) -> Tensor:
    return call(x).square().mean() + moec.nn.aux_loss(layer)


def layer() -> moec.nn.MoE:
    return oracle.build("sigmoid", z_loss=0.1)


def main(rank: int, world: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    moe = layer()
    model = DistributedDataParallel(moe)
    call = model if backend == "eager" else torch.compile(model, backend=backend)
    loss(call, moe, batch(rank)).backward()
    moec.nn.update_biases(moe, rate=0.01)
    found = {name: p.grad for name, p in moe.named_parameters()}
    torch.save({**found, "expert_bias": moe.router.expert_bias}, folder / f"{rank}.pt")
    while not all((folder / f"{r}.pt").exists() for r in range(world)):  # then all have taken part in everything
        time.sleep(0.05)
    # Not by way of the interpreter's exit: there DDP's reducer joins gloo's threads while it holds the lock that one of them may
    # wait for, to let go of a tensor (torch 2.13; seen twice in ten runs on a busy machine).
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
