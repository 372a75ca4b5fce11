"""Every reference idiom through the backend: values, gradients, token counts, routings, and what the rewritten graph holds."""

import contextlib
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moec.models import IDIOMS, ROUTERS, Decoder

from . import hf, layers
from .layers import AOT, D, E, F, K

EAGER = {"moec.inner": "eager"}
COUNTS = (1, 2, 17, 64, 333)
THROUGH_AOT = ("static_where", "hit_stacked", "sort_tolist", "grouped_mm")  # where all eleven would take too long
ROUTINGS = {"some empty": (0, 3, 5), "two take all": (6, 7)}


def check(layer: nn.Module, x: Tensor, options: dict[str, object] | None = None) -> None:
    """Rewritten in one graph, verified, and as near to float64 as eager is."""
    backend, results = layers.kept(options)
    got = layers.run(torch.compile(layer, backend=backend, fullgraph=True), layer, x)
    assert layers.statuses(results) == ["rewritten"]
    assert results[0].sites[0].verified.startswith("values and gradients agree")
    worst = layers.judge(got, layer, x)
    assert worst.ratio <= 1, worst


# Every router and every body with every idiom, though not all pairs.
CASES = [
    pytest.param(idiom, router, body, id=f"{idiom}-{router}-{body}")
    for idiom in IDIOMS
    for router, body in zip([*ROUTERS, "softmax"], itertools.cycle(layers.bodies(idiom)))
]


