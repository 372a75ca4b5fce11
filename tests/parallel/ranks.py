"""Processes that stay: ranks of a gloo group which run one case after the other, so that torch is imported once.

    results = ranks.run(2, cases.train, name="mixtral", plan="random")      # [result of rank 0, result of rank 1]

A case is a function `case(mesh, **arguments)` of a module; what it returns is pickled. If it raises on one rank, the others would
wait for it: the ranks are ended, the test fails with that rank's traceback, and the next case starts new ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

LIMIT = 240  # seconds for one case, on a busy machine

_groups: dict[int, Group] = {}


class Group:
    """Processes 0 to world - 1 of one gloo group."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((case.__module__, case.__name__, arguments))
        results: dict[int, Any] = {}
        faults: dict[int, str] = {}
        end = time.monotonic() + LIMIT
        while len(results) < len(self.pipes):
            pending = {p: r for r, p in enumerate(self.pipes) if r not in results}
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready and faults:
                break
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(pending.values())} did not come back within {LIMIT} s")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    fault, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    fault, value = "the process died", None
                if fault:
                    faults[rank] = fault
                    end = min(end, time.monotonic() + 5)  # one rank's fault often shows as another's closed connection
                results[rank] = value
        if faults:
            self.stop()
            raise AssertionError(
                "\n".join(f"rank {rank} of {len(self.pipes)}: {fault}" for rank, fault in faults.items())
            )
        return [results[r] for r in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        _groups.pop(len(self.pipes), None)


def run(world: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
    """What the case returns on each rank of a group of so many."""
    if world not in _groups:
        _groups[world] = Group(world)
    return _groups[world].run(case, arguments)


@atexit.register
def stop_all() -> None:
    for group in list(_groups.values()):
        group.stop()


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    faulthandler.enable()
    store = dist.FileStore(f"{folder}/meet", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=40))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            torch._dynamo.reset()
            value = getattr(importlib.import_module(module), name)(mesh, **arguments)
            pipe.send((None, value))
        except BaseException:
            pipe.send((traceback.format_exc(limit=-12), None))


def grid(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of a mesh as ("dp", "ep"), two data-parallel groups. Every rank must call it."""
    return init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "ep"))
