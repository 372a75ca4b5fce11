"""Question: is one MoE layer that moec compiled from its eager loop ever slower than the best the library itself offers?

    python benchmarks/layer.py                          # forward: torch.compile(backend="moec") against transformers
    python benchmarks/layer.py --backward --inductor    # forward and backward; the library's paths under Inductor as well
    python benchmarks/layer.py --ops --no-moec          # a layer written by hand with the moec:: ops, under Inductor

The layer is `Qwen3MoeSparseMoeBlock` of transformers, router included, with one set of weights for all variants:

    eager, grouped_mm      what transformers runs with that `experts_implementation`
    +inductor              the same under plain torch.compile
    moec                   torch.compile(backend="moec") of the eager one
    ops                    the `moec::` ops by hand, under Inductor: what the ops alone are worth

Outputs (and with --backward the gradient of the input and of both expert weights) are compared with those of eager before
anything is timed. Repetitions are interleaved, so that a busy moment hits every variant; the figure is the median. (The backward
of eager writes a gradient of all experts for every expert that has rows: with 256 of them it takes tens of seconds.) A cell fails
the target where a variant of ours takes more than 1.1 times the better of plain eager and plain grouped_mm.

Shape letters: T tokens, K top-k, E experts, D model width, F expert width.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

SHAPES = ("2048,1024,64,8", "1024,256,256,8", "1024,2048,16,2")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}  # of the largest entry
OURS, BASELINES = ("moec", "ops"), ("eager", "grouped_mm")
TARGET = 1.1

Forward = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int, int]  # D, F, E, K


@dataclass(frozen=True)
class Cell:
    """One row of the table: milliseconds of every variant, and how much they differ from eager's result."""

    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    dtype: str
    tokens: int
    backward: bool
    milliseconds: dict[str, float]
    repeats: int
    error: dict[str, float] = field(default_factory=dict)

    def against_best(self, name: str) -> float:
        return self.milliseconds[name] / min(self.milliseconds[b] for b in BASELINES)


class OpsBlock(nn.Module):
    """The layer as moec lowers it: routing once, products on sorted slot rows, everything between them fused by Inductor."""

    def __init__(self, block: Qwen3MoeSparseMoeBlock) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        ops, experts = torch.ops.moec, self.experts
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, topk_weights, topk_ids = self.gate(x)
        k = topk_ids.shape[-1]
        order, inverse, offsets = ops.route(topk_ids, experts.num_experts)
        rows = ops.dispatch(x, order, inverse, offsets, k)
        gate, up = ops.grouped_linear(rows, [experts.gate_up_proj], [], offsets).chunk(2, dim=-1)
        y = ops.grouped_linear(experts.act_fn(gate) * up, [experts.down_proj], [], offsets)
        y = y * ops.dispatch(topk_weights.reshape(-1), order, inverse, offsets, 1).unsqueeze(-1)
        return ops.combine(y, order, inverse, offsets, k).view(hidden_states.shape)


def blocks(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Qwen3MoeSparseMoeBlock]:
    """The block once for each implementation of transformers; all share one set of parameters."""
    d_model, d_expert, num_experts, top_k = shape
    found: dict[str, Qwen3MoeSparseMoeBlock] = {}
    for implementation in BASELINES:
        config = Qwen3MoeConfig(
            hidden_size=d_model,
            moe_intermediate_size=d_expert,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        with torch.device("meta" if found else device):
            block = Qwen3MoeSparseMoeBlock(config).to(dtype)
        if found:
            block.load_state_dict(found["eager"].state_dict(keep_vars=True), assign=True)
        else:
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=d_model**-0.5)
        found[implementation] = block
    return found


