"""What a sceptic found in `moec::experts` and its CPU kernels, one test for each cause. All of it was silently wrong, or a crash.

Shape letters: T tokens, K top-k, E experts, D model width, F expert width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moec.kernels  # noqa: F401  (defines the ops)

from .test_experts_op import Case, dense, fused, grads

ops = torch.ops.moec

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


def close_to_float64(case: Case, got: Tensor) -> None:
    """By the measure of eager's own error; `case` is in float32, which the kernels in C++ take."""
    truth_case = case.to(torch.float64)
    theirs, truth = dense(case), dense(truth_case)
    results = [{"out": o.detach(), **grads(o, c)} for o, c in ((got, case), (theirs, case), (truth, truth_case))]
    for key in results[0]:
        ours_t, theirs_t, truth_t = (r[key].double() for r in results)
        bound = 2 * (theirs_t - truth_t).norm() + 4 * torch.finfo(torch.float32).eps * truth_t.norm()
        assert (ours_t - truth_t).norm() <= bound, key


@pytest.mark.parametrize("side", ["gate", "up"])
def test_a_bias_on_one_side_only(side: str) -> None:
    case = Case.random("sentinels", gating="separate", bias=True).to(torch.float32)
    del case.leaves[f"{side}_bias"]
    close_to_float64(case, fused(case))


@pytest.mark.parametrize("which", ["up_bias", "down_bias"])
@pytest.mark.parametrize("how", ["transposed", "every second", "expanded"])
def test_biases_lie_anywhere(which: str, how: str) -> None:
    case = Case.random("sentinels", bias=True).to(torch.float32)
    bias = case.leaves[which].detach()
    if how == "transposed":
        other = bias.t().contiguous().t()
    elif how == "every second":
        other = bias.repeat_interleave(2, dim=1)[:, ::2]
    else:
        other = bias[:, :1].expand_as(bias)
    case.leaves[which] = other.requires_grad_()
    assert not other.is_contiguous()
    close_to_float64(case, fused(case))


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)])
def test_weights_without_memory_of_their_own(dims: tuple[int, ...]) -> None:
    case = Case.random("sentinels").to(torch.float32)
    weight = case.leaves["up"].detach()
    for dim in dims:
        weight = weight.narrow(dim, 0, 1).expand_as(case.leaves["up"])
    case.leaves["up"] = weight.requires_grad_()
    close_to_float64(case, fused(case))


def test_gate_and_up_that_lie_differently() -> None:
    case = Case.random("sentinels", gating="separate").to(torch.float32)
    case.leaves["gate"] = case.leaves["gate"].detach().mT.contiguous().mT.requires_grad_()
    close_to_float64(case, fused(case))


@pytest.mark.parametrize("width", [8, 64])
def test_results_of_another_width(width: int) -> None:
    case = Case.random("sentinels", scaled=False).to(torch.float32)
    wide = torch.randn(
        case.num_experts, width, case.leaves["down"].shape[2], generator=torch.Generator().manual_seed(0)
    )
    case.leaves["down"] = wide.requires_grad_()
    got = fused(case)
    assert got.shape == (case.ids.shape[0], width)
    x, up = case.leaves["x"], case.leaves["up"]
    gate, value = torch.einsum("td,efd->etf", x, up).chunk(2, dim=-1)
    y = torch.einsum("etf,edf->etd", F.silu(gate) * value, wide)
    chosen = torch.stack([(case.ids == e).sum(-1) for e in range(case.num_experts)]).float()
    torch.testing.assert_close(got, torch.einsum("et,etd->td", chosen, y), rtol=1e-4, atol=1e-4)


def test_long_sums() -> None:
    """Thousands of rows, and thousands of columns, added in float32: no worse than eager, which adds in parts."""
    for sizes in ((6000, 16, 16), (3, 9000, 16), (3, 16, 9000)):
        tokens, d_model, d_expert = sizes
        g = torch.Generator().manual_seed(0)
        leaves = {
            "x": torch.rand(tokens, d_model, generator=g),
            "up": torch.rand(2, d_expert, d_model, generator=g),
            "down": torch.rand(2, d_model, d_expert, generator=g),
        }
        ids = torch.randint(0, 2, (tokens, 1), generator=g)
        case = Case({n: t.requires_grad_() for n, t in leaves.items()}, "relu", "none", ids, 2)
        close_to_float64(case, fused(case))


def test_relu_of_what_is_not_finite() -> None:
    """No gradient passes where relu is flat, not even infinity; where the pre-activation is NaN, all of it does."""
    ids = torch.tensor([[0], [1], [0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [float("nan"), 0.0]])
    weights = {"up": torch.eye(2).repeat(2, 1, 1), "down": torch.eye(2).repeat(2, 1, 1)}
    leaves = {n: t.clone().requires_grad_() for n, t in {"x": x, **weights}.items()}
    case = Case(leaves, "relu", "none", ids, 2)
    h = [torch.zeros(0)] * 3
    for i, e in enumerate(ids[:, 0].tolist()):
        h[i] = F.linear(F.relu(F.linear(x[i], weights["up"][e])), weights["down"][e])
    got = fused(case)
    torch.testing.assert_close(got, torch.stack(h), equal_nan=True)
    grad = torch.full_like(got, float("inf"))
    (got_x,) = torch.autograd.grad(got, leaves["x"], grad)
    pre = [F.linear(x[i], weights["up"][e]) for i, e in enumerate(ids[:, 0].tolist())]
    grad_h = [F.linear(grad[i], weights["down"][e].t()) for i, e in enumerate(ids[:, 0].tolist())]
    expected = [
        torch.ops.aten.threshold_backward(g, p, 0) @ weights["up"][e]
        for g, p, e in zip(grad_h, pre, ids[:, 0].tolist())
    ]
    torch.testing.assert_close(got_x, torch.stack(expected), equal_nan=True)


def test_somebody_elses_silu() -> None:
    """An operator of another library by the name of torch's is not torch's, called by its packet or by its overload."""
    library = torch.library.Library("moec_test_attacks", "FRAGMENT")
    library.define("silu(Tensor x) -> Tensor")
    library.impl("silu", lambda x: 2 * x, "CompositeExplicitAutograd")
    for op in (torch.ops.moec_test_attacks.silu, torch.ops.moec_test_attacks.silu.default):
        up, down = torch.randn(4, 8, 6), torch.randn(4, 6, 8)

        def layer(x: Tensor, ids: Tensor, op: object = op, up: Tensor = up, down: Tensor = down) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(4):
                token, _ = torch.where(ids == e)
                out.index_add_(0, token, F.linear(op(F.linear(x[token], up[e])), down[e]))  # type: ignore[operator]
            return out

        x, ids = torch.randn(5, 6), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]])
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="moec", options={"moec.inner": "eager", "moec.verify": "off"})
        torch.testing.assert_close(compiled(x, ids), layer(x, ids))
