"""make demo: a Hugging Face MoE decoder, its expert loop unedited, under torch.compile(backend="moec").

Random weights, real classes, a size that takes seconds. Shows what was found and done, how far logits and gradients are from
float64 beside eager's own distance, and the time beside eager, Inductor on the loop, and transformers' grouped path.

    python examples/demo.py --model mixtral --tokens 512
    python examples/demo.py --backend inductor      # everything but moec
"""

import argparse
import copy
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

START = time.perf_counter()
COMMON = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
MODELS = {
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {
            "moe_intermediate_size": 128,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "norm_topk_prob": True,
        },
    ),
}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def build(name: str) -> nn.Module:
    config_class, model_class, own = MODELS[name]
    torch.manual_seed(0)
    model = model_class._from_config(
        config_class(**COMMON, **own), attn_implementation="sdpa", experts_implementation="eager"
    )
    with torch.no_grad():
        for p in model.parameters():  # the library's initial weights are so small that the experts hardly matter
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


def with_implementation(model: nn.Module, implementation: str) -> nn.Module:
    other = copy.deepcopy(model)
    other.config._experts_implementation = implementation
    return other


@contextmanager
def quiet() -> Iterator[None]:
    """Without the pages that torch prints about graph breaks of the candidates that are not ours; they are counted instead."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def loss_of(call: Callable[..., object], ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = call(input_ids=ids).logits
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def forward(model: nn.Module, call: Callable[..., object], ids: Tensor) -> None:
    with torch.no_grad():
        call(input_ids=ids)


def training_step(model: nn.Module, call: Callable[..., object], ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss_of(call, ids)[1].backward()


def values(model: nn.Module, call: Callable[..., object], ids: Tensor) -> dict[str, Tensor]:
    """Logits and every gradient; an expert that eager skipped has none, which counts as zeros."""
    model.zero_grad(set_to_none=True)
    logits, loss = loss_of(call, ids)
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **grads}


def print_errors(got: dict[str, Tensor], eager: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """||. - ref|| / ||ref|| of the logits, of all gradients together, and of the gradient that is worst beside eager's."""

    def error(a: dict[str, Tensor], keys: list[str]) -> float:
        off = torch.stack([(a[k].double() - ref[k]).norm() for k in keys]).norm()
        return float(off / torch.stack([ref[k].norm() for k in keys]).norm())

    gradients = [k for k in ref if k != "logits" and bool(ref[k].any())]
    worst = max(gradients, key=lambda k: error(got, [k]) / (error(eager, [k]) + 1e-12))
    print(f"\n  {'relative error against float64':<56}{'compiled':>10}{'eager':>10}")
    for label, keys in (("logits", ["logits"]), ("all gradients", gradients), (worst, [worst])):
        print(f"  {label:<56}{error(got, keys):>10.1e}{error(eager, keys):>10.1e}")
    print(flush=True)


def measure(
    candidates: dict[str, tuple[nn.Module, Callable[..., object]]],
    step: Callable[[nn.Module, Callable[..., object], Tensor], None],
    ids: Tensor,
    repeats: int,
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Seconds of the first call, median seconds of the later ones, and reasons for those that fail.

    One repeat runs every candidate once, so that whatever else the machine does is spread over all of them.
    """
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, (model, call) in candidates.items():
        torch._dynamo.utils.counters.clear()
        began = time.perf_counter()
        try:
            with quiet() if name != "moec" else nullcontext():
                for _ in range(3):
                    step(model, call, ids)
                    first.setdefault(name, time.perf_counter() - began)
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            note = f"first call {first[name]:.1f} s" + (f", {breaks} graph breaks" if breaks else "")
        except Exception as error:  # a candidate that cannot do this is a finding, not the end of the demo
            note = failed[name] = f"fails, {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
        say(f"    {name}: {note}")
    times: dict[str, list[float]] = {name: [] for name in candidates if name not in failed}
    began_all = time.perf_counter()
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - began_all > 15:  # a slow or busy machine
            break
        for name in times:
            began = time.perf_counter()
            step(*candidates[name], ids)
            times[name].append(time.perf_counter() - began)
    return first, {name: statistics.median(t) for name, t in times.items()}, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_moe")
    parser.add_argument("--backend", default="moec", help="moec, or another backend to see the rest of the demo")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    # For Inductor on the loop: without this it gives up on frames after eight recompilations and runs them in eager.
    torch._dynamo.config.recompile_limit = 64
    threads = torch.get_num_threads()
    model = build(args.model)
    ids = torch.randint(COMMON["vocab_size"], (1, args.tokens))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"{type(model).__name__}, {count:.1f} M parameters, float32, {args.tokens} tokens, {threads} CPU threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )

    if args.backend == "moec":
        import moec

        say("moec.explain(model, input_ids=...)")
        print(f"\n{moec.explain(model, input_ids=ids)}\n", flush=True)
        torch._dynamo.reset()

    say(f'torch.compile(model, backend="{args.backend}"): forward and backward')
    compiled = torch.compile(model, backend=args.backend)
    got = values(model, compiled, ids)
    say("the same in eager, and in eager with float64")
    exact = copy.deepcopy(model).double()
    print_errors(got, values(model, model, ids), values(exact, exact, ids))

    loop, grouped = copy.deepcopy(model), with_implementation(model, "grouped_mm")
    candidates: dict[str, tuple[nn.Module, Callable[..., object]]] = {
        args.backend: (model, compiled),
        "eager": (model, model),
        "inductor on the loop": (loop, torch.compile(loop)),
        "transformers grouped_mm, inductor": (grouped, torch.compile(grouped)),
    }
    results = {}
    for title, step in (("forward", forward), ("training step", training_step)):
        say(f"{title}: compiling and warming up")
        results[title] = measure(candidates, step, ids, args.repeats)
    print(f"\n  {'median, runs interleaved':<38}" + "".join(f"{title:>26}" for title in results))
    for name in candidates:
        cells = []
        for _, medians, _ in results.values():
            own = medians.get(args.backend)
            if name not in medians:
                cells.append("fails, see above")
            else:
                ratio = f"  {medians[name] / own:5.2f}x" if own else ""
                cells.append(f"{medians[name] * 1e3:8.1f} ms{ratio}")
        print(f"  {name:<38}" + "".join(f"{cell:>26}" for cell in cells))
    print(flush=True)
    say("done")
    if any(args.backend in failed for _, _, failed in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
