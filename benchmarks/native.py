"""The CPU kernels of whole experts against the composed `moec::` ops, and against the roofline of this machine.

    OMP_NUM_THREADS=2 python benchmarks/native.py --shapes 1024,256,256,8 --tokens 16 256 2048 --json native.json
    OMP_NUM_THREADS=2 python benchmarks/native.py --backward

Both compute the same SwiGLU experts on the same routing; outputs (and gradients) are compared before anything is timed;
repetitions are interleaved and times are medians. The roofline of a cell is the larger of its FLOPs at the rate of one
large GEMM and its bytes (weights of the experts that have rows, once; backward once more, and gradients of all weights,
once) at the bandwidth of a sum over a large tensor. Weights that stay in a cache between repetitions beat it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import moec.kernels  # noqa: F401  (registers the ops)
from moec.kernels import native
from moec.ops import experts

ops = torch.ops.moec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SHAPES = ["2048,1024,64,8", "2048,768,128,8", "1024,256,256,8", "1024,128,256,32", "1024,2048,16,2"]
TOLERANCE = {"bf16": 0.03, "fp32": 1e-4, "fp16": 0.01}

Run = Callable[[], tuple[Tensor, ...]]


@dataclass
class Cell:
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    dtype: str
    tokens: int
    backward: bool
    milliseconds: dict[str, float]
    roofline: float
    error: float
    repeats: int


@dataclass
class Machine:
    """FLOP/s of a large product by dtype, B/s of reading."""

    flops: dict[str, float]
    bandwidth: float


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_machine(dtypes: list[str]) -> Machine:
    flops = {}
    for name in dtypes:
        a, b = (torch.randn(2048, 2048).to(DTYPES[name]) for _ in range(2))
        flops[name] = 2 * 2048**3 / seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    large = torch.ones(1 << 26)
    return Machine(flops, 4 * large.numel() / seconds(lambda: large.sum()))


class Layer:
    """Random experts and a random routing: T distinct choices of K experts."""

    def __init__(self, shape: tuple[int, ...], dtype: str, tokens: int) -> None:
        d, f, e, k = shape
        self.top_k, t = k, DTYPES[dtype]
        self.x = torch.randn(tokens, d).to(t)
        self.up = torch.empty(e, 2 * f, d, dtype=t).normal_(0, d**-0.5)
        self.down = torch.empty(e, d, f, dtype=t).normal_(0, f**-0.5)
        scores, ids = torch.randn(tokens, e).topk(k)
        self.scale, self.ids = scores.softmax(-1).reshape(-1), ids
        self.grad = torch.randn(tokens, d).to(t)
        self.routed = ops.route(ids, e)

    def layer(self) -> experts.Layer:
        lists = ([], [self.up], [self.down], [], [], [])
        return experts.unpack((*self.routed, self.scale, *lists, self.top_k, "silu", "halves", False, False))

    def native(self) -> tuple[Tensor, ...]:
        return (native.forward(self.x, self.layer(), False)[0],)

    def native_both(self) -> tuple[Tensor, ...]:
        out, pre = native.forward(self.x, self.layer(), True)
        needs = (True,) * 5 + (False,) * 3
        grads = native.backward(self.grad, self.x, pre, self.layer(), needs)
        return out, grads[0], grads[1], grads[3][0], grads[4][0]

    def composed(self) -> tuple[Tensor, ...]:
        order, inverse, offsets = self.routed
        rows = ops.dispatch(self.x, order, inverse, offsets, self.top_k)
        gate, up = ops.grouped_linear(rows, [self.up], [], offsets).chunk(2, dim=-1)
        y = ops.grouped_linear(F.silu(gate) * up, [self.down], [], offsets)
        scale = ops.dispatch(self.scale.to(y.dtype), order, inverse, offsets, 1)
        return (ops.combine(y * scale.unsqueeze(-1), order, inverse, offsets, self.top_k),)

    def composed_both(self) -> tuple[Tensor, ...]:
        leaves = [self.x, self.scale, self.up, self.down]
        for leaf in leaves:
            leaf.requires_grad_()
        (out,) = self.composed()
        grads = torch.autograd.grad(out, leaves, self.grad)
        for leaf in leaves:
            leaf.requires_grad_(False)
        return out.detach(), *grads


def roofline(layer: Layer, shape: tuple[int, ...], dtype: str, backward: bool, machine: Machine) -> float:
    d, f, e, _ = shape
    offsets, size = layer.routed[2], layer.x.element_size()
    hit = int((offsets.diff(prepend=offsets.new_zeros(1)) > 0).sum())
    flops = 6.0 * int(offsets[-1]) * d * f
    weights = 3.0 * d * f * size
    num_bytes = hit * weights
    if backward:
        flops, num_bytes = 3 * flops, 2 * num_bytes + e * weights
    return max(flops / machine.flops[dtype], num_bytes / machine.bandwidth)


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in zip(got, expected))


def measure(shape: tuple[int, ...], dtype: str, tokens: int, args: argparse.Namespace, machine: Machine) -> Cell:
    layer = Layer(shape, dtype, tokens)
    runs: dict[str, Run] = {"native": layer.native_both if args.backward else layer.native}
    runs["composed"] = layer.composed_both if args.backward else layer.composed
    error = difference(runs["native"](), runs["composed"]())
    if error > TOLERANCE[dtype]:
        sys.exit(f"native differs from the composed ops by {error:.2e} at {shape} {dtype} T={tokens}; nothing is timed")
    if args.only:
        runs = {args.only: runs[args.only]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(times[next(iter(runs))]) < args.repeats or time.perf_counter() - start < args.seconds:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    bound = 1e3 * roofline(layer, shape, dtype, args.backward, machine)
    return Cell(*shape, dtype, tokens, args.backward, medians, bound, error, len(times[next(iter(runs))]))


def row(cell: Cell) -> str:
    ms, native_ms = cell.milliseconds, cell.milliseconds.get("native", float("nan"))
    shape = f"{cell.d_model},{cell.d_expert},{cell.num_experts},{cell.top_k}"
    text = f"{shape:>16} {cell.dtype} {cell.tokens:>5} {native_ms:>9.2f} {ms.get('composed', float('nan')):>9.2f}"
    ratio = ms.get("composed", float("nan")) / native_ms
    return f"{text} {ratio:>7.2f} {cell.roofline:>9.2f} {cell.roofline / native_ms:>6.0%} {cell.error:>9.1e}  x{cell.repeats}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D,F,E,K")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 2048])
    parser.add_argument("--backward", action="store_true", help="a forward that keeps, and a backward")
    parser.add_argument("--only", choices=("native", "composed"), help="time one of the two")
    parser.add_argument("--repeats", type=int, default=5, help="at least so many repetitions")
    parser.add_argument("--seconds", type=float, default=0.5, help="go on repeating for so long")
    parser.add_argument("--json", type=Path, help="write machine and cells here")
    args = parser.parse_args()
    if reason := native.available():
        sys.exit(f"no native kernels: {reason}")

    torch.manual_seed(0)
    machine = measure_machine(args.dtypes)
    here = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        **asdict(machine),
    }
    print("  ".join(f"{key}: {value}" for key, value in here.items()))
    print(
        f"{'D,F,E,K':>16} type {'T':>5} {'native':>9} {'composed':>9} {'speedup':>7} {'roofline':>9} {'':>6} {'error':>9}   ms"
    )
    cells = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            for tokens in args.tokens:
                cells.append(measure(tuple(int(n) for n in shape.split(",")), dtype, tokens, args, machine))
                print(row(cells[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "cells": [asdict(c) for c in cells]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