def variants(
    shape: Shape, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[dict[str, Forward], Qwen3MoeSparseMoeBlock]:
    torch._dynamo.reset()
    plain = blocks(shape, dtype, args.device)
    found: dict[str, Forward] = dict(plain)
    if args.inductor:
        found |= {f"{name}+inductor": torch.compile(block) for name, block in plain.items()}
    if args.moec:
        found["moec"] = torch.compile(plain["eager"], backend="moec")
    if args.ops:
        import moec.kernels  # noqa: F401  (defines the ops)

        found["ops"] = torch.compile(OpsBlock(plain["eager"]))
    return found, plain["eager"]


def step(forward: Forward, x: Tensor, parameters: list[nn.Parameter], backward: bool) -> list[Tensor]:
    """What is timed: a forward, or a forward and backward into .grad; returns what is compared."""
    if not backward:
        with torch.no_grad():
            return [forward(x)]
    for t in (x, *parameters):
        t.grad = None
    out = forward(x)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(t.grad for t in (x, *parameters) if t.grad is not None)]


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a part of the largest entry, over all tensors."""
    assert len(got) == len(expected), f"{len(got)} results and gradients, expected {len(expected)}"
    worst = 0.0
    for g, e in zip(got, expected):
        scale = e.abs().max().item() or 1.0
        worst = max(worst, (g.float() - e.float()).abs().max().item() / scale)
    return worst


def measure(shape: Shape, dtype_name: str, args: argparse.Namespace) -> list[Cell]:
    dtype, cells = DTYPES[dtype_name], []
    forwards, base = variants(shape, dtype, args)
    parameters = list(base.experts.parameters())
    for tokens in args.tokens:
        x = torch.randn(1, tokens, shape[0], dtype=dtype, device=args.device, requires_grad=args.backward)
        expected = [t.clone() for t in step(forwards["eager"], x, parameters, args.backward)]
        errors, slow = {}, {}
        for name, forward in forwards.items():
            progress(f"{shape} {dtype_name} T={tokens}: checking {name}")
            for _ in range(2):  # the second run is past recompiles
                begin = time.perf_counter()
                got = step(forward, x, parameters, args.backward)
                synchronize(args.device)
                seconds = time.perf_counter() - begin
            if seconds > args.patience:
                slow[name] = [seconds]
            errors[name] = difference(got, expected)
            if errors[name] > TOLERANCE[dtype]:
                sys.exit(
                    f"{name} differs from eager by {errors[name]:.2e} at {shape} {dtype_name} T={tokens}; nothing is timed"
                )
        del got, expected
        times: dict[str, list[float]] = {name: slow.get(name, []) for name in forwards}
        start, repeats = time.perf_counter(), 0
        while repeats < args.repeats or (time.perf_counter() - start < args.seconds and repeats < 20 * args.repeats):
            repeats += 1
            progress(f"{shape} {dtype_name} T={tokens}: repetition {repeats}")
            for name, forward in forwards.items():
                if name in slow:
                    continue
                synchronize(args.device)
                begin = time.perf_counter()
                step(forward, x, parameters, args.backward)
                synchronize(args.device)
                times[name].append(time.perf_counter() - begin)
        medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        cells.append(Cell(*shape, dtype_name, tokens, args.backward, medians, repeats, errors))
        progress("")
        print(row(cells[-1]), flush=True)
    return cells


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def progress(text: str) -> None:
    """One line that overwrites itself on a terminal; nothing in a log, where the rows of the table are the progress."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def header(names: list[str]) -> str:
    ours = [f"{n}/best" for n in names if n in OURS]
    columns = [*(f"{n:>19}" for n in names), *(f"{n:>10}" for n in ours)]
    return f"{'D,F,E,K':>16} {'dtype':>5} {'T':>5}" + "".join(columns) + "   ms, median"


def row(cell: Cell) -> str:
    shape = f"{cell.d_model},{cell.d_expert},{cell.num_experts},{cell.top_k}"
    text = f"{shape:>16} {cell.dtype:>5} {cell.tokens:>5}" + "".join(
        f"{ms:>19.2f}" for ms in cell.milliseconds.values()
    )
    ratios = [cell.against_best(n) for n in cell.milliseconds if n in OURS]
    return text + "".join(f"{r:>9.2f}{'!' if r > TARGET else ' '}" for r in ratios) + f"   x{cell.repeats}"


def machine(device: str) -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D,F,E,K")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 256, 2048])
    parser.add_argument("--backward", action="store_true", help="time a forward and a backward")
    parser.add_argument("--inductor", action="store_true", help="also transformers' paths under plain torch.compile")
    parser.add_argument("--ops", action="store_true", help="also a layer written by hand with the moec:: ops")
    parser.add_argument("--no-moec", dest="moec", action="store_false", help='leave torch.compile(backend="moec") out')
    parser.add_argument("--repeats", type=int, default=7, help="at least so many repetitions")
    parser.add_argument("--seconds", type=float, default=3.0, help="go on repeating for so long")
    parser.add_argument("--patience", type=float, default=10.0, help="what takes longer than this is timed once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write machine and cells here")
    args = parser.parse_args()

    torch.manual_seed(0)
    here = machine(args.device)
    print("  ".join(f"{key}: {value}" for key, value in here.items()))
    names = [*BASELINES, *(f"{b}+inductor" for b in BASELINES if args.inductor)]
    names += [name for name in OURS if getattr(args, name)]
    print(header(names), flush=True)
    cells = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            d_model, d_expert, num_experts, top_k = (int(n) for n in shape.split(","))
            cells += measure((d_model, d_expert, num_experts, top_k), dtype, args)
    ratios = {name: [cell.against_best(name) for cell in cells] for name in names if name in OURS}
    for name, found in ratios.items():
        slow = sum(r > TARGET for r in found)
        print(
            f"{name}: {min(found):.2f} to {max(found):.2f} of the best baseline; {slow} of {len(found)} cells over {TARGET}"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "cells": [asdict(c) for c in cells]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
