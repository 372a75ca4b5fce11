"""How long until the first result: E separate experts in a static loop, forward and backward.

    python benchmarks/compile_time.py                    # E = 128, D = 256, F = 128, T = 64; plain Dynamo + AOT beside it
    python benchmarks/compile_time.py --experts 32 --skip-plain --json out.json

Each measurement runs in a process of its own, so that nothing is warm but imports and moec's own library of CPU kernels.
`plain` is torch's own Dynamo with AOTAutograd and an eager backend, with the two settings that let it capture the loop in one
graph at all. Prints a table and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

CHILD = """
import json, sys, time, torch
from torch import nn
E, D, F, T, K, layers, how = *map(int, sys.argv[1:7]), sys.argv[7]

class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)
    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(D, E, bias=False), nn.ModuleList(Expert() for _ in range(E))
    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(MoE() for _ in range(layers))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

torch.manual_seed(0)
model, x = Model(), torch.randn(T, D, requires_grad=True)
if how == "plain":
    torch._dynamo.config.capture_dynamic_output_shape_ops = torch._dynamo.config.capture_scalar_outputs = True
    compiled = torch.compile(model, backend="aot_eager")
else:
    inner = how.removeprefix("moec-")
    torch.compile(nn.Linear(2, 2), backend="moec", options={"moec.inner": inner})(torch.randn(2, 2)).sum().backward()  # imports
    from moec.kernels import native
    native.available()  # compiles moec's own kernels, once for each machine and version: 5 to 10 s that no model pays again
    compiled = torch.compile(model, backend="moec", options={"moec.inner": inner})
started = time.perf_counter()
y = compiled(x)
forward = time.perf_counter()
y.sum().backward()
done = time.perf_counter()
print(json.dumps({"forward_s": forward - started, "total_s": done - started}))
"""


def measure(args: argparse.Namespace, layers: int, how: str) -> dict[str, float]:
    """Seconds to the first forward, and to the end of the first backward, in a fresh process with fresh caches."""
    sizes = [args.experts, args.d_model, args.d_expert, args.tokens, args.top_k, layers]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, sizes), how]

    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        )
    if done.returncode:
        raise SystemExit(f"{how}, {layers} layers: failed\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-expert", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument(
        "--skip-plain", action="store_true", help="leave out plain Dynamo + AOT, which takes a minute or more"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    runs = [("moec-inductor", 1), ("moec-inductor", 4), ("moec-aot_eager", 1), ("moec-aot_eager", 4)]
    runs += [] if args.skip_plain else [("plain", 1)]
    rows = []
    print(f"{'backend':16} {'layers':>6} {'forward s':>10} {'total s':>10}", flush=True)
    for how, layers in runs:
        row = {"backend": how, "layers": layers, **measure(args, layers, how)}
        rows.append(row)
        print(f"{how:16} {layers:6} {row['forward_s']:10.1f} {row['total_s']:10.1f}", flush=True)
    totals = {(r["backend"], r["layers"]): r["total_s"] for r in rows}
    if ("plain", 1) in totals:
        print(
            f"one layer against plain Dynamo + AOT: {totals['moec-inductor', 1] / totals['plain', 1]:.2f} (inductor inside)"
        )
        print(
            f"                                      {totals['moec-aot_eager', 1] / totals['plain', 1]:.2f} (aot_eager inside)"
        )
    print(f"four layers against one: {totals['moec-inductor', 4] / totals['moec-inductor', 1]:.2f} (inductor inside)")
    print(
        f"                         {totals['moec-aot_eager', 4] / totals['moec-aot_eager', 1]:.2f} (aot_eager inside)"
    )
    machine = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "time": time.strftime("%F %T"),
    }
    text = json.dumps({"sizes": vars(args), "rows": rows, **machine})
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
