"""The reference layers of moec.models: build one, run it compiled, and measure the run against float64.

    layer = layers.build("one_hot", body="gelu", dtype=torch.bfloat16)
    x = layers.tokens(17, torch.bfloat16)
    got = layers.run(torch.compile(layer, backend="moec"), layer, x)
    worst = layers.judge(got, layer, x)          # hf.measure: at most one when all is well
    assert worst.ratio <= 1, worst

E, K, D, F: experts, top-k, model width, expert width. All widths are multiples of 8: torch's grouped GEMM wants that of bfloat16.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from moec.backend import Backend
from moec.models import BODIES, IDIOMS, STACKED_BODIES
from moec.pipeline import Result

from . import hf

E, K, D, F = 8, 2, 16, 24
STACKED = ("hit_stacked", "grouped_mm", "batched_mm", "dense_stacked")
SKIPS = ("skip_empty", "hit_stacked", "hit_modules", "sort_tolist")  # an expert without tokens has no gradient in eager
AOT = {"moec.inner": "aot_eager"}


def bodies(idiom: str) -> tuple[str, ...]:
    return STACKED_BODIES if idiom in STACKED else tuple(BODIES)


def build(idiom: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> nn.Module:
    """`changes` are arguments of the layer: num_experts, top_k, router, body, shared, d_model, d_expert."""
    torch.manual_seed(seed)
    sizes = {"d_model": D, "d_expert": F, "num_experts": E, "top_k": K}
    return IDIOMS[idiom](**{**sizes, **changes}).to(dtype)


def tokens(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """x [count, D]. The first feature is one, so that its column of the router's weight is a bias: see `prefer`."""
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] = 1
    return x.to(dtype)


@torch.no_grad()
def prefer(layer: nn.Module, experts: tuple[int, ...], strength: float = 40.0) -> nn.Module:
    """The router chooses among `experts`, whatever the token (of `tokens`) says otherwise."""
    weight = layer.router.weight if hasattr(layer.router, "weight") else layer.router.proj.weight
    weight[:, 0] = -strength
    weight[list(experts), 0] = strength
    return layer


def run(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> hf.Run:
    """Value, gradient of x and of every parameter by name, None where there is none."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out = call(x)
    if out.requires_grad:  # not so where an eager loop skipped every expert
        probe = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
        out.backward(probe)
    grads = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    layer.zero_grad(set_to_none=True)
    return hf.Run(out.detach(), grads)


def judge(
    got: hf.Run,
    layer: nn.Module,
    x: Tensor,
    around: AbstractContextManager[object] | None = None,
    eps: float | None = None,
) -> hf.Worst:
    """`got` and eager, both against eager in float64 with the choices of the eager run, which happens inside `around`."""
    with _recorded(layer) as choices, around or nullcontext():
        eager = run(layer, layer, x)
    exact = copy.deepcopy(layer).double()
    with _Replay(choices[0]):
        ref = run(exact, exact, x.double())
    # In float64 eager is its own reference, with an error of zero; another kernel's order of summation is as right as eager's,
    # and its distance is that of two rounding errors of a sum of some tens of terms, not of one.
    unit = torch.finfo(got.logits.dtype).eps * (4 if got.logits.dtype == torch.float64 else 1)
    return hf.measure(got, eager, ref, eps or unit)


@contextmanager
def _recorded(layer: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handle = layer.router.register_forward_hook(lambda module, args, output: found.append(output[0].detach()))
    try:
        yield found
    finally:
        handle.remove()


class _Replay(TorchFunctionMode):
    """The router's last `topk`, the one of K among E, returns these ids and the scores found there."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.topk, Tensor.topk) and args[0].shape[-1] == E and args[1] == self.ids.shape[-1]:
            return torch.return_types.topk((args[0].gather(-1, self.ids), self.ids))
        return func(*args, **(kwargs or {}))


def kept(options: dict[str, object] | None = None) -> tuple[Backend, list[Result]]:
    """A backend as `backend="moec"`, and a list that gets the rewritten graph and the sites of each compilation."""
    results: list[Result] = []
    return Backend({**AOT, **(options or {})}, results), results


def statuses(results: list[Result]) -> list[str]:
    return [site.status if site.reason is None else f"refused: {site.reason}" for r in results for site in r.sites]


def value(node: fx.Node) -> object:
    return node.meta.get("example_value", node.meta.get("val"))


def all_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and of those that it calls."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes
