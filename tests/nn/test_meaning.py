"""Every router x capacity x activation computes what the dense oracle computes, values and gradients, eager and compiled."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from . import oracle

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = ((2, 7), (5, 3), (11,))
BODIES = list(itertools.product(oracle.ACTIVATIONS, (False, True)))


def agree(got: Tensor, want: Tensor, x: Tensor, layer: nn.Module) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(oracle.gradients(got, x, layer), oracle.gradients(want, x, layer), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("activation", "gated"), BODIES)
@pytest.mark.parametrize("router", oracle.ROUTERS)
def test_eager(router: str, activation: str, gated: bool) -> None:
    layer = oracle.build(router, activation=activation, gated=gated, bias=gated, shared_experts=int(gated))
    for shape in SHAPES if activation == "relu" else SHAPES[:1]:
        x = oracle.tokens(*shape).requires_grad_()
        agree(layer(x), oracle.dense(layer, x), x, layer)


class Bodies(nn.ModuleList):
    """Several layers in one graph."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


@pytest.mark.parametrize("router", oracle.ROUTERS)
def test_compiled(router: str) -> None:
    """All activations in one graph, every other one gated."""
    model = Bodies(
        oracle.build(router, activation=activation, gated=bool(i % 2), bias=i == 3, seed=i)
        for i, activation in enumerate(oracle.ACTIVATIONS)
    )
    x = oracle.tokens(2, 7).requires_grad_()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    want = [oracle.dense(layer, x) for layer in model]
    agree(torch.stack(got), torch.stack(want), x, model)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid-groups-score", "expert_choice-position", "expert_choice-all"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (1, 1)], ids=str)
def test_hardly_any_tokens(router: str, shape: tuple[int, ...], backend: str | None) -> None:
    layer = oracle.build(router)
    call = torch.compile(layer, backend=backend, fullgraph=True) if backend else layer
    x = oracle.tokens(*shape).requires_grad_()
    agree(call(x), oracle.dense(layer, x), x, layer)


def test_one_expert_takes_all_and_the_rest_is_dropped() -> None:
    layer = oracle.build("softmax-order", output_norm=False)
    with torch.no_grad():
        layer.router.weight.zero_()[:2] = 1.0
    x = oracle.tokens(9).abs().requires_grad_()
    got = layer(x)
    agree(got, oracle.dense(layer, x), x, layer)
    assert got[:2].any(dim=-1).all(), "the first tokens find room"
    assert not got[2:].any(), "the experts are full: ceil(0.6 * 9 * 2 / 6) = 2 slots each"
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert not grad[2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ["softmax_normalized", "sigmoid-groups-score", "expert_choice-position"])
def test_rounding(router: str, dtype: torch.dtype) -> None:
    """The layer errs at most twice as much as the dense formula in its dtype, both held against float64."""
    layer = oracle.build(router, dtype, activation="silu", gated=True, bias=True)
    _errs_no_more(layer, layer, oracle.dense, oracle.tokens(4, 9, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "moec"])
def test_rounding_compiled(backend: str) -> None:
    names = ("softmax_normalized", "sigmoid-groups-score", "expert_choice-position")
    model = Bodies(oracle.build(name, torch.bfloat16, activation="silu", gated=True, bias=True) for name in names)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = oracle.tokens(4, 9, dtype=torch.bfloat16)
    _errs_no_more(lambda x: torch.stack(compiled(x)), model, lambda model, x: torch.stack(model(x)), x)


def _errs_no_more(
    call: Callable[[Tensor], Tensor], layer: nn.Module, plain: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> None:
    exact, eps = copy.deepcopy(layer).double(), torch.finfo(x.dtype).eps
    runs = []
    for module, run in ((layer, call), (layer, lambda x: plain(layer, x)), (exact, lambda x: _dense(exact, x))):
        x_run = (x.double() if module is exact else x).clone().requires_grad_()
        out = run(x_run)
        runs.append({"out": out.detach(), **oracle.gradients(out, x_run, module)})
    for (name, got), plain_value, ref in zip(runs[0].items(), runs[1].values(), runs[2].values()):
        error, allowed = (got.double() - ref).norm(), (plain_value.double() - ref).norm()
        assert error <= 2 * allowed + 4 * eps * ref.norm(), f"{name}: {error:.2e} against {allowed:.2e}"


def _dense(module: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([_dense(m, x) for m in module]) if isinstance(module, Bodies) else oracle.dense(module, x)
