"""moec.declare: promises that are kept, promises that are not, and everything that a promise must leave alone."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moec
import moec.pipeline
from moec import capture
from moec.backend import Backend
from moec.capture import promises
from moec.capture.markers import declared
from moec.errors import DeclarationError, DeclarationWarning, MoecError
from moec.report import last_sites

from . import hf, layers
from .layers import D, F, K

E = 4
EAGER = {"moec.inner": "eager", "moec.verify": "off"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    capture.forget_denied()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "moec: traced again")
        yield
    assert not promises._state.calls, "a call that ended is still open"
    capture.forget_denied()


class Loop(nn.Module):
    """A loop over experts; what an expert's rows do to the sum is left to subclasses, most of which make it no routed sum."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.router = nn.Linear(width, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, F), nn.SiLU(), nn.Linear(F, width)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            self.add(out, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out

    def add(self, out: Tensor, token: Tensor, y: Tensor) -> None:
        out.index_add_(0, token, y)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class LastWins(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> None:
        out[token] = y


class LastWinsOfSome(LastWins):
    """With an assumption in the way: traced again without it, then left to eager."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out[token] = self.experts[e](x[token]) * weights[token, choice, None]
        return out


class BreakInLoop(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> None:
        torch._dynamo.graph_break()
        out.index_add_(0, token, y)


class OneExpertOnly(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


BAD = {
    LastWins: "refused: expert ids are chosen here, but no idiom explains how the tokens are dispatched; at",
    LastWinsOfSome: "refused: expert ids are chosen here, but no idiom explains how the tokens are dispatched; at",
    BreakInLoop: r"none could be rewritten:\n  (graph break|no dispatch)",
    OneExpertOnly: "no dispatch of experts was found in what Dynamo traced of its forward .*test_declare.py:",
}


def good(seed: int = 0, idiom: str = "static_where", **changes: object) -> nn.Module:
    return layers.build(idiom, torch.float32, seed, **changes)


def tokens(count: int = 17) -> Tensor:
    return layers.tokens(count, torch.float32)


def compiled(model: nn.Module, **options: object) -> object:
    """Verification has tests of its own."""
    settings = {"inner": "eager", "verify": "off", **options}
    return torch.compile(model, backend="moec", options={f"moec.{k}": v for k, v in settings.items()})


# -- kept ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", ["static_where", "hit_stacked"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_declared_granularity_reaches_report_and_schedule(
    idiom: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = moec.declare(good(idiom=idiom), granularity=8)
    model = nn.Sequential(nn.Linear(D, D), layer) if inside else layer
    problems = []
    describe = moec.pipeline.schedule.describe
    monkeypatch.setattr(moec.pipeline.schedule, "describe", lambda p: problems.append(p) or describe(p))
    report = moec.explain(model, tokens())
    (site,) = report.sites
    assert (site.status, site.granularity, site.granularity_assumed) == ("rewritten", 8, False)
    assert site.declared == type(layer).__name__
    assert [p.granularity for p in problems] == [8]
    (row,) = (line for line in str(report).splitlines() if line.startswith("0 "))
    assert " 8  " in row
    assert "*" not in str(report)
    assert not report.broken_promises
    call = compiled(model)
    torch.testing.assert_close(call(tokens()), model(tokens()))
    torch.testing.assert_close(call(tokens(9)), model(tokens(9)))


def test_granularity_from_d_ff() -> None:
    (site,) = moec.explain(moec.declare(good(), d_ff=3 * F), tokens()).sites
    assert (site.granularity, site.granularity_assumed) == (3, False)
    (site,) = moec.explain(moec.declare(good(), granularity=2.5, d_ff=60), tokens()).sites
    assert site.granularity == 2.5
    (site,) = moec.explain(moec.declare(good()), tokens()).sites
    assert (site.granularity, site.granularity_assumed) == (4 * D / F, True), "a bare promise says nothing of sizes"


def test_several_of_one_class() -> None:
    """Each with its own G, one undeclared, one called twice."""
    many = [good(seed) for seed in range(3)]
    moec.declare(many[0], granularity=2)
    moec.declare(many[2], granularity=16)
    sites = moec.explain(Stack(*many, many[0]), tokens()).sites
    assert [(s.granularity, s.granularity_assumed) for s in sites] == [
        (2, False),
        (4 * D / F, True),
        (16, False),
        (2, False),
    ]


def test_a_loop_over_layers() -> None:
    """Equal iterations are repeated without being traced; a declaration makes an iteration unequal."""
    small = {"num_experts": 2, "top_k": 1}
    declared_layers = [moec.declare(good(i, **small), granularity=i + 1) for i in range(6)]
    assert [s.granularity for s in moec.explain(Stack(*declared_layers), tokens(5)).sites] == [1, 2, 3, 4, 5, 6]
    torch._dynamo.reset()
    plain = [OneExpertOnly() for _ in range(6)]
    moec.declare(plain[5], name="the sixth")
    with pytest.raises(DeclarationError, match="the sixth"):
        compiled(Stack(*plain))(tokens())


def test_nested() -> None:
    """The innermost declaration that says something counts; one rewritten site keeps both promises."""
    inner = moec.declare(good(), granularity=4)
    outer = moec.declare(nn.Sequential(nn.Linear(D, D), inner), granularity=32, name="block")
    (site,) = moec.explain(outer, tokens()).sites
    assert (site.granularity, site.declared, len(site.within)) == (4, type(inner).__name__, 2)
    torch.testing.assert_close(compiled(nn.Sequential(outer))(tokens()), outer(tokens()))


def test_copies_carry_the_promise() -> None:
    layer = moec.declare(good(), granularity=8)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stored, weights_only=False),
    ]
    for other in copies:
        assert other.state_dict().keys() == good().state_dict().keys()
        (site,) = moec.explain(nn.Sequential(other), tokens()).sites
        assert (site.granularity, site.granularity_assumed) == (8, False)
    bad = pickle.loads(pickle.dumps(moec.declare(LastWins(), granularity=8)))
    with pytest.raises(DeclarationError):
        compiled(copy.deepcopy(bad))(tokens())


def test_a_break_before_the_dispatch_breaks_no_promise() -> None:
    """The rest of the forward is another graph, compiled before the call returns."""

    class Talks(Loop):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return super().forward(x)

    layer = moec.declare(Talks(), granularity=8)
    for model in (layer, nn.Sequential(nn.Identity(), layer)):
        torch._dynamo.reset()
        call = compiled(model)
        for _ in range(2):
            torch.testing.assert_close(call(tokens()), model(tokens()))
        site = last_sites()[-1]
        assert (site.status, site.granularity, site.granularity_assumed) == ("rewritten", 8, False)


def test_checkpoint_and_training() -> None:
    layer = moec.declare(good(), granularity=8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    model = Model()
    got = layers.run(compiled(model), model, tokens())
    want = layers.run(model, model, tokens())
    torch.testing.assert_close(got.logits, want.logits)
    assert all(torch.allclose(got.grads[n], g, atol=1e-5) for n, g in want.grads.items() if g is not None)
    assert [s.granularity for s in moec.explain(model, tokens()).sites] == [8]
    torch._dynamo.reset()
    model.layer = moec.declare(LastWins(), granularity=8)
    with pytest.raises(DeclarationError):
        compiled(model)(tokens())


def test_a_real_decoder() -> None:
    model = hf.build("qwen3_moe")
    inputs = hf.example_inputs(model)
    moec.declare(model.model.layers[1].mlp, granularity=8)
    with torch.no_grad():
        eager = model(**inputs).logits
        report = moec.explain(model, **inputs)
        torch.testing.assert_close(compiled(model)(**inputs).logits, eager)
    assert [(s.granularity, s.granularity_assumed) for s in report.sites] == [
        (pytest.approx(160 / 24), True),
        (8, False),
    ]
    assert ["*" in line for line in str(report).splitlines()[2:4]] == [True, False]


def test_layers_of_moec_need_no_declaration() -> None:
    layer = moec.nn.MoE(d_model=D, d_ff=4 * D, expansion=2, granularity=4)
    model = nn.Sequential(good(), layer, good(1))
    report = moec.explain(model, tokens())
    assert [s.idiom == "moec.nn.MoE" for s in report.sites] == [False, True, False], "in the order in which they run"
    site = report.sites[1]
    assert (site.status, site.num_experts, site.top_k, site.d_model, site.d_expert) == ("rewritten", 8, 4, D, D)
    assert (site.granularity, site.granularity_assumed) == (4, False)
    assert site.strategy
    assert Path(site.location.rpartition(":")[0]).name == Path(__file__).name
    assert not any("declared" in str(n.target) for g in report.graphs for n in layers.all_nodes(g))
    torch.testing.assert_close(compiled(model)(tokens()), model(tokens()))
    torch.testing.assert_close(compiled(moec.declare(nn.Sequential(layer)))(tokens()), layer(tokens()))


# -- not kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_not_kept(kind: type[nn.Module], inside: bool) -> None:
    bad = moec.declare(kind(), granularity=8)
    model = nn.Sequential(nn.Linear(D, D), bad) if inside else bad
    x = tokens()
    for _ in range(2):  # not only the first time
        with pytest.raises(DeclarationError, match=BAD[kind]) as error:
            compiled(model)(x)
        assert isinstance(error.value, MoecError)
        assert f"{kind.__name__} was declared to hold experts ({__file__}:" in str(error.value)
        assert "on_refusal" in str(error.value)
        assert "moec.disable" in str(error.value)
    want = model(x)
    torch.testing.assert_close(compiled(model, disable=True)(x), want)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), want)
    torch.testing.assert_close(model(x), want)
    report = moec.explain(model, x)
    (told,) = report.broken_promises
    assert f"promise not kept: {told.splitlines()[0]}" in str(report)


def test_warning_instead() -> None:
    bad = moec.declare(LastWins(), granularity=8, on_refusal="warn")
    model, x = nn.Sequential(bad), tokens()
    call = compiled(model)
    with pytest.warns(DeclarationWarning, match="LastWins was declared to hold experts"):
        torch.testing.assert_close(call(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeclarationWarning)
        call(x)
        call(tokens(5))  # traced again; told once
    report = moec.explain(model, x)
    (site,) = report.sites
    assert (site.status, site.declared, site.granularity) == ("refused", "LastWins", 8)
    assert "refused in LastWins, declared to hold experts: expert ids" in str(report)
    assert "promise not kept: LastWins" in str(report)
    torch._dynamo.reset()  # a promise is read while compiling
    moec.declare(bad, granularity=8)
    with pytest.raises(DeclarationError):
        compiled(nn.Sequential(bad))(x)


def test_one_of_two() -> None:
    """The good one does not answer for the bad one, nor the other way round."""
    fine, bad = moec.declare(good(), granularity=8), moec.declare(LastWins(), granularity=8)
    for model in (nn.Sequential(fine, bad), nn.Sequential(bad, fine)):
        torch._dynamo.reset()
        with pytest.raises(DeclarationError, match="LastWins was declared"):
            compiled(model)(tokens())
    torch._dynamo.reset()
    moec.declare(bad, on_refusal="warn")
    with pytest.warns(DeclarationWarning):
        compiled(nn.Sequential(fine, bad))(tokens())


def test_whole_graph_wanted() -> None:
    """fullgraph compiles every frame that Dynamo sees; the hooks must not be among them."""
    for model in (moec.declare(LastWins()), nn.Sequential(moec.declare(LastWins()))):
        torch._dynamo.reset()
        with pytest.raises(DeclarationError, match="LastWins"):
            torch.compile(model, backend="moec", fullgraph=True, options=EAGER)(tokens())


def test_a_part_compiled_on_its_own() -> None:
    bad = moec.declare(LastWins())
    model = nn.Sequential(nn.Linear(D, D), bad)
    bad.compile(backend="moec", options=EAGER)
    with pytest.raises(DeclarationError):
        model(tokens())
    moec.declare(fine := good(), granularity=8)
    fine.compile(backend="moec", options=EAGER)
    torch.testing.assert_close(nn.Sequential(fine)(tokens()), copy.deepcopy(fine)._call_impl(tokens()))


def test_switched_off_by_the_user() -> None:
    layer = moec.declare(good(), granularity=8)
    call = compiled(layer, disable="static_where.py")
    torch.testing.assert_close(call(tokens()), layer(tokens()))
    assert last_sites()[-1].idiom == "switched off"


def test_another_shape_is_judged_again() -> None:
    class Either(Loop):
        def add(self, out: Tensor, token: Tensor, y: Tensor) -> None:
            if out.shape[0] < 10:
                out[token] = y
            else:
                out.index_add_(0, token, y)

    for model in (moec.declare(Either()), nn.Sequential(moec.declare(Either()))):
        torch._dynamo.reset()
        call = torch.compile(model, backend="moec", dynamic=False, options=EAGER)
        call(tokens(17))
        with pytest.raises(DeclarationError):
            call(tokens(5))
        call(tokens(17))


def test_contradiction() -> None:
    layer = moec.declare(good(), granularity=8, d_ff=4 * D)
    with pytest.raises(
        DeclarationError, match=f"with experts of width {D // 2}.*have width {F}.*granularity=2.66667.*d_ff={8 * F}"
    ):
        compiled(layer)(tokens())
    (told,) = moec.explain(layer, tokens()).broken_promises
    assert f"have width {F}" in told
    moec.declare(layer, granularity=8, d_ff=8 * F)
    torch.testing.assert_close(compiled(layer)(tokens()), layer(tokens()))


def test_a_forward_that_raises() -> None:
    """Its own error comes out, and nothing is left behind (the fixture looks)."""

    class Raises(Loop):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            raise KeyError("mine")

    layer = moec.declare(Raises())
    for model in (layer, nn.Sequential(layer)):
        with pytest.raises(KeyError, match="mine"):
            compiled(model)(tokens())


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (lambda x: x, {}, "takes the nn.Module that holds the experts, not function"),
        (Loop, {}, "declare an instance, not the class"),
        (nn.ReLU(), {}, "ReLU has no parameters, so no experts"),
        (nn.Linear(4, 4), {}, "nothing in Linear looks like experts"),
        (nn.ModuleList([nn.Linear(4, 4)] * 2), {}, "ModuleList is never called; declare the module whose forward"),
        (
            None,
            {"granularity": 3, "d_ff": 16},
            "granularity=3 does not divide d_ff=16: an expert would be 5.33333 wide",
        ),
        (None, {"granularity": 0}, "granularity is a positive number"),
        (None, {"granularity": True}, "granularity is a positive number"),
        (None, {"d_ff": 2.5}, "d_ff is a whole number of at least 1"),
        (None, {"on_refusal": "ignore"}, "on_refusal is one of 'error', 'warn', not 'ignore'"),
    ],
)
def test_what_cannot_be_promised(module: object, arguments: dict[str, object], says: str) -> None:
    target = Loop() if module is None else module
    with pytest.raises(DeclarationError, match=says):
        moec.declare(target, **arguments)
    assert not isinstance(target, nn.Module) or not hasattr(target, promises.ATTRIBUTE)


# -- what is left alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_other_backends(backend: str) -> None:
    """One graph without a trace of us, a broken promise or not."""
    for plain in (OneExpertOnly(), moec.nn.MoE(d_model=D, d_ff=4 * D, expansion=2, granularity=4)):
        module = moec.declare(copy.deepcopy(plain)) if isinstance(plain, Loop) else plain
        for model in (module, nn.Sequential(module)):
            torch._dynamo.reset()
            call = torch.compile(model, backend=backend, fullgraph=True)
            torch.testing.assert_close(call(tokens()), plain(tokens()))


def test_graphs_of_other_backends() -> None:
    graphs = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append([str(n.target) for n in gm.graph.nodes if n.op not in ("placeholder", "output")])
        return gm

    plain = OneExpertOnly()
    for model in (plain, moec.declare(copy.deepcopy(plain)), moec.nn.MoE(D, 4 * D, 2, 4)):
        torch._dynamo.reset()
        torch.compile(nn.Sequential(model), backend=keep, fullgraph=True)(tokens())
    assert graphs[0] == graphs[1]
    assert not any("declared" in target for target in graphs[2])


def test_eager_and_export() -> None:
    layer = good(idiom="one_hot")
    other = moec.declare(copy.deepcopy(layer), granularity=8)
    assert other.state_dict().keys() == layer.state_dict().keys()
    assert list(dict(other.named_modules())) == list(dict(layer.named_modules()))
    torch.testing.assert_close(other(tokens()), layer(tokens()))
    for strict in (False, True):
        program = torch.export.export(other, (tokens(),), strict=strict)
        torch.testing.assert_close(program.module()(tokens()), layer(tokens()))
        assert not any("moec" in str(n.target) for n in program.graph.nodes)


def test_a_second_promise_replaces_the_first() -> None:
    layer = moec.declare(good(), granularity=8)
    assert moec.declare(layer, granularity=4) is layer
    assert (len(layer._forward_hooks), len(layer._forward_pre_hooks)) == (1, 1)
    assert moec.explain(layer, tokens()).sites[0].granularity == 4


def test_marker_of_a_layer_written_in_ops() -> None:
    """`declared` is nothing at run time, and takes its arguments by name as well."""

    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            declared("mine.py:3", "mine", E, None, d_model=D, d_expert=F, granularity=2.0)
            return x + 1

    (site,) = moec.explain(Mine(), tokens()).sites
    assert (site.location, site.declared, site.num_experts, site.top_k) == ("mine.py:3", "mine", E, None)
    assert (site.d_model, site.d_expert, site.granularity, site.strategy) == (D, F, 2, None)
    results: list[moec.pipeline.Result] = []
    torch.compile(Mine(), backend=Backend({**EAGER, "moec.disable": True}, results))(tokens())
    (result,) = results
    assert not result.sites
    assert not any("declared" in str(n.target) for n in result.gm.graph.nodes)
