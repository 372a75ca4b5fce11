"""Times MoE layers on this machine and writes the table that `moec plan --device` reads (schema in `device`).

    python -m moec.scaling.measure --d-model 256 512 --granularity 1 2 4 8 --expansion 8 --out measured.json

A layer is `moec.nn.MoE(d_model, 4 * d_model, expansion, granularity)` under torch.compile(backend="moec"), forward and backward,
parameters and input getting gradients. The optimizer's step is not in it: its time goes with all parameters, not with tokens.
The layers of one width are timed in turns, so that a busy moment hits all of them; the figure is the median. A rate of plain
products is taken from `nn.Linear(d_model, 4 * d_model)` of the widest, forward and backward.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from moec.errors import MoecError
from moec.nn import MoE
from moec.scaling.costs import FF_RATIO
from moec.scaling.device import LayerTime
from moec.scaling.errors import ScalingError
from moec.scaling.store import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("moec", "inductor", "eager")

Step = Callable[[], None]


def layer_step(layer: nn.Module, x: torch.Tensor, backend: str) -> Step:
    """One forward and backward of a layer on x, parameters and x getting gradients; compiled when first called."""
    call = layer if backend == "eager" else torch.compile(layer, backend=backend)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        call(x).sum().backward()

    return step


def measure(
    d_models: Sequence[int],
    granularities: Sequence[int],
    expansion: int,
    *,
    tokens: int = 2048,
    backend: str = "moec",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 1.0,
    router: str = "softmax",
) -> tuple[tuple[LayerTime, ...], float]:
    """(a time for each width and granularity, FLOP/s of plain products). `seconds` are spent on each layer, after a warm-up.

    Raises ScalingError for sizes that are no layer.
    """
    _check(d_models, granularities, expansion, tokens, seconds)
    times = []
    for d in d_models:
        layers = [MoE(d, FF_RATIO * d, expansion, g, router=router, device=device, dtype=dtype) for g in granularities]
        x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
        medians = _medians([layer_step(layer, x, backend) for layer in layers], seconds, device)
        times += [
            LayerTime(d, layer.d_expert, layer.num_experts, layer.top_k, median / tokens)
            for layer, median in zip(layers, medians)
        ]
    widest = max(d_models)
    linear = nn.Linear(widest, FF_RATIO * widest, bias=False, device=device, dtype=dtype)
    x = torch.randn(tokens, widest, device=device, dtype=dtype, requires_grad=True)
    (plain,) = _medians([layer_step(linear, x, "eager")], seconds, device)
    return tuple(times), 6 * FF_RATIO * widest**2 * tokens / plain


def _medians(steps: Sequence[Step], seconds: float, device: str) -> list[float]:
    for _ in range(2):  # compiles, then fills caches
        for step in steps:
            step()
    samples: list[list[float]] = [[] for _ in steps]
    while len(samples[0]) < 3 or sum(samples[0]) < seconds:
        for step, into in zip(steps, samples):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            into.append(time.perf_counter() - start)
    return [statistics.median(sample) for sample in samples]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _check(d_models: Sequence[int], granularities: Sequence[int], expansion: int, tokens: int, seconds: float) -> None:
    sizes = {"--d-model": d_models, "--granularity": granularities, "--expansion": (expansion,), "--tokens": (tokens,)}
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise ScalingError(f"{name} {' '.join(map(str, values))}: give whole numbers of at least 1")
    if not seconds > 0:
        raise ScalingError(f"--seconds is {seconds:g}; give a time above zero")
    bad = [(d, g) for d in d_models for g in granularities if FF_RATIO * d % g]
    if bad:
        d, g = bad[0]
        raise ScalingError(
            f"4 * d_model = {FF_RATIO * d} does not divide into G = {g} experts; take powers of two for G and d_model"
        )


def machine() -> str:
    """The processor, the threads and the software, in words."""
    info = Path("/proc/cpuinfo")
    names = (
        [s.split(":", 1)[1].strip() for s in info.read_text().splitlines() if "model name" in s]
        if info.exists()
        else []
    )
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads of {cpu}, torch {torch.__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 after an error on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m moec.scaling.measure", description="Times MoE layers on this machine."
    )
    parser.add_argument("--d-model", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--granularity", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="in a call of the layer")
    parser.add_argument("--router", default="softmax", help="a name in moec.nn.ROUTERS")
    parser.add_argument("--backend", choices=BACKENDS, default="moec")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--torch-device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each layer")
    parser.add_argument("--out", default="measured.json")
    args = parser.parse_args(argv)
    try:
        times, rate = measure(
            args.d_model,
            args.granularity,
            args.expansion,
            tokens=args.tokens,
            backend=args.backend,
            dtype=DTYPES[args.dtype],
            device=args.torch_device,
            seconds=args.seconds,
            router=args.router,
        )
        rows = [asdict(t) | {"tokens_per_second": 1 / t.seconds_per_token} for t in times]
        head = {"machine": machine(), "dtype": args.dtype, "backend": args.backend, "tokens": args.tokens}
        write_json(args.out, head | {"flops_per_second": rate, "rows": rows})
    except (MoecError, OSError, ValueError) as error:
        print(f"moec.scaling.measure: {error}", file=sys.stderr)
        return 2
    for t in times:
        print(f"d_model {t.d_model:5}  G {t.granularity:4g}  {1 / t.seconds_per_token:12,.0f} tokens/s of one layer")
    print(f"plain products {rate / 1e9:.1f} GFLOP/s; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
