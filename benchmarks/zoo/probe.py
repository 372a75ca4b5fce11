"""One family, in a process of its own: `python -m benchmarks.zoo.probe mixtral out.json`.

Every implementation is built from the same weights and compiled twice: by plain Dynamo (whose breaks say what the family's own
code allows) and by moec, forward and backward. Output and gradients are measured against eager in float64, as tests/hf.py has it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from moec.backend import Backend, fingerprint
from moec.pipeline import Result
from tests import hf

from . import build

TIES = 1e-3  # an eager float32 run further than this from float64 has chosen other experts: draw other inputs

# classes of which a break is the dispatch's, not the rest of the family's
MOE_CLASS = re.compile(r"(Router|Gating|Experts|Expert|MoE|MoA|Moe|SparseMoeBlock|SparseMLP|MoELayer|MoeBlock|FFN)$")


@dataclass(frozen=True)
class Break:
    """`where` is "file:line" of the user's code; `dispatch` says whether that lies in an MoE class."""

    where: str
    reason: str
    dispatch: bool


@dataclass
class Probe:
    """One implementation of one family. `layers`: MoE layers of the model; `rewritten`: those that ran rewritten."""

    implementation: str
    layers: int
    error: str = ""
    graphs: int = 0
    breaks: list[Break] = field(default_factory=list)
    rewritten: int = 0
    idioms: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)  # ("file:line", reason)
    warnings: list[str] = field(default_factory=list)
    worst: dict[str, object] | None = None
    inner: str = ""
    control: float | None = (
        None  # where ours failed or is past the bound: plain aot_eager's ratio, infinite where that fails too
    )
    output_error: float = 0.0  # ||eager - ref|| / ||ref|| of the output
    seconds: float = 0.0


class Counting(Backend):
    """moec's backend; counts how often its graphs run, and how many rewritten sites they hold."""

    def __init__(self, inner: str) -> None:
        self.results: list[Result] = []
        self.graphs = self.rewritten = 0
        super().__init__({"moec.inner": inner}, self.results)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[object], **kwargs: object) -> Callable[..., object]:
        compiled = super().__call__(gm, example_inputs, **kwargs)
        sites = sum(s.status == "rewritten" for s in self.results[-1].sites)

        def run(*args: object) -> object:
            self.graphs += 1
            self.rewritten += sites
            return compiled(*args)

        return run


def probe(name: str) -> dict[str, object]:
    eager, inputs, ref, error = baseline(name)
    layers = dispatched(name, inputs)
    implementations = ("eager", "grouped_mm") if build.decorated(name) else ("eager",)
    probes: list[Probe] = []
    for implementation in implementations:
        inners = ("eager",) if probes and probes[0].inner == "eager" else ("aot_eager", "eager")
        probes.append(compiled(name, implementation, layers, inners, inputs, eager, ref, error))
    graphs, breaks = plain(name, implementations[-1], inputs)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "moec": fingerprint()[:8],
        "model": build.model_class(name).__name__,
        "probes": [asdict(p) for p in probes],
        "plain": {"implementation": implementations[-1], "graphs": graphs, "breaks": [asdict(b) for b in breaks]},
    }


def baseline(name: str) -> tuple[hf.Run, dict[str, Tensor], hf.Run, float]:
    """Eager, the inputs, float64, and how far they are apart: on inputs where both choose the same experts."""
    model = build.model(name)
    for seed in range(1, 6):
        inputs = build.example_inputs(name, model, seed)
        eager, again, ref = run(model, inputs), run(model, inputs), reference(model, inputs)
        if not torch.equal(eager.logits, again.logits):
            raise RuntimeError("two eager runs differ: the model draws random numbers or keeps state")
        error = float((eager.logits.double() - ref.logits).norm() / ref.logits.norm())
        if error < TIES:
            return eager, inputs, ref, error
    raise RuntimeError(f"eager float32 is {error:.2g} from float64 on all inputs")


def dispatched(name: str, inputs: dict[str, Tensor]) -> int:
    """How many MoE layers run in one forward."""
    model, ran = build.model(name), set()
    for key, module in build.dispatchers(name, model).items():
        module.register_forward_hook(lambda *_, key=key: ran.add(key))
    model(**inputs)
    return len(ran)


def compiled(
    name: str,
    implementation: str,
    layers: int,
    inners: tuple[str, ...],
    inputs: dict[str, Tensor],
    eager: hf.Run,
    ref: hf.Run,
    error: float,
) -> Probe:
    """With the first of `inners` inside; the next where plain torch.compile cannot run the family with the first either."""
    model = build.model(name, implementation)
    found = Probe(implementation, layers, output_error=error)
    start = time.perf_counter()
    for found.inner in inners:
        found.error, found.control = "", None
        try:
            worst = _measured(model, found, inputs, eager, ref)
            found.worst = asdict(worst)
        except Exception as fault:
            found.error = f"{type(fault).__name__}: {fault}"[:2000]
            traceback.print_exc()
        if found.error or worst.ratio > 1:
            found.control = _control(found.inner, model, inputs, eager, ref)
        if not (found.error and found.control == float("inf")):
            break
    found.seconds = round(time.perf_counter() - start, 1)
    return found


