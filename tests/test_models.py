"""Every reference layer computes the same thing, however it dispatches.

The oracle runs each expert on every token and keeps what the routing asked for. It shares the router and the parameters
with the layer, and nothing else: bodies of stacked experts are written out again.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.models import BODIES, IDIOMS, ROUTERS, STACKED_BODIES, Decoder
from moec.models.experts import StackedExperts

D, WIDTH, E, K = 16, 24, 6, 2


def bodies(idiom: str) -> tuple[str, ...]:
    return STACKED_BODIES if idiom in ("hit_stacked", "grouped_mm", "batched_mm", "dense_stacked") else tuple(BODIES)


CASES = [
    pytest.param(idiom, router, body, shared, id=f"{idiom}-{router}-{body}{'-shared' if shared else ''}")
    for idiom in IDIOMS
    for router, body in itertools.product(ROUTERS, bodies(idiom))
    for shared in (False, True)
    if router == "softmax" or body == "swiglu"
]


def stacked_expert(p: StackedExperts, e: int, x: Tensor) -> Tensor:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.einsum("ti,io->to" if p.is_transposed else "ti,oi->to", x, weight[e])
        return out if bias is None else out + bias[e]

    h = linear(x, p.up_proj, p.up_bias)
    width = h.shape[-1] // 2
    if p.body == "gelu":
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    elif p.body == "relu2":
        h = torch.where(h > 0, h * h, 0 * h)
    elif p.body == "interleaved":
        pairs = h.view(-1, width, 2)
        gate, up = torch.clamp(pairs[..., 0], max=7.0), torch.clamp(pairs[..., 1], -7.0, 7.0)
        h = (1 + up) * gate / (1 + torch.exp(-1.702 * gate))
    else:
        gate, up = h[:, :width], h[:, width:]
        h = gate / (1 + torch.exp(-gate)) * up
    return linear(h, p.down_proj, p.down_bias)


def oracle(moe: nn.Module, x_BTD: Tensor) -> Tensor:
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    topk_ids, topk_weights = moe.router(x_TD)
    weight_TE = (F.one_hot(topk_ids, E) * topk_weights.unsqueeze(-1)).sum(1)
    out = torch.zeros_like(x_TD)
    for e in range(E):
        y = stacked_expert(moe.experts, e, x_TD) if isinstance(moe.experts, StackedExperts) else moe.experts[e](x_TD)
        out = out + weight_TE[:, e, None] * y
    if moe.shared_expert is not None:
        out = out + moe.shared_expert(x_TD)
    return out.view_as(x_BTD)


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Missing gradients are zeros: a loop that skips an expert leaves None."""
    named = {"x": x, **dict(module.named_parameters())}
    if not out.requires_grad:  # no tokens at all, and every expert skipped
        return {name: torch.zeros_like(p) for name, p in named.items()}
    probe = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    grads = torch.autograd.grad(out, list(named.values()), probe, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


def check(moe: nn.Module, x: Tensor) -> None:
    got, want = moe(x), oracle(moe, x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(got, x, moe), gradients(want, x, moe), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("idiom", "router", "body", "shared"), CASES)
def test_agrees_with_oracle(idiom: str, router: str, body: str, shared: bool, poison: None) -> None:
    moe = IDIOMS[idiom](D, WIDTH, E, K, router=router, body=body, shared=shared).double()
    check(moe, torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 2), (1, 1), (9, E)])
def test_edges(idiom: str, tokens: int, top_k: int, poison: None) -> None:
    moe = IDIOMS[idiom](D, WIDTH, E, top_k).double()
    check(moe, torch.randn(tokens, D, dtype=torch.float64, requires_grad=True))


def test_skip_by_counts() -> None:
    moe = IDIOMS["skip_empty"](D, WIDTH, E, 1, skip_by="counts").double()
    check(moe, torch.randn(2, D, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("idiom", IDIOMS)
def test_bfloat16(idiom: str) -> None:
    """Also the only run of the real grouped GEMM, which has no float64."""
    moe = IDIOMS[idiom](D, WIDTH, E, K).bfloat16()
    x = torch.randn(11, D, dtype=torch.bfloat16, requires_grad=True)
    want = oracle(moe, x)
    got = moe(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=4e-2)
    torch.testing.assert_close(gradients(got, x, moe), gradients(want, x, moe), rtol=5e-2, atol=1e-1)


def test_poison(poison: None) -> None:
    """The fixture used above does what it says."""
    assert bool(torch.empty(100).isnan().all())
    assert bool(torch.empty_like(torch.ones(100)).isnan().all())


def test_softmax_routers() -> None:
    x = torch.randn(5, D, dtype=torch.float64)
    for name, total in (("softmax", 1.0), ("topk_softmax", 1.0), ("softmax_raw", None)):
        ids, weights = ROUTERS[name](D, E, K).double()(x)
        assert ids.shape == weights.shape == (5, K)
        sums = weights.sum(-1)
        assert bool((sums < 1).all()) if total is None else torch.allclose(sums, torch.full_like(sums, total))


def test_sigmoid_router_keeps_to_the_best_group() -> None:
    router = ROUTERS["sigmoid_group"](D, E, K).double()
    x = torch.randn(50, D, dtype=torch.float64)
    ids, weights = router(x)
    biased = torch.sigmoid(x @ router.weight.T) + router.correction_bias
    best = biased.view(50, 2, 3).topk(2).values.sum(-1).argmax(-1)
    assert torch.equal(ids // 3, best[:, None].expand(-1, K))
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("idiom", IDIOMS)
def test_decoder_trains(idiom: str) -> None:
    model = Decoder(32, D, 2, [IDIOMS[idiom](D, WIDTH, E, K) for _ in range(2)])
    ids = torch.randint(32, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown router 'sofmax'; choose one of softmax,"):
        IDIOMS["one_hot"](D, WIDTH, E, K, router="sofmax")
    with pytest.raises(ValueError, match="unknown body 'interleaved'; choose one of swiglu, gelu, relu2"):
        IDIOMS["one_hot"](D, WIDTH, E, K, body="interleaved")