@pytest.mark.parametrize(("idiom", "router", "body"), CASES)
def test_routers_and_bodies(idiom: str, router: str, body: str, poison: None) -> None:
    check(layers.build(idiom, router=router, body=body), layers.tokens(17), EAGER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("idiom", IDIOMS)
def test_dtypes(idiom: str, dtype: torch.dtype, poison: None) -> None:
    """With a shared expert and biases, and AOTAutograd behind."""
    check(layers.build(idiom, dtype, router="topk_softmax", body="gelu", shared=True), layers.tokens(17, dtype))


@pytest.mark.parametrize(
    ("idiom", "dtype"),
    [("static_where", torch.float32), ("hit_stacked", torch.bfloat16), ("sort_tolist", torch.float64)],
    ids=str,
)
def test_inductor(idiom: str, dtype: torch.dtype) -> None:
    check(layers.build(idiom, dtype, shared=True), layers.tokens(17, dtype), {"moec.inner": "inductor"})


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_few_tokens(idiom: str, tokens: int, poison: None) -> None:
    check(layers.build(idiom, shared=True), layers.tokens(tokens), EAGER)


# torch cannot trace slices of unknown length of an empty tensor: the frame is traced as plain torch.compile would
SLICED = ("sort_tolist", "grouped_mm")


@pytest.mark.parametrize("idiom", IDIOMS)
def test_no_tokens(idiom: str, poison: None) -> None:
    """Dynamo specializes on the size 0; a loop that skips empty experts then has no experts left to rewrite."""
    layer, x = layers.build(idiom, shared=True), layers.tokens(0)
    backend, results = layers.kept()
    got = layers.run(torch.compile(layer, backend=backend), layer, x)
    worst = layers.judge(got, layer, x)
    assert worst.ratio <= 1, worst
    if idiom not in layers.SKIPS and idiom not in SLICED:
        assert layers.statuses(results) == ["rewritten"]


@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_one_and_all_experts(idiom: str, top_k: int, poison: None) -> None:
    """Weights that are not scaled to sum to one: for K = 1 that would leave a router whose gradient is rounding error."""
    check(layers.build(idiom, top_k=top_k, router="softmax_raw"), layers.tokens(9), EAGER)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_token_counts_and_routings(idiom: str, poison: None) -> None:
    """At most one compilation after the first two shapes; none for another routing: empty experts, two that take all."""
    layer = layers.build(idiom)
    backend, results = layers.kept(AOT if idiom in THROUGH_AOT else EAGER)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for count in COUNTS:
        x = layers.tokens(count)
        worst = layers.judge(layers.run(compiled, layer, x), layer, x)
        assert worst.ratio <= 1, f"{count} tokens: {worst}"
    assert len(results) <= 3
    before = len(results)
    for chosen in ROUTINGS.values():
        layers.prefer(layer, chosen)
        for count in (91, 333, 2):
            x = layers.tokens(count, seed=count)
            worst = layers.judge(layers.run(compiled, layer, x), layer, x)
            assert worst.ratio <= 1, f"{count} tokens to {chosen}: {worst}"
    assert len(results) == before
    assert layers.statuses(results) == ["rewritten"] * before
    for result in results[1:before]:
        assert_clean(result.gm, max(COUNTS))


@pytest.mark.parametrize("idiom", IDIOMS)
def test_no_tokens_once_dynamic(idiom: str, poison: None) -> None:
    """One more graph at most, since Dynamo specializes on the size 0; and the others still serve afterwards."""
    layer = layers.build(idiom)
    backend, results = layers.kept(EAGER)
    compiled = torch.compile(layer, backend=backend)
    for count in (17, 64, 0, 9):
        x = layers.tokens(count)
        worst = layers.judge(layers.run(compiled, layer, x), layer, x)
        assert worst.ratio <= 1, f"{count} tokens: {worst}"
    assert len([r for r in results if any(s.status == "rewritten" for s in r.sites)]) <= 3
    assert layers.statuses(results)[:2] == ["rewritten"] * 2


@pytest.mark.parametrize("idiom", IDIOMS)
def test_routing_at_the_first_call(idiom: str, poison: None) -> None:
    """The graph is captured where most experts have no tokens, and must serve where all have."""
    layer = layers.prefer(layers.build(idiom), (0, 3, 5))
    backend, results = layers.kept(EAGER)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = layers.tokens(17)
    got = layers.run(compiled, layer, x)
    assert layers.judge(got, layer, x).ratio <= 1
    used = {name for name, g in got.grads.items() if g is not None and bool(g.any())}
    assert len(used) < len(got.grads) or idiom in layers.STACKED
    layers.prefer(layer, tuple(range(E)), strength=1.0)
    got = layers.run(compiled, layer, x)
    assert layers.judge(got, layer, x).ratio <= 1
    assert len(results) == 1


# -- What is in the graphs ---------------------------------------------------------------------------------------------------


def numel(val: object) -> int:
    return max((int(t.numel()) for t in tree_leaves(val) if isinstance(t, Tensor)), default=0)


def assert_clean(gm: torch.fx.GraphModule, tokens: int) -> None:
    """Nothing as large as T*E*F, S*E*F or T*E*D; no assertion, and no size that only the data knows."""
    limit = tokens * E * min(D, F)
    for node in layers.all_nodes(gm):
        assert "assert" not in str(node.target), node.format_node()
        assert "constrain_range" not in str(node.target), node.format_node()
        if node.op == "placeholder" or node.op == "output":
            continue
        val = layers.value(node)
        assert numel(val) < limit, f"{node.format_node()}: {numel(val)} elements, {limit} at most"
        for leaf in tree_leaves(val):
            sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
            names = {str(symbol) for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}
            assert not [n for n in names if n.startswith("u")], node.format_node()


@pytest.mark.parametrize("idiom", IDIOMS)
def test_nothing_large_or_dead_in_the_graph(idiom: str) -> None:
    """In the rewritten graph, and in the forward and backward that AOTAutograd makes of it."""
    aten: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        aten.append(gm)
        return gm.forward

    torch._dynamo.register_backend(compiler_fn=aot_autograd(fw_compiler=keep, bw_compiler=keep), name="keep_aten")
    try:
        layer = layers.build(idiom, torch.bfloat16)  # in which transformers' path uses the real grouped GEMM
        backend, results = layers.kept({"moec.inner": "keep_aten"})
        layers.run(torch.compile(layer, backend=backend), layer, layers.tokens(160, torch.bfloat16))
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("keep_aten")
    assert layers.statuses(results) == ["rewritten"]
    assert len(aten) == 2
    for gm in [results[0].gm, *aten]:
        assert_clean(gm, 160)


# -- Autocast, checkpoint, eval ----------------------------------------------------------------------------------------------


class Around(nn.Module):
    """The layer with autocast inside the model, or as a checkpointed segment."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            return checkpoint(self.layer, x * 1.0, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x * 1.0)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("idiom", ["static_where", "one_hot", "hit_stacked", "sort_tolist", "batched_mm"])
def test_autocast(idiom: str, where: str) -> None:
    """Judged by the eager run under the same autocast, with the unit of bfloat16."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    layer = layers.build(idiom, torch.float32, body="gelu")
    x = layers.tokens(17, torch.float32)
    with autocast:
        try:
            eager = layers.run(layer, layer, x)
        except RuntimeError as error:
            pytest.skip(f"eager does not run this idiom under autocast: {error}")
    backend, results = layers.kept()
    compiled = torch.compile(
        layer if where == "outside" else Around(layer, "autocast"), backend=backend, fullgraph=True
    )
    with autocast if where == "outside" else contextlib.nullcontext():
        got = layers.run(compiled, layer, x)
    assert layers.statuses(results) == ["rewritten"]
    assert got.logits.dtype == eager.logits.dtype
    for name, grad in got.grads.items():
        assert grad is None or grad.dtype == torch.float32, name
    worst = layers.judge(got, layer, x, around=autocast, eps=torch.finfo(torch.bfloat16).eps)
    assert worst.ratio <= 1, worst


@pytest.mark.parametrize("idiom", IDIOMS)
def test_checkpoint(idiom: str) -> None:
    layer = layers.build(idiom)
    x = layers.tokens(17)
    backend, results = layers.kept(AOT if idiom in THROUGH_AOT else EAGER)
    around = Around(layer, "checkpoint")
    got = layers.run(torch.compile(around, backend=backend), layer, x)
    assert layers.statuses(results) == ["rewritten"]
    worst = layers.judge(got, layer, x)
    assert worst.ratio <= 1, worst


@pytest.mark.parametrize(
    ("idiom", "grad_mode"),
    [
        *[(idiom, torch.no_grad) for idiom in IDIOMS],
        *[(idiom, torch.inference_mode) for idiom in ("one_hot", "hit_stacked")],
    ],
)
def test_inference(idiom: str, grad_mode: type, poison: None) -> None:
    layer = layers.build(idiom, torch.float32).eval()
    backend, results = layers.kept(AOT if idiom in THROUGH_AOT else EAGER)
    x = layers.tokens(17, torch.float32)
    with grad_mode():
        torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    assert layers.statuses(results) == ["rewritten"]


def test_all_idioms_in_one_decoder() -> None:
    """Eleven layers, three dimensions, one graph."""
    torch.manual_seed(0)
    model = Decoder(32, D, 2, [make(D, F, E, K) for make in IDIOMS.values()]).double()
    backend, results = layers.kept(EAGER)
    ids = torch.randint(32, (2, 9))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got, want = compiled(ids), model(ids)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert layers.statuses(results) == ["rewritten"] * len(IDIOMS)
    probe = torch.randn_like(want)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(got, parameters, probe)
    theirs = torch.autograd.grad(want, parameters, probe, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-10)


def test_measure_is_not_blind() -> None:
    """A gradient off by a thousandth is seen, and a replayed choice is what counts."""
    layer = layers.build("static_where", torch.float32)
    x = layers.tokens(17, torch.float32)
    got = layers.run(layer, layer, x)
    assert layers.judge(got, layer, x).ratio <= 1
    name = "experts.3.up_proj.weight"
    wrong = hf.Run(got.logits, {**got.grads, name: got.grads[name] * (1 + 1e-3)})
    worst = layers.judge(wrong, layer, x)
    assert (worst.name, worst.ratio > 1) == (name, True)


@pytest.mark.parametrize("idiom", ["dense_loop", "dense_stacked"])
def test_zero_times_infinity_is_left_out(idiom: str) -> None:
    """The second licence: an expert that a token did not choose may overflow for it; eager gets NaN then, and moec does not."""
    layer, x = layers.prefer(layers.build(idiom, body="relu2"), (0, 1, 2)), layers.tokens(17)
    with torch.no_grad():
        weight = layer.experts.up_proj if idiom in layers.STACKED else layer.experts[5].up_proj.weight
        (weight[5] if idiom in layers.STACKED else weight).fill_(torch.inf)
    backend, results = layers.kept()
    assert bool(layer(x).isnan().any())
    assert bool(torch.compile(layer, backend=backend, fullgraph=True)(x).isfinite().all())
    assert layers.statuses(results) == ["rewritten"]
