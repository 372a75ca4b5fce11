"""Question: what does granularity cost? Time of one declared layer against G, at constant active compute, beside the roofline.

    python benchmarks/granularity.py                                  # forward, G = 1 to 16
    python benchmarks/granularity.py --backward --json g.json --plot g.png

    dense       the feed-forward block that is cut up, in eager: the same FLOPs in two (gated: three) products
    eager, inductor, moec   `moec.nn.MoE(d_model, d_ff, expansion, G)` as it is, and compiled
    roofline    bytes and FLOPs of the experts' products alone, on the machine that `moec/schedule/roofline.py` describes

Active parameters and expert FLOPs are the same in every row; what grows with G is the number of products, of rows that are
gathered and summed, and the router. Outputs are compared with eager before anything is timed. Repetitions go through all G and
variants in turn, so that a busy moment hits all of them; the figure is the median. The plot needs matplotlib.

Shape letters: T tokens, K top-k, E experts, D model width, F expert width, G granularity.
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
from torch import Tensor, nn

import moec
from moec.ir import Problem
from moec.schedule import roofline

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # of the norm of the result
VARIANTS = ("dense", "eager", "inductor", "moec")
GRADIENTS = 3  # a product and its two gradients take three times the product

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One granularity: milliseconds of every variant, medians over `repeats`, and of the roofline."""

    granularity: int
    num_experts: int
    top_k: int
    d_expert: int
    milliseconds: dict[str, float]
    roofline: float
    repeats: int


def build(args: argparse.Namespace, granularity: int) -> moec.nn.MoE:
    torch.manual_seed(0)
    return moec.nn.MoE(
        args.d_model,
        args.d_ff,
        args.expansion,
        granularity,
        router=args.router,
        activation=args.activation,
        gated=args.gated,
        capacity_factor=args.capacity_factor,
        device=args.device,
        dtype=DTYPES[args.dtype],
    )


def dense(args: argparse.Namespace) -> nn.Module:
    """All of a token's experts as one: what a shared expert of width d_ff is."""
    body = moec.nn.experts.Body(args.activation, args.gated, False, args.device, DTYPES[args.dtype])
    return moec.nn.experts.SharedExpert(args.d_model, args.d_ff, body)


def seconds_at_best(args: argparse.Namespace, layer: moec.nn.MoE) -> float:
    problem = Problem(
        num_tokens=args.tokens,
        top_k=layer.top_k,
        num_experts=layer.num_experts,
        d_model=layer.d_model,
        d_expert=layer.d_expert,
        dtype=DTYPES[args.dtype],
        device=args.device,
        training=args.backward,
        stacked=True,
    )
    num_bytes = roofline.hit_experts(problem) * roofline.weight_bytes(problem) + roofline.row_bytes(problem)
    flops = roofline.flops(problem, roofline.slots(problem))
    product = roofline.machine(problem).seconds(num_bytes, flops, roofline.element_size(problem))
    return product * (3 if args.gated else 2) * (GRADIENTS if args.backward else 1)


def step(forward: Forward, x: Tensor, parameters: list[nn.Parameter], backward: bool) -> Tensor:
    """What is timed: a forward, or a forward and backward into .grad."""
    if not backward:
        with torch.no_grad():
            return forward(x)
    for t in (x, *parameters):
        t.grad = None
    out = forward(x)
    out.backward(torch.ones_like(out))
    return out.detach()


def check(name: str, granularity: int, got: Tensor, want: Tensor) -> None:
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if error > TOLERANCE[got.dtype]:
        sys.exit(f"{name} differs from eager by {error:.1e} at G={granularity}; nothing is timed")


