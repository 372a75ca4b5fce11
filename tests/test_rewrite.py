"""`moec.rewrite`, the pass alone: on Dynamo's graphs and on those of torch.export."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

import moec
from moec.errors import OptionError, StrictError
from moec.models import IDIOMS

from . import layers

# The others branch on data, which torch.export refuses.
EXPORTS = ["static_where", "static_mask", "one_hot", "zip_masks", "grouped_mm", "batched_mm"]


def text(gm: fx.GraphModule) -> str:
    return "\n".join(n.format_node() or "output" for n in gm.graph.nodes)


def moec_ops(gm: fx.GraphModule) -> set[str]:
    return {str(n.target).split(".")[1] for n in gm.graph.nodes if str(n.target).startswith("moec.")}


def captured(layer: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[Tensor], object]:
    """What Dynamo hands to a backend that is not moec's: its graph, the inputs, the result."""
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Tensor]) -> object:
        found.append((copy.deepcopy(gm), example_inputs))
        return gm.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        out = torch.compile(layer, backend=keep, fullgraph=True)(x)
    ((gm, inputs),) = found
    return gm, inputs, out


@pytest.mark.parametrize("idiom", ["static_where", "static_mask", "one_hot", "zip_masks", "grouped_mm", "batched_mm"])
def test_graph_of_dynamo(idiom: str) -> None:
    dtype = torch.bfloat16 if idiom == "grouped_mm" else torch.float64
    layer, x = layers.build(idiom, dtype), layers.tokens(17, dtype)
    gm, inputs, out = captured(layer, x)
    before, code = text(gm), gm.code
    new, sites = moec.rewrite(gm, inputs)
    assert [s.status for s in sites] == ["rewritten"]
    assert (text(gm), gm.code) == (before, code), "the graph that was given is not changed"
    assert not moec_ops(gm)
    assert moec_ops(new) in ({"route", "experts"}, {"route", "dispatch", "grouped_linear", "combine"})
    new.graph.lint()
    got = new(*inputs)[0]
    if dtype == torch.float64:
        torch.testing.assert_close(got, out, rtol=1e-11, atol=1e-12)
        grads = torch.autograd.grad(got.sum(), list(layer.parameters()))
        for ours, theirs in zip(grads, torch.autograd.grad(layer(x).sum(), list(layer.parameters()))):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    else:
        torch.testing.assert_close(got, out, rtol=2e-2, atol=4e-2)
    again, sites = moec.rewrite(new, inputs)
    assert "rewritten" not in [s.status for s in sites], "once is enough"
    torch.testing.assert_close(again(*inputs)[0], got)


@pytest.mark.parametrize("form", ["module", "graph_module", "decomposed"])
@pytest.mark.parametrize("idiom", EXPORTS)
def test_graph_of_export(idiom: str, form: str) -> None:
    dtype = torch.bfloat16 if idiom == "grouped_mm" else torch.float32
    layer, x = layers.build(idiom, dtype, shared=True), layers.tokens(17, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(layer, (x,))
        program = program.run_decompositions() if form == "decomposed" else program
    gm = program.graph_module if form == "graph_module" else program.module()
    before, keys = text(gm), list(gm.state_dict())
    new, sites = moec.rewrite(gm)
    assert [s.status if s.reason is None else s.reason for s in sites] == ["rewritten"]
    assert text(gm) == before
    assert list(new.state_dict()) == keys
    assert moec_ops(new) in ({"route", "experts"}, {"route", "dispatch", "grouped_linear", "combine"})
    if form != "graph_module":  # which takes its parameters as inputs
        tight = dtype == torch.float32
        for seed in (1, 2):
            x = layers.tokens(17, dtype, seed)
            torch.testing.assert_close(new(x), layer(x), rtol=1e-5 if tight else 2e-2, atol=1e-6 if tight else 4e-2)


@pytest.mark.parametrize("idiom", ["batched_mm", "grouped_mm"])
def test_export_with_dynamic_tokens(idiom: str) -> None:
    layer, x = layers.build(idiom, torch.bfloat16), layers.tokens(17, torch.bfloat16)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=4096)},))
    new, sites = moec.rewrite(program.module())
    assert [s.status for s in sites] == ["rewritten"]
    for count in (2, 64, 333):
        x = layers.tokens(count, torch.bfloat16)
        torch.testing.assert_close(new(x), layer(x), rtol=2e-2, atol=4e-2)


