"""`moec::experts` against a dense float64 oracle, values and gradients; eager's own error is the measure elsewhere.

Shape letters: T tokens, K top-k, S = T*K slots, E experts, D model width, F expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import moec.kernels  # noqa: F401  (defines the ops)
from moec.ops.experts import ACTIVATIONS, GATINGS

from .test_ops import ROUTINGS, ids_of

ops = torch.ops.moec

D, WIDTH = 33, 17  # odd on purpose

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda t: t * torch.sigmoid(t),
    "gelu": lambda t: 0.5 * t * (1 + torch.erf(t / 2**0.5)),
    "gelu_tanh": lambda t: 0.5 * t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
    "relu": lambda t: t.clamp(min=0),
    "relu2": lambda t: t.clamp(min=0) ** 2,
}


@dataclass
class Case:
    """Leaves by name: x [T, D], scale [T, K], gate [E, F, D], up [E, F or 2F, D], down [E, D, F], biases [E, ...]."""

    leaves: dict[str, Tensor]
    activation: str
    gating: str
    ids: Tensor
    num_experts: int

    @staticmethod
    def random(
        name: str,
        activation: str = "silu",
        gating: str = "halves",
        bias: bool = False,
        scaled: bool = True,
        seed: int = 0,
    ) -> Case:
        ids, num_experts = ids_of(name)
        g = torch.Generator().manual_seed(seed)
        wide = 2 * WIDTH if gating in ("halves", "interleaved") else WIDTH
        shapes: dict[str, tuple[int, ...]] = {"x": (ids.shape[0], D)}
        if scaled:
            shapes["scale"] = tuple(ids.shape)
        if gating == "separate":
            shapes["gate"] = (num_experts, WIDTH, D)
        shapes |= {"up": (num_experts, wide, D), "down": (num_experts, D, WIDTH)}
        if bias:
            shapes |= {f"{n}_bias": shapes[n][:2] for n in ("gate", "up", "down") if n in shapes}
        leaves = {
            n: torch.randn(s, generator=g, dtype=torch.float64)
            .div_(s[-1] ** 0.5 if len(s) == 3 else 1)
            .requires_grad_()
            for n, s in shapes.items()
        }
        return Case(leaves, activation, gating, ids, num_experts)

    def to(self, dtype: torch.dtype) -> Case:
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.leaves.items()}
        return Case(leaves, self.activation, self.gating, self.ids, self.num_experts)


def dense(case: Case) -> Tensor:
    """[T, D]: every expert on every token, then masked. Shares nothing with the ops."""
    p = case.leaves
    act, out = ACT[case.activation], torch.zeros_like(p["x"])
    for e in range(case.num_experts):

        def linear(t: Tensor, name: str, e: int = e) -> Tensor:
            y = t @ p[name][e].T
            return y + p[f"{name}_bias"][e] if f"{name}_bias" in p else y

        up = linear(p["x"], "up")
        if case.gating == "none":
            h = act(up)
        elif case.gating == "separate":
            h = act(linear(p["x"], "gate")) * up
        elif case.gating == "interleaved":
            h = act(up[:, 0::2]) * up[:, 1::2]
        else:
            h = act(up[:, :WIDTH]) * up[:, WIDTH:]
        chosen = (case.ids == e).to(out.dtype)
        out = out + linear(h, "down") * (chosen * p["scale"] if "scale" in p else chosen).sum(-1, keepdim=True)
    return out


def fused(case: Case, *, stacked: bool = True, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
    p = case.leaves

    def parameter(name: str) -> list[Tensor]:
        if name not in p:
            return []
        t = p[name].mT if transposed[name == "down"] and not name.endswith("bias") else p[name]
        return [t] if stacked else list(t.unbind())

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    routing = ops.route(case.ids, case.num_experts)
    scale = p["scale"].reshape(-1) if "scale" in p else None
    kind = (case.ids.shape[1], case.activation, case.gating, *transposed)
    out: Tensor = ops.experts(p["x"], *routing, scale, *map(parameter, names), *kind, p["x"].dtype)
    return out


def grads(out: Tensor, case: Case, names: list[str] | None = None) -> dict[str, Tensor]:
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    names = names or list(case.leaves)
    return dict(zip(names, torch.autograd.grad(out, [case.leaves[n] for n in names], g)))


def agree(case: Case, got: Tensor) -> None:
    expected = dense(case)
    torch.testing.assert_close(got, expected)
    for (name, g), e in zip(grads(got, case).items(), grads(expected, case).values()):
        torch.testing.assert_close(g, e, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("gating", GATINGS)
def test_routings(name: str, gating: str) -> None:
    case = Case.random(name, gating=gating, bias=True)
    agree(case, fused(case))


@pytest.mark.parametrize(
    ("gating", "bias", "scaled", "stacked", "transposed"),
    itertools.product(
        GATINGS, (False, True), (False, True), (False, True), ((False, False), (True, True), (False, True))
    ),
)
def test_layouts(gating: str, bias: bool, scaled: bool, stacked: bool, transposed: tuple[bool, bool]) -> None:
    case = Case.random("sentinels", gating=gating, bias=bias, scaled=scaled)
    agree(case, fused(case, stacked=stacked, transposed=transposed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gating", ["none", "halves"])
def test_activations(activation: str, gating: str) -> None:
    case = Case.random("even", activation, gating)
    agree(case, fused(case))


@pytest.mark.parametrize(
    "wanted", [["x"], ["scale"], ["up"], ["down", "scale"], ["x", "down_bias"], ["gate_bias", "gate"]]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_only_some_gradients(wanted: list[str], stacked: bool) -> None:
    case = Case.random("sentinels", gating="separate", bias=True)
    for name, t in case.leaves.items():
        t.requires_grad_(name in wanted)
    got, expected = grads(fused(case, stacked=stacked), case, wanted), grads(dense(case), case, wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["even", "one takes all", "sentinels"])
@pytest.mark.parametrize("gating", ["none", "halves", "separate"])
def test_error_is_no_larger_than_that_of_eager(name: str, dtype: torch.dtype, gating: str) -> None:
    case = Case.random(name, gating=gating, bias=True)
    case.ids = case.ids.repeat(6, 1)
    for n in ("x", "scale"):
        case.leaves[n] = case.leaves[n].detach().repeat(6, 1).requires_grad_()
    case = case.to(dtype)
    truth_case = case.to(torch.float64)
    truth = dense(truth_case)
    ours, theirs = fused(case), dense(case)
    results = [{"out": o.detach(), **grads(o, c)} for o, c in ((ours, case), (theirs, case), (truth, truth_case))]
    for key in results[0]:
        ours_t, theirs_t, truth_t = (r[key].double() for r in results)
        bound = 2 * (theirs_t - truth_t).norm() + 4 * torch.finfo(dtype).eps * truth_t.norm()
        assert (ours_t - truth_t).norm() <= bound, key
        assert results[0][key].dtype == dtype


def test_a_backward_after_a_forward_that_kept_nothing() -> None:
    """`keep` is a matter of memory, not of meaning."""
    case = Case.random("sentinels", bias=True)
    p = case.leaves
    args = (*ops.route(case.ids, case.num_experts), p["scale"].reshape(-1), [], [p["up"]], [p["down"]], [])
    args = (*args, [p["up_bias"]], [p["down_bias"]], case.ids.shape[1], "silu", "halves", False, False, torch.float64)
    out, pre = ops.experts_forward(p["x"], *args, False)
    assert pre.numel() == 0
    agree(case, out)


def test_nothing_is_kept_without_gradients() -> None:
    case = Case.random("even")
    for t in case.leaves.values():
        t.requires_grad_(False)
    assert fused(case).grad_fn is None


def test_second_derivatives_raise() -> None:
    case = Case.random("even")
    (gx,) = torch.autograd.grad(fused(case).sum(), case.leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gx.sum().backward()


def test_fakes_and_schemas() -> None:
    for gating, stacked in itertools.product(("none", "separate"), (False, True)):
        case = Case.random("sentinels", gating=gating, bias=True)
        torch.library.opcheck(
            ops.experts_forward,
            (
                case.leaves["x"],
                *ops.route(case.ids, case.num_experts),
                case.leaves["scale"].detach().reshape(-1).requires_grad_(),
                *[
                    []
                    if n not in case.leaves
                    else [case.leaves[n]]
                    if stacked
                    else [t.detach().clone().requires_grad_() for t in case.leaves[n]]
                    for n in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
                ],
                case.ids.shape[1],
                "silu",
                gating,
                False,
                False,
                torch.float64,
                True,
            ),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"gating": "half"}, "gating 'half'"),
        ({"gating": "separate"}, "0 gate weights"),
    ],
)
def test_errors(change: dict[str, str], message: str) -> None:
    case = Case.random("even")
    for key, v in change.items():
        setattr(case, key, v)
    with pytest.raises(ValueError, match=message):
        fused(case)