def measure(args: argparse.Namespace) -> list[Row]:
    # All G and variants share the code of one forward, and each is a compilation of it.
    torch._dynamo.config.recompile_limit = 8 * len(args.granularity) * len(VARIANTS)
    shape = (args.batch, args.tokens // args.batch, args.d_model)
    x = torch.randn(shape, dtype=DTYPES[args.dtype], device=args.device, requires_grad=args.backward)
    layers = {g: build(args, g) for g in args.granularity}
    block = dense(args)
    steps: dict[tuple[int, str], Callable[[], Tensor]] = {}
    for g, layer in layers.items():
        want = None
        for name in args.variants:
            progress(f"G={g}: compiling {name}")
            module = block if name == "dense" else layer
            call = module if name in ("dense", "eager") else torch.compile(module, backend=name)
            parameters = list(module.parameters())
            steps[g, name] = lambda call=call, parameters=parameters: step(call, x, parameters, args.backward)
            for _ in range(2):
                got = steps[g, name]()
            if name == "dense":
                continue
            want = layer(x).detach() if want is None else want
            check(name, g, got, want)
    times: dict[tuple[int, str], list[float]] = {key: [] for key in steps}
    start, repeats = time.perf_counter(), 0
    while repeats < args.repeats or (time.perf_counter() - start < args.seconds and repeats < 20 * args.repeats):
        repeats += 1
        progress(f"repetition {repeats}")
        for key, run in steps.items():
            synchronize(args.device)
            begin = time.perf_counter()
            run()
            synchronize(args.device)
            times[key].append(time.perf_counter() - begin)
    progress("")
    return [
        Row(
            g,
            layer.num_experts,
            layer.top_k,
            layer.d_expert,
            {name: 1e3 * statistics.median(times[g, name]) for name in args.variants},
            1e3 * seconds_at_best(args, layer),
            repeats,
        )
        for g, layer in layers.items()
    ]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def progress(text: str) -> None:
    """One line that overwrites itself on a terminal; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


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


def table(rows: list[Row]) -> str:
    names = [*rows[0].milliseconds, "roofline"]
    lines = [f"{'G':>4} {'E':>5} {'K':>4} {'F':>6}" + "".join(f"{n:>10}" for n in names) + "   ms, median"]
    for r in rows:
        values = [*r.milliseconds.values(), r.roofline]
        sizes = f"{r.granularity:>4} {r.num_experts:>5} {r.top_k:>4} {r.d_expert:>6}"
        lines.append(sizes + "".join(f"{v:>10.2f}" for v in values) + f"   x{r.repeats}")
    return "\n".join(lines)


def plot(rows: list[Row], args: argparse.Namespace, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install 'moec[scaling]', or leave --plot out")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    granularity = [r.granularity for r in rows]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in args.variants:
        axes.plot(granularity, [r.milliseconds[name] for r in rows], marker="o", label=name)
    axes.plot(granularity, [r.roofline for r in rows], linestyle="--", color="gray", label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_xticks(granularity, [str(g) for g in granularity])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("granularity G = d_ff / d_expert")
    axes.set_ylabel("ms, " + ("forward and backward" if args.backward else "forward"))
    axes.set_title(
        f"d_model {args.d_model}, d_ff {args.d_ff}, expansion {args.expansion}, {args.tokens} tokens, {args.dtype}"
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--d-model", type=int, default=512)
    add("--d-ff", type=int, help="default: 4 * d_model")
    add("--expansion", type=int, default=8)
    add("--granularity", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--tokens", type=int, default=2048)
    add("--batch", type=int, default=8, help="sequences; must divide the tokens")
    add("--dtype", default="bf16", choices=DTYPES)
    add("--router", default="softmax", choices=moec.nn.ROUTERS)
    add("--capacity-factor", type=float)
    add("--activation", default="relu", choices=moec.nn.ACTIVATIONS)
    add("--gated", action="store_true")
    add("--backward", action="store_true", help="time a forward and a backward")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--repeats", type=int, default=7, help="at least so many repetitions")
    add("--seconds", type=float, default=10.0, help="go on repeating for so long")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="write machine and rows here")
    add("--plot", type=Path, help="draw the table here, as PNG, SVG or PDF")
    args = parser.parse_args(argv)
    args.d_ff = args.d_ff or 4 * args.d_model
    if args.tokens % args.batch:
        parser.error(f"--batch {args.batch} does not divide --tokens {args.tokens}")
    return args


def main() -> None:
    args = parse()
    here = machine(args.device)
    print("  ".join(f"{key}: {value}" for key, value in here.items()), flush=True)
    rows = measure(args)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if args.plot:
        plot(rows, args, args.plot)


if __name__ == "__main__":
    main()
