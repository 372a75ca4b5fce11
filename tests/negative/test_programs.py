"""The near-misses themselves: they run, they differ from what they resemble, and there are enough of them."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moec.models import IDIOMS

from .programs import NEAR_MISSES, E, Layer, NearMiss, StackedLayer


def routed_sum(layer: Layer, x: Tensor) -> Tensor:
    """What the layer would compute if it were the idiom."""
    topk_ids, topk_weights = layer.router(x)
    weight_TE = (F.one_hot(topk_ids, E) * topk_weights.unsqueeze(-1)).sum(1)
    run = layer.run_expert if isinstance(layer, StackedLayer) else lambda e, x: layer.experts[e](x)
    return sum((weight_TE[:, e, None] * run(e, x) for e in range(E)), torch.zeros_like(x))


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.name)
def test_runs_and_differs(miss: NearMiss, poison: None) -> None:
    module, (x,) = miss.build()
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    grads = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    assert bool(out.isfinite().all())
    assert not [name for name, g in grads.items() if g is not None and not bool(g.isfinite().all())]
    assert grads["x"] is not None
    # dropout and differing bodies are equal to the sum over the same modules, drawn or written another way
    if miss.name not in ("WhereDropoutInside", "HitModulesMixedBodies"):
        assert (out - routed_sum(module, x)).abs().max() > 1e-4, "computes the very thing it should miss"


def test_build_is_repeatable() -> None:
    for miss in NEAR_MISSES:
        (a, (x,)), (b, (y,)) = miss.build(), miss.build()
        assert torch.equal(x, y)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_enough_of_them() -> None:
    assert len({miss.name for miss in NEAR_MISSES}) == len(NEAR_MISSES)
    for idiom in IDIOMS:
        strict = Counter(miss.missing for miss in NEAR_MISSES if miss.idiom == idiom and not miss.other_sum)
        assert len(strict) >= 3, idiom
