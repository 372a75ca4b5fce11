"""`moec.explain`: its numbers, its text, and graphs that people can read and run."""

import ast
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import moec
from moec.models import IDIOMS, Decoder

from . import hf, layers
from .layers import D, E, F, K


def inputs_of(gm: fx.GraphModule) -> list[object]:
    """Random inputs of the shapes and dtypes that the placeholders say."""
    generator = torch.Generator().manual_seed(0)
    made: list[object] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        val = layers.value(node)
        if not isinstance(val, Tensor):
            made.append(int(val))
            continue
        shape = [int(s) for s in val.shape]
        if val.is_floating_point():
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(val.dtype))
        else:
            made.append(
                torch.rand(shape[0], E, generator=generator).argsort(-1)[:, : shape[-1]].to(val.dtype).contiguous()
            )
    return made


def assert_readable(gm: fx.GraphModule) -> None:
    """Both ways of printing are Python, and name no object's address."""
    for text in (gm.code, gm.print_readable(print_output=False)):
        tree = ast.parse(text)
        assert any(isinstance(n, ast.FunctionDef) and n.name == "forward" for n in ast.walk(tree))
        assert " object at 0x" not in text


@pytest.mark.parametrize("idiom", IDIOMS)
def test_numbers(idiom: str) -> None:
    layer = layers.build(idiom, torch.float32)
    report = moec.explain(layer, layers.tokens(17, torch.float32))
    (site,) = report.sites
    assert (site.status, site.reason) == ("rewritten", None)
    assert (site.num_experts, site.top_k, site.d_model, site.d_expert) == (E, K, D, F)
    assert site.granularity == pytest.approx(4 * D / F)
    assert site.granularity_assumed
    assert (report.graph_breaks, len(report.graphs)) == (0, 1)
    path, _, line = site.location.rpartition(":")
    assert Path(path).name == f"{idiom}.py"
    source = Path(path).read_text().splitlines()
    routed = next(i for i, text in enumerate(source, 1) if "def routed" in text)
    assert int(line) > routed, f"points at: {source[int(line) - 1]}"
    assert site.verified.startswith("values and gradients agree")

    first, *_ = text = str(report).splitlines()
    assert first == "moec: 1 of 1 MoE sites rewritten (1 graph, 0 graph breaks)"
    (row,) = (line for line in text if "rewritten" in line and line != first)
    for part in (site.idiom, f"{E}", f"{K}", f"{D}", f"{F}", site.strategy, f"{idiom}.py:{line}"):
        assert part in row
    assert f"{4 * D / F:g}*" in row
    assert "* granularity G = d_ff / d_expert, assuming d_ff = 4 * d_model" in text


@pytest.mark.parametrize("idiom", IDIOMS)
def test_graphs_are_readable_and_run(idiom: str) -> None:
    layer = layers.build(idiom)
    (graph,), (site,) = (lambda r: (r.graphs, r.sites))(moec.explain(layer, layers.tokens(17)))
    for gm in (graph, site.before, site.after):
        assert_readable(gm)
        gm.graph.lint()
    assert any("moec." in str(n.target) for n in graph.graph.nodes)
    (out,) = graph(*inputs_of(graph))
    assert out.shape == (17, D)
    names = [[n.name for n in gm.graph.nodes if n.op == "placeholder"] for gm in (site.before, site.after)]
    values = dict(zip(names[0], inputs_of(site.before)))
    assert set(names[1]) <= set(names[0])
    before, after = site.before(*values.values()), site.after(*[values[name] for name in names[1]])
    torch.testing.assert_close(after.view(before.shape), before, rtol=1e-11, atol=1e-12)


def test_equals_what_the_model_computes() -> None:
    """The rewritten graph, given the model's own parameters in the order of its placeholders."""
    layer = layers.build("static_where")
    x = layers.tokens(17)
    (graph,) = moec.explain(layer, x).graphs
    named = dict(layer.named_parameters())

    def find(name: str) -> Tensor:
        plain = name.lower().replace("_modules", "").replace("_parameters", "").strip("_")
        found = [p for key, p in named.items() if plain.endswith(key.replace(".", "_"))]
        return found[0] if found else x

    got = graph(*[find(str(n.target)) for n in graph.graph.nodes if n.op == "placeholder"])
    torch.testing.assert_close(got[0], layer(x), rtol=1e-11, atol=1e-12)


def test_real_decoder() -> None:
    model = hf.build("qwen3_moe")
    report = moec.explain(model, **hf.example_inputs(model))
    assert [s.status for s in report.sites] == ["rewritten"] * hf.NUM_MOE_LAYERS
    for site in report.sites:
        assert (site.num_experts, site.top_k, site.d_model, site.d_expert) == (8, 3, 40, 24)
        assert site.location.rpartition(":")[0].endswith("modeling_qwen3_moe.py")
        assert_readable(site.before)
        assert_readable(site.after)
    assert_readable(report.graphs[0])
    text = str(report)
    assert text.startswith("moec: 2 of 2 MoE sites rewritten (1 graph, 0 graph breaks)")
    assert text.count("modeling_qwen3_moe.py:") == 2


def test_several_layers_in_order() -> None:
    torch.manual_seed(0)
    idioms = ["one_hot", "hit_stacked", "static_where"]
    widths = [8, 24, 16]
    model = Decoder(32, D, 2, [IDIOMS[i](D, w, E, K) for i, w in zip(idioms, widths)])
    report = moec.explain(model, torch.randint(32, (1, 9)))
    assert [Path(s.location).stem for s in report.sites] == idioms, "in the order in which the model runs them"
    assert [s.d_expert for s in report.sites] == widths
    assert [s.granularity for s in report.sites] == [pytest.approx(4 * D / w) for w in widths]


def test_one_assumption_no_longer_holds() -> None:
    """An opaque call in the way: a graph break, counted, with its reason; the sites on both sides are still found."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers.build("static_where"), layers.build("hit_stacked")

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = moec.explain(Model(), layers.tokens(17))
    assert (len(report.graphs), report.graph_breaks) == (2, 1)
    assert [s.status for s in report.sites] == ["rewritten"] * 2
    assert "2 graphs, 1 graph break)" in str(report)
    assert "graph break: " in str(report)


def test_explain_takes_functions_and_keeps_the_model() -> None:
    layer = layers.build("hit_modules")
    x = layers.tokens(17)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    report = moec.explain(lambda x: layer(x) + 1, x)
    assert [s.status for s in report.sites] == ["rewritten"]
    for key, v in layer.state_dict().items():
        assert torch.equal(v, state[key])
    assert all(p.grad is None for p in layer.parameters())
    again = moec.explain(lambda x: layer(x) + 1, x)
    assert str(again) == str(report), "a second report says the same"


def test_explain_after_compile() -> None:
    """A model that is compiled and warm already is traced anew for the report."""
    layer = layers.build("static_where")
    x = layers.tokens(17)
    torch.compile(layer, backend="moec", options=layers.AOT)(x)
    for target in (layer, torch.compile(layer, backend="moec", options=layers.AOT)):
        report = moec.explain(target, x)
        assert [s.status for s in report.sites] == ["rewritten"]
