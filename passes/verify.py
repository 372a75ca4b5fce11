"""verify: translation validation. The original region against the rewritten one, on adversarial routings, values and gradients.

Both are run as they stand in the graph, on random inputs of the shapes and dtypes in the graph. Where the original also runs in
float64, the rewritten region may err at most twice as much as the original does (plus four units in the last place); elsewhere
the two are compared with each other. Uninitialised memory is filled with NaN meanwhile.

Not done yet: exact algebra on small integers, T = 0 and 1 for graphs of static shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import TypeGuard

import torch
from torch import fx

from moec.fx import value

Value = torch.Tensor | int
LARGEST = 1 << 26  # elements of all inputs together, above which "sample" leaves a region out


@dataclass(frozen=True)
class Mismatch:
    """Where the two disagree: the routing, the value, both errors."""

    routing: str
    what: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.what} differs by {self.error:.3g} (allowed {self.allowed:.3g}) for the routing {self.routing}"


def routings(tokens: int, top_k: int, num_experts: int, distinct: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Adversarial ids [tokens, top_k], the most telling first: random, repeats where possible, all on few experts, spread."""
    k = torch.arange(top_k)
    generator = torch.Generator().manual_seed(0)
    yield "random", torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    if not distinct and top_k > 1:
        yield (
            "one expert twice for each token",
            (torch.arange(tokens)[:, None] % num_experts).expand(tokens, top_k).clone(),
        )
    yield "last experts take all", (num_experts - 1 - k).expand(tokens, top_k).clone() % num_experts
    yield "first experts take all", k.expand(tokens, top_k).clone() % num_experts
    yield "round robin", (torch.arange(tokens)[:, None] * top_k + k) % num_experts


Autocast = tuple[tuple[str, torch.dtype], ...]


def verify(
    before: fx.GraphModule,
    after: fx.GraphModule,
    ids: str,
    num_experts: int,
    distinct: bool,
    autocast: Autocast = (),
    routings_at_most: int = 6,
) -> Mismatch | str:
    """A mismatch, or in words what was checked. Both modules take the same inputs by name and return one tensor.

    `ids` names the input that holds the expert ids, `distinct` says that those of one token differ, `autocast` is in force at
    the site.
    """
    holders = [n for n in before.graph.nodes if n.op == "placeholder"]
    vals = {n.name: value(n) for n in holders}
    shapes = {name: tuple(map(_hint, v.shape)) for name, v in vals.items() if isinstance(v, torch.Tensor)}
    if any(not isinstance(v, (torch.Tensor, torch.SymInt, int)) for v in vals.values()):
        return "not verified: an input is neither a tensor nor a size"
    if sum(torch.Size(s).numel() for s in shapes.values()) > LARGEST:
        return "not verified: too large"
    id_shape = shapes[ids]
    top_k = id_shape[-1] if len(id_shape) > 1 else 1
    tokens = torch.Size(id_shape).numel() // top_k
    chosen = list(itertools.islice(routings(tokens, top_k, num_experts, distinct), routings_at_most))
    wide = in_float64(before)
    seen = False
    with _poisoned(), _one_thread(), _no_hooks():
        for name, routing in chosen:
            inputs = _inputs(vals, shapes, ids, routing.reshape(id_shape))
            with _in_force(autocast):
                old = _run(before, inputs)
            seen = seen or tokens == 0 or bool(old["the value"].count_nonzero())
            mismatch = _compare(old, after, wide, inputs, name, autocast)
            if mismatch is not None:
                return mismatch
    if not seen:
        return "not verified: the original is zero for every routing tried"
    return f"values and gradients agree on {len(chosen)} routings"


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 7)


def _inputs(
    vals: dict[str, object], shapes: dict[str, tuple[int, ...]], ids: str, routing: torch.Tensor
) -> dict[str, Value]:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, Value] = {}
    for name, val in vals.items():
        if not isinstance(val, torch.Tensor):
            made[name] = _hint(val)  # type: ignore[arg-type]
        elif name == ids:
            made[name] = routing.to(val.dtype)
        elif val.is_floating_point():
            fan = shapes[name][-1] if len(shapes[name]) > 1 else 1
            made[name] = (torch.randn(shapes[name], generator=generator) / fan**0.5).to(val.dtype)
        else:
            made[name] = torch.zeros(shapes[name], dtype=val.dtype)
    return made


CASTS = ("float", "half", "bfloat16")


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """The same computation with every cast to a floating dtype turned into a cast to float64."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def wide(arg: object) -> object:
        return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg

    for node in gm.graph.nodes:
        made = copies[node] = graph.node_copy(node, lambda n: copies[n])
        made.args, made.kwargs = torch.utils._pytree.tree_map(wide, (made.args, made.kwargs))
        if made.op == "call_method" and made.target in CASTS:
            made.target = "double"
    return fx.GraphModule(gm, graph)


def _is_float(value: Value) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _run(gm: fx.GraphModule, inputs: dict[str, Value]) -> dict[str, torch.Tensor]:
    leaves = {
        n: v.clone().requires_grad_(_is_float(v)) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()
    }
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.enable_grad():
        out = gm.forward(*(leaves[n] for n in names))  # not gm(...), which prints a trace when it fails
        results = {"the value": out.detach()}
        if out.requires_grad:
            generator = torch.Generator().manual_seed(2)
            out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    for name, leaf in leaves.items():
        if _is_float(leaf):
            results[f"the gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


@contextmanager
def _in_force(autocast: Autocast) -> Iterator[None]:
    with ExitStack() as stack:
        for device, low in autocast:
            stack.enter_context(torch.autocast(device, dtype=low))
        yield


def _compare(
    old: dict[str, torch.Tensor],
    after: fx.GraphModule,
    wide: fx.GraphModule,
    inputs: dict[str, Value],
    routing: str,
    autocast: Autocast,
) -> Mismatch | None:
    try:
        with _in_force(autocast):
            new = _run(after, inputs)
    except Exception as fault:  # the original ran on the same inputs
        return Mismatch(
            routing, f"the rewritten region fails ({type(fault).__name__}: {fault}), and so its value", inf, 0.0
        )
    try:
        exact = _run(wide, {n: v.double() if _is_float(v) else v for n, v in inputs.items()})
    except (RuntimeError, TypeError):  # an operation of one dtype only
        exact = None
    for what, got in new.items():
        if got.shape != old[what].shape or got.dtype != old[what].dtype:
            return Mismatch(
                routing,
                f"{what}, {tuple(got.shape)} {got.dtype} for {tuple(old[what].shape)} {old[what].dtype},",
                inf,
                0.0,
            )
        was = old[what].double()
        eps = max(torch.finfo(d).eps for d in (got.dtype, *(low for _, low in autocast)))
        if exact is not None:
            ref = exact[what].double()
            # float64 has no more exact witness: there the two may differ by the order of summation
            ulps = 64 if got.dtype == torch.float64 else 4
            allowed = 2 * (was - ref).norm().item() + ulps * eps * ref.norm().item()
            error = (got.double() - ref).norm().item()
        else:
            allowed = 16 * eps * was.norm().item()
            error = (got.double() - was).norm().item()
        if not error <= allowed:  # NaN is a mismatch
            return Mismatch(routing, what, error, allowed)
    return None


def _no_hooks() -> AbstractContextManager[None]:
    """A model that is compiled inside `torch.utils.checkpoint`: what is checked here is none of its saved tensors."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hundreds of tiny products: waking a second thread for each costs more than it gives, and collapses on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN; the caller's settings come back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
