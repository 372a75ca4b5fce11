"""A layer on many ranks, of which only rank 0 exists (torch's fake process group): `-m tests.parallel.many DISPATCHER RANKS`.

Prints as JSON what the forward graph sends, in bytes, for T tokens on every rank, and what the formula says; how many collectives
there are; and the seconds it took to compile.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import moec
from moec.passes.dispatchers import DISPATCHERS, Traffic

T, K, D, F, E = 96, 2, 32, 48, 128


class Layer(torch.nn.Module):
    """As Mixtral's, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(D, E, bias=False)
        self.up_proj = torch.nn.Parameter(torch.randn(E, F, D))
        self.down_proj = torch.nn.Parameter(torch.randn(E, D, F))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            if token.numel() == 0:
                continue
            h = torch.nn.functional.silu(x[token] @ self.up_proj[e].t()) @ self.down_proj[e].t()
            out.index_add_(0, token, h * weights[token, choice, None])
        return out


class Stop(Exception):
    pass


def sent(graph: fx.Graph, ranks: int, rows: dict[str, float]) -> tuple[float, int]:
    """(bytes that leave a rank, collectives). `rows`: how many a collective moves whose input has an unknown number of them."""
    total, count = 0.0, 0
    for node in graph.nodes:
        name = str(node.target)
        if not name.startswith("_c10d_functional.") or "wait" in name:
            continue
        count += 1
        val = node.args[0].meta["val"]
        row = val[0].numel() * val.element_size() if val.dim() > 1 else val.element_size()
        unknown = not isinstance(val.shape[0], int)
        if "all_gather" in name:
            total += (ranks - 1) * row * (rows["tokens"] if unknown else val.shape[0])
        elif "reduce_scatter" in name:
            total += (ranks - 1) * row * rows["tokens"]
        elif "all_to_all" in name:
            total += row * (rows["visits"] if unknown else val.shape[0] * (ranks - 1) / ranks)
        else:
            raise AssertionError(f"{name} was not expected in a forward without copies")
    return total, count


def main(dispatcher: str, ranks: int) -> None:
    found: dict[str, Any] = {}
    model = Layer()
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
        moec.parallelize(model, mesh, args=(torch.randn(T, D),), dispatcher=dispatcher)
        found["local"] = list(model._parameters["up_proj"].shape)

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.setdefault("graph", gm.graph)
        return gm

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    def inner(gm: fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        compiler(gm, inputs)

        def stop(*args: object) -> None:
            raise Stop

        return stop

    torch._dynamo.register_backend(inner, name="keep_graph")
    x = torch.randn(T, D, requires_grad=True)
    begin = time.perf_counter()
    try:
        torch.compile(model, backend="moec", options={"moec.inner": "keep_graph"}, fullgraph=True)(x)
    except Stop:
        pass
    found["seconds"] = time.perf_counter() - begin
    graph = found.pop("graph")
    if ranks > 1:
        traffic = Traffic(T, K, ranks, D, 4)
        rows = {"tokens": T, "visits": traffic.visited() * T}
        found["sent"], found["collectives"] = sent(graph, ranks, rows)
        found["formula"] = next(d for d in DISPATCHERS if d.name == dispatcher).sent(traffic)
        found["markers"] = sum("logical" in str(n.target) for n in graph.nodes)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64)