class Traceable(nn.Module):
    """batched_mm for one number of tokens, so that `symbolic_trace` can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layers.build("batched_mm", torch.float32)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.inner.routed(x, topk_ids, topk_weights)


def test_plain_symbolic_trace() -> None:
    """No fake values: example inputs are asked for, and used on a copy."""
    layer, x = layers.build("batched_mm", torch.float32), layers.tokens(17, torch.float32)
    ids, weights = layer.router(x)
    model = Traceable()
    model.inner = layer
    gm = fx.symbolic_trace(model)
    gm_before = text(gm)
    assert not any(layers.value(n) is not None for n in gm.graph.nodes)
    new, sites = moec.rewrite(gm, (x, ids, weights))
    assert text(gm) == gm_before
    assert not any(layers.value(n) is not None for n in gm.graph.nodes), "not even its meta"
    torch.testing.assert_close(new(x, ids, weights), layer.routed(x, ids, weights))
    # whether or not it is rewritten, without fake values nothing may go wrong
    untouched, sites = moec.rewrite(gm)
    torch.testing.assert_close(untouched(x, ids, weights), layer.routed(x, ids, weights))


def test_options() -> None:
    layer, x = layers.build("static_where"), layers.tokens(17)
    gm, inputs, out = captured(layer, x)
    new, sites = moec.rewrite(gm, inputs, {"moec.disable": True})
    assert not moec_ops(new)
    new, sites = moec.rewrite(gm, inputs, {"moec.disable": "static_where.py"})
    assert [s.status for s in sites] == ["refused"]
    assert not moec_ops(new)
    new, sites = moec.rewrite(gm, inputs, {"moec.verify": "off"})
    assert [s.verified for s in sites] == [None]
    with pytest.raises(OptionError, match="unknown option 'moec.verfy'; the nearest is 'moec.verify'"):
        moec.rewrite(gm, inputs, {"moec.verfy": "off"})
    with pytest.raises(OptionError, match="only moec's own options, not 'max_autotune'"):
        moec.rewrite(gm, inputs, {"max_autotune": True})


def test_strict() -> None:
    """As with the backend: a refusal raises."""
    layer = layers.build("static_where")
    layer.experts[3].forward = lambda x, e=layer.experts[3]: e.down_proj(torch.tanh(e.up_proj(x)))
    gm, inputs, out = captured(layer, layers.tokens(17))
    new, sites = moec.rewrite(gm, inputs)
    assert [s.status for s in sites] == ["refused"]
    assert text(new) == text(gm), "a refused graph is as it was"
    with pytest.raises(StrictError):
        moec.rewrite(gm, inputs, {"moec.strict": True})


def test_graph_without_moe() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(3, 4)
    new, sites = moec.rewrite(gm, (x,))
    assert sites == []
    torch.testing.assert_close(new(x), gm(x))
    assert list(new.state_dict()) == list(gm.state_dict())


def test_deepcopy_and_recompile_of_the_result() -> None:
    layer, x = layers.build("one_hot"), layers.tokens(17)
    gm, inputs, out = captured(layer, x)
    new, _ = moec.rewrite(gm, inputs)
    twin = copy.deepcopy(new)
    twin.recompile()
    torch.testing.assert_close(twin(*inputs)[0], out, rtol=1e-11, atol=1e-12)
    assert set(IDIOMS) >= set(EXPORTS)
