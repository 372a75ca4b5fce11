"""What a declaration promises: sizes, FLOPs and parameters by G; one graph; a report with the declared G; nothing that is unused.

E, G, D: expansion rate, granularity, model width.
"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import moec
from moec.models.fine_grained import FineGrainedDecoder

from . import oracle

GRANULARITIES = (1, 2, 4, 8, 16)


def paper(d_model: int, d_ff: int, granularity: int, **changes: object) -> moec.nn.MoE:
    return moec.nn.MoE(d_model, d_ff, 2, granularity, **changes)


def test_sizes() -> None:
    layer = moec.nn.MoE(d_model=64, d_ff=256, expansion=8, granularity=16)
    assert (layer.num_experts, layer.top_k, layer.d_expert) == (128, 16, 16)
    assert layer.experts.up_proj.weight.shape == (128, 16, 64)
    assert layer.experts.down_proj.weight.shape == (128, 64, 16)
    assert moec.nn.MoE(64, 256, 8, 16, gated=True).experts.up_proj.weight.shape == (128, 32, 64)


def test_output_norm_is_there_when_experts_are_cut() -> None:
    assert paper(16, 64, 1).output_norm is None
    assert isinstance(paper(16, 64, 2).output_norm, nn.LayerNorm)
    assert paper(16, 64, 2, output_norm=False).output_norm is None
    assert paper(16, 64, 1, output_norm=True).output_norm is not None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_flops_of_experts_do_not_depend_on_granularity(router: str, gated: bool) -> None:
    tokens, d_model, d_ff = 32, 16, 64
    matrices = 3 if gated else 2
    for g in GRANULARITIES:
        layer = paper(d_model, d_ff, g, router=router, gated=gated)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(tokens, d_model, requires_grad=True)).sum().backward()
        counted = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
        forward = 2 * tokens * matrices * d_model * d_ff
        assert counted["MoE.experts"] == 3 * forward, "once forward, twice backward"
        assert counted["MoE.router"] == 3 * 2 * tokens * d_model * (2 * g)
        assert counted["Global"] == counted["MoE.experts"] + counted["MoE.router"]


@pytest.mark.parametrize("g", GRANULARITIES)
def test_parameters_follow_the_paper(g: int) -> None:
    """N = d^2 (8E + 4) per block: everything but embeddings, norms and routers."""
    d_model, expansion, blocks = 16, 3, 2
    model = FineGrainedDecoder(50, d_model, blocks, lambda d, d_ff: moec.nn.MoE(d, d_ff, expansion, g), num_heads=2)
    skipped = ("embedding", "head", "norm", "router")
    counted = sum(p.numel() for name, p in model.named_parameters() if not any(s in name for s in skipped))
    assert counted == blocks * d_model**2 * (8 * expansion + 4)


def test_initial_scale() -> None:
    torch.manual_seed(0)
    for g in (1, 8):
        layer = moec.nn.MoE(256, 1024, 2, g)
        for weight, fan_in in (
            (layer.experts.up_proj.weight, 256),
            (layer.experts.down_proj.weight, 1024),
            (layer.router.weight, 256),
        ):
            assert weight.std().item() == pytest.approx((0.1 / fan_in) ** 0.5, rel=0.05)
            assert weight.abs().max() <= 0.2
    bound = moec.nn.MoE(256, 1024, 2, 8, init="uniform", init_scale=1.0).experts.down_proj.weight.abs().max()
    assert bound.item() == pytest.approx(1024**-0.5, rel=0.01)


# ---- graphs


@pytest.mark.parametrize("router", ["softmax", "sigmoid-groups-score", "expert_choice-position"])
def test_one_graph_whatever_the_routing(router: str) -> None:
    layer = oracle.build(router)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = oracle.tokens(2, 9)
    for seed in range(3):
        compiled(oracle.tokens(2, 9, seed=seed))
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    compiled(x)
    assert counter.frame_count == 1
    for length in (10, 17, 31):
        compiled(oracle.tokens(2, length))
    assert counter.frame_count == 2, "one more for any number of tokens"


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_the_report_shows_the_declared_granularity(router: str) -> None:
    layer = moec.nn.MoE(16, 48, 2, 3, router=router)
    report = moec.explain(layer, torch.randn(5, 16))
    (site,) = report.sites
    assert report.graph_breaks == 0
    assert site.status == "rewritten"
    assert (site.num_experts, site.d_model, site.d_expert) == (6, 16, 16)
    assert site.top_k == (3 if router == "softmax" else None)
    assert site.granularity == 3
    assert not site.granularity_assumed
    assert site.location.startswith(__file__)


def graph_of(layer: nn.Module) -> fx.Graph:
    kept: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: object) -> fx.GraphModule:
        kept.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(layer, backend=keep, fullgraph=True)(oracle.tokens(5, dtype=torch.float32))
    (gm,) = kept
    return gm.graph


def targets(graph: fx.Graph) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op.startswith("call")]


def outputs(graph: fx.Graph) -> int:
    return len(next(n for n in graph.nodes if n.op == "output").args[0])


def test_what_is_not_used_is_not_in_the_graph() -> None:
    """The whole program of a plain layer; recording adds outputs, and nothing to compute."""
    layer = oracle.build("softmax", torch.float32)
    plain = graph_of(layer)
    wanted = ["reshape", "to", "to", "linear", "softmax", "topk", "getitem", "getitem"]
    wanted += [
        "reshape",
        "route",
        "getitem",
        "getitem",
        "getitem",
        "to",
        "reshape",
        "experts",
        "layer_norm",
        "to",
        "view",
    ]
    assert targets(plain) == wanted
    assert outputs(plain) == 1
    layer.record = True
    recorded = graph_of(layer)
    assert [t for t in targets(recorded) if t != "detach"] == wanted
    assert outputs(recorded) > 1
    assert layer.stats().tokens_per_expert.sum() == 5 * oracle.G
    layer.record = False
    assert targets(graph_of(layer)) == wanted


def test_the_declaration_costs_other_backends_nothing() -> None:
    assert not any("declared" in t for t in targets(graph_of(oracle.build("softmax", torch.float32))))


@pytest.mark.parametrize("router", ["softmax", "softmax-order", "expert_choice-position"])
def test_every_run_is_the_same(router: str) -> None:
    layer = oracle.build(router, torch.float32)
    x = oracle.tokens(8, 16, dtype=torch.float32).requires_grad_()
    first, second = (oracle.gradients(layer(x), x, layer) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_numbers_stay_as_they_were_in_eval() -> None:
    layer = oracle.build("sigmoid")
    x = oracle.tokens(5)
    assert torch.equal(layer(x), layer.eval()(x))
    assert layer.router.load is not None
    assert layer.router.load.sum() == 5 * oracle.G, "counted in training alone"