def _control(inner: str, model: nn.Module, inputs: dict[str, Tensor], eager: hf.Run, ref: hf.Run) -> float:
    torch._dynamo.reset()
    try:
        got = run(model, inputs, torch.compile(model, backend=inner))
    except Exception:
        traceback.print_exc()
        return float("inf")
    return hf.measure(got, eager, ref, torch.finfo(torch.float32).eps).ratio


def plain(name: str, implementation: str, inputs: dict[str, Tensor]) -> tuple[int, list[Break]]:
    """Graphs that plain Dynamo runs in one forward, and its breaks."""
    ran = []

    def count(gm: fx.GraphModule, _inputs: list[object]) -> Callable[..., object]:
        def run_graph(*args: object) -> object:
            ran.append(gm)
            return gm(*args)

        return run_graph

    model = build.model(name, implementation)
    with break_log(model) as breaks:
        torch.compile(model, backend=count)(**inputs)
    return len(ran), breaks


def _measured(model: nn.Module, found: Probe, inputs: dict[str, Tensor], eager: hf.Run, ref: hf.Run) -> hf.Worst:
    backend = Counting(found.inner)
    torch._dynamo.reset()
    try:
        with break_log(model) as found.breaks, warnings_of("moec") as found.warnings:
            got = run(model, inputs, torch.compile(model, backend=backend))
    finally:
        torch._dynamo.reset()
        sites = [s for r in backend.results for s in r.sites]
        found.graphs, found.rewritten = backend.graphs, backend.rewritten
        found.idioms = sorted({s.idiom for s in sites if s.status == "rewritten"})
        found.refusals = list(dict.fromkeys((s.location, str(s.reason)) for s in sites if s.status == "refused"))
    return hf.measure(got, eager, ref, torch.finfo(torch.float32).eps)


def run(model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., object] | None = None) -> hf.Run:
    """Output and gradients; the loss is a fixed weighting of the output."""
    model.zero_grad(set_to_none=True)
    out = output((model if call is None else call)(**inputs))
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    out.backward(weights)
    grads = {key: None if p.grad is None else p.grad.detach().clone() for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return hf.Run(out.detach().clone(), grads)


def output(found: object) -> Tensor:
    """Logits, or whatever comes first."""
    while not isinstance(found, Tensor):
        found = getattr(found, "logits", None) if getattr(found, "logits", None) is not None else found[0]
    return found


def reference(model: nn.Module, inputs: dict[str, Tensor]) -> hf.Run:
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if vars(module).get("dtype") is torch.float32:  # the routers of nllb_moe and switch_transformers cast to it
            module.dtype = torch.float64
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with hf._Widen():
        return run(exact, wide)


@contextlib.contextmanager
def break_log(model: nn.Module) -> Iterator[list[Break]]:
    """The graph breaks within, in the order they came; one that Dynamo met twice is told once."""
    messages: list[str] = []
    breaks: list[Break] = []
    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    torch._logging.set_logs(graph_breaks=True)
    try:
        with _handler(logger, messages):
            yield breaks
    finally:
        torch._logging.set_logs()
    ours = moe_lines(model)
    for message in messages:
        place = re.search(r"in user code at (\S+):(\d+)", message)
        reason = re.search(
            r"Graph Break Reason: (.*?)(?:\n\s*Explanation|\n\s*Hint|\nUser code|\nDeveloper|$)", message, re.S
        )
        path, line = (place[1], int(place[2])) if place else ("?", 0)
        dispatch = any(path == p and line in lines for p, lines in ours)
        found = Break(f"{short(path)}:{line}", " ".join((reason[1] if reason else message).split())[:300], dispatch)
        if found not in breaks:
            breaks.append(found)


def moe_lines(model: nn.Module) -> list[tuple[str, range]]:
    """Where the classes are written that route or dispatch."""
    found = []
    for cls in {type(m) for m in model.modules() if MOE_CLASS.search(type(m).__name__)}:
        lines, first = inspect.getsourcelines(cls)
        found.append((inspect.getsourcefile(cls), range(first, first + len(lines))))
    from transformers.integrations import moe

    found.append((moe.__file__, range(1, 10**6)))
    return found


def short(path: str) -> str:
    return re.sub(r"^.*/(?=transformers/|torch/)", "", path).removeprefix("transformers/models/")


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    found: list[str] = []
    with _handler(logging.getLogger(name), found, logging.WARNING):
        yield found


@contextlib.contextmanager
def _handler(logger: logging.Logger, messages: list[str], level: int = logging.DEBUG) -> Iterator[None]:
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(name: str, path: str) -> None:
    try:
        record = probe(name)
    except Exception as fault:
        record = {"error": f"{type(fault).__name__}: {fault}"[:2000]}
        traceback.print_exc()
    Path(path).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
