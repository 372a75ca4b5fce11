"""Losses, the bias that balances without one, and statistics, each against a loop over plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.nn import ROUTERS, TokenChoice
from moec.nn.stabilizers import balance_loss, z_loss

from . import oracle


def test_balance_loss() -> None:
    probs, chosen = torch.randn(5, 4).double().softmax(-1), torch.tensor([[0, 1], [1, 2], [1, 3], [0, 1], [1, 2]])
    shares = [sum((chosen == e).flatten().tolist()) / 10 for e in range(4)]
    want = 4 * sum(share * probs[:, e].mean().item() for e, share in enumerate(shares))
    assert balance_loss(probs, chosen).item() == pytest.approx(want)
    even = torch.full((4, 4), 0.25)
    assert balance_loss(even, torch.arange(4).view(4, 1)).item() == pytest.approx(1)
    assert balance_loss(probs[:0], chosen[:0]) == 0


def test_z_loss() -> None:
    logits = torch.randn(5, 4).double()
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 5
    assert z_loss(logits).item() == pytest.approx(want)
    assert z_loss(logits[:0]) == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "expert_choice-all"])
def test_aux_loss_of_a_model(router: str, compiled: bool) -> None:
    """Read after the forward, added to the loss; the gradient of the router is that of the formula."""
    balance = 0.0 if router.startswith("expert") else 0.3
    model = nn.Sequential(*(oracle.build(router, seed=i, balance_loss=balance, z_loss=0.7) for i in range(2)))
    x = oracle.tokens(6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    call(x)
    got = moec.nn.aux_loss(model)
    want, h = x.new_zeros(()), x
    for layer in model:
        logits = h @ layer.router.weight.T
        want = want + 0.7 * z_loss(logits)
        if balance:
            routing = layer.router(h)
            want = want + 0.3 * balance_loss(layer.router.probabilities(logits), routing.chosen)
        h = oracle.dense(layer, h)
    torch.testing.assert_close(got, want)
    weights = [layer.router.weight for layer in model]
    for g, w in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights)):
        torch.testing.assert_close(g, w)
    model.eval()(x)
    with pytest.raises(RuntimeError, match="call the model in training"):
        moec.nn.aux_loss(model)


def test_no_loss_without_coefficients() -> None:
    layer = oracle.build()
    layer(oracle.tokens(3))
    with pytest.raises(RuntimeError, match=r"give moec\.nn\.MoE balance_loss=0\.01 or z_loss"):
        moec.nn.aux_loss(layer)


@pytest.mark.parametrize("compiled", [False, True])
def test_bias_follows_the_load(compiled: bool) -> None:
    layer = oracle.build("sigmoid")
    before = layer.router.expert_bias.clone()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    batches = [oracle.tokens(7, seed=s) for s in (1, 2)]
    load = torch.zeros(6, dtype=torch.int64)
    for x in batches:
        for row in layer.router(x).chosen.tolist():
            for e in row:
                load[e] += 1
    layer.router.load.zero_()
    for x in batches:
        call(x)
    assert torch.equal(layer.router.load, load)
    moec.nn.update_biases(layer, rate=0.01)
    want = [b + 0.01 * (1 if n < 28 / 6 else -1) for b, n in zip(before.tolist(), load.tolist())]
    torch.testing.assert_close(layer.router.expert_bias, torch.tensor(want).to(before))
    assert not layer.router.load.any()


def test_bias_balances() -> None:
    """Without any loss the load evens out, where it does not without the bias."""
    torch.manual_seed(0)
    layer = moec.nn.MoE(8, 16, 4, 2, router=replace(ROUTERS["softmax"], bias=True), init_scale=4.0)
    layer.record = True
    x = torch.randn(128, 8) + 1
    spread = []
    for _ in range(150):
        with torch.no_grad():
            layer(x)
        spread.append(layer.stats().load_cv.item())
        layer.update_bias(rate=0.02)
    assert spread[-1] < 0.3 < 0.7 < spread[0]


def test_bias_errors() -> None:
    with pytest.raises(RuntimeError, match="take router='sigmoid'"):
        oracle.build("softmax").update_bias()
    with pytest.raises(RuntimeError, match="no router keeps a bias"):
        moec.nn.update_biases(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"keep it in float32, layer\.router\.expert_bias = "):
        oracle.build("sigmoid").bfloat16().update_bias()


def _entropy(probs: Tensor) -> float:
    return -sum(p * math.log(p) for row in probs.tolist() for p in row) / len(probs)


def test_stats() -> None:
    layer = oracle.build("softmax-order")
    with pytest.raises(RuntimeError, match=r"set layer\.record = True before the forward"):
        layer.stats()
    layer.record = True
    x = oracle.tokens(10)
    layer(x)
    stats = layer.stats()
    weights = oracle._weights(layer, x)
    kept = (weights > 0).sum(0)
    assert torch.equal(stats.tokens_per_expert, kept)
    assert stats.drop_rate.item() == pytest.approx(1 - kept.sum().item() / 20)
    assert stats.load_cv.item() == pytest.approx(kept.double().std(unbiased=False).item() / kept.double().mean().item())
    assert stats.entropy.item() == pytest.approx(_entropy((x @ layer.router.weight.T).softmax(-1)))
    assert not stats.routing.logits.requires_grad


def test_stats_of_expert_choice() -> None:
    layer = oracle.build("expert_choice-all")
    layer.record = True
    x = oracle.tokens(9)
    layer(x)
    stats = layer.stats()
    assert stats.tokens_per_expert.tolist() == [3] * 6
    assert stats.drop_rate.item() == pytest.approx((oracle._weights(layer, x) == 0).all(1).double().mean().item())
    layer(x[:0])
    assert [v.item() for v in (layer.stats().load_cv, layer.stats().entropy, layer.stats().drop_rate)] == [0, 0, 0]


def test_probabilities_sum_to_one() -> None:
    for settings in (TokenChoice(), TokenChoice(score="sigmoid"), TokenChoice(after=True)):
        layer = moec.nn.MoE(8, 16, 4, 2, router=settings)
        probs = layer.router.probabilities(layer.router.logits(torch.randn(5, 8)))
        torch.testing.assert_close(probs.sum(-1), torch.ones(5))
