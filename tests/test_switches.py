"""The switches: entry point, inner backends, disable, strict, options and modes; and others' functions called from inside."""

import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moec.pipeline
from moec import capture
from moec.errors import OptionError, StrictError

from . import layers
from .layers import AOT, D, E, F, K

EAGER = {"moec.inner": "eager"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Places where an assumption was taken back are remembered by their location, and these tests share theirs."""
    capture.forget_denied()
    yield
    capture.forget_denied()


def agree(call: object, layer: nn.Module, x: Tensor) -> None:
    got, want = layers.run(call, layer, x), layers.run(layer, layer, x)
    torch.testing.assert_close(got.logits, want.logits)
    for name, grad in want.grads.items():
        if grad is not None:
            torch.testing.assert_close(got.grads[name], grad, msg=lambda m, name=name: f"{name}: {m}")


def python(code: str, cwd: Path, **env: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPT = """
import sys, torch
from torch import nn

class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x):
        weights, ids = torch.topk(self.router(x).softmax(-1), 2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out

torch.manual_seed(0)
m, x = MoE(), torch.randn(17, 8)
assert "moec" not in sys.modules
got = torch.compile(m, backend="moec", fullgraph=True)(x)
torch.testing.assert_close(got, m(x))
from moec.report import last_sites
print([s.status for s in last_sites()])
"""


def test_entry_point_in_a_fresh_process(tmp_path: Path) -> None:
    """moec is not imported by the user; real Inductor behind."""
    assert python(SCRIPT, tmp_path).strip() == "['rewritten']"


def test_environment_disables_in_a_fresh_process(tmp_path: Path) -> None:
    script = SCRIPT.replace(", fullgraph=True)", ', options={"moec.inner": "eager"})')
    assert script != SCRIPT
    assert "rewritten" not in python(script, tmp_path, MOEC_DISABLE="1")


def test_it_is_listed() -> None:
    assert "moec" in torch._dynamo.list_backends()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner(inner: str) -> None:
    layer = layers.build("hit_stacked", torch.float32)
    call = torch.compile(layer, backend="moec", options={"moec.inner": inner, "moec.strict": True})
    agree(call, layer, layers.tokens(17, torch.float32))


def test_inner_may_be_any_registered_backend() -> None:
    calls = []

    def mine(gm: torch.fx.GraphModule, example_inputs: list[Tensor], **kwargs: object) -> object:
        calls.append((gm, kwargs))
        return gm.forward

    torch._dynamo.register_backend(compiler_fn=mine, name="moec_test_mine")
    try:
        layer = layers.build("static_where")
        options = {"moec.inner": "moec_test_mine", "theirs": 3}
        agree(torch.compile(layer, backend="moec", options=options), layer, layers.tokens(17))
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("moec_test_mine")
    ((gm, kwargs),) = calls
    assert kwargs == {"options": {"theirs": 3}}
    assert any("moec." in str(n.target) for n in gm.graph.nodes)


# -- disable -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idiom", ["static_where", "hit_stacked", "skip_empty", "sort_tolist"])
def test_disable_all(idiom: str) -> None:
    """As plain torch.compile: a loop that needs an assumption breaks as it does there."""
    layer = layers.build(idiom)
    backend, results = layers.kept({**EAGER, "moec.disable": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(torch.compile(layer, backend=backend), layer, layers.tokens(17))
    assert "rewritten" not in layers.statuses(results)
    assert not any("moec" in str(n.target) for r in results for n in r.gm.graph.nodes)


def test_disable_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, expected in (("1", []), ("0", ["rewritten"]), ("static_where.py", ["refused"])):
        torch._dynamo.reset()
        monkeypatch.setenv("MOEC_DISABLE", flag)
        layer = layers.build("static_where")
        backend, results = layers.kept(EAGER)
        agree(torch.compile(layer, backend=backend), layer, layers.tokens(17))
        assert [s.split(":")[0] for s in layers.statuses(results)] == expected, flag


class Two(nn.Module):
    """Two idioms in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.build("static_where"), layers.build("one_hot", seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(x + self.first(x))


def test_disable_one_site() -> None:
    model = Two()
    x = layers.tokens(17)
    backend, results = layers.kept(EAGER)
    torch.compile(model, backend=backend)(x)
    places = [site.location for r in results for site in r.sites]
    assert len(places) == 2
    for part in (next(p for p in places if "one_hot.py" in p), "one_hot.py", "nobody.py:3, one_hot.py"):
        torch._dynamo.reset()
        backend, results = layers.kept({**EAGER, "moec.disable": part})
        agree(torch.compile(model, backend=backend), model, x)
        (sites,) = (r.sites for r in results)
        assert {(s.status, Path(s.location).name.split(":")[0]) for s in sites} == {
            ("rewritten", "static_where.py"),
            ("refused", "one_hot.py"),
        }
        (refused,) = (s for s in sites if s.status == "refused")
        assert "moec.disable" in refused.reason


def test_disable_one_site_that_needs_an_assumption() -> None:
    model = nn.Sequential(layers.build("static_where"), layers.build("hit_stacked"))
    backend, results = layers.kept({**EAGER, "moec.disable": "hit_stacked.py"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(torch.compile(model, backend=backend), model, layers.tokens(17))
    rewritten = {Path(s.location).name.split(":")[0] for r in results for s in r.sites if s.status == "rewritten"}
    assert rewritten == {"static_where.py"}


# -- strict, faults ----------------------------------------------------------------------------------------------------------


class TwoWidths(nn.Module):
    """A near miss: one expert's activation differs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layers.build("static_where", body="relu2")
        self.layer.experts[3].forward = lambda x, e=self.layer.experts[3]: e.down_proj(torch.tanh(e.up_proj(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def causes(error: BaseException) -> list[type]:
    found: list[type] = []
    seen: BaseException | None = error
    while seen is not None:
        found += [type(seen), *([type(seen.inner_exception)] if hasattr(seen, "inner_exception") else [])]
        seen = seen.__cause__ or seen.__context__
    return found


def test_refused_sites(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoWidths()
    x = layers.tokens(17)
    backend, results = layers.kept(EAGER)
    with caplog.at_level(logging.INFO, "moec"):
        agree(torch.compile(model, backend=backend), model, x)
    (status,) = layers.statuses(results)
    assert status.startswith("refused: ")
    assert re.search(r"\w+\.py:\d+", status), "the reason names the source line"
    assert any("refused" in r.getMessage() for r in caplog.records)
    torch._dynamo.reset()
    with pytest.raises((StrictError, BackendCompilerFailed)) as raised:
        torch.compile(model, backend="moec", options={**EAGER, "moec.strict": True})(x)
    assert StrictError in causes(raised.value)
    assert status.removeprefix("refused: ") in str(raised.value)


def break_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(moec.pipeline, name, broken)


@pytest.mark.parametrize(
    ("name", "idiom"),
    [("detect", "static_where"), ("detect", "hit_stacked"), ("lower", "static_where"), ("lower", "hit_stacked")],
)
def test_internal_fault(
    name: str, idiom: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never the user's problem: logged with how to report it, and the model runs as it would without moec."""
    break_it(monkeypatch, name)
    layer = layers.build(idiom)
    x = layers.tokens(17)
    backend, results = layers.kept(EAGER)
    with caplog.at_level(logging.ERROR, "moec"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(torch.compile(layer, backend=backend), layer, x)
    assert "rewritten" not in layers.statuses(results)
    assert any("report" in r.getMessage() and r.exc_info for r in caplog.records), "with traceback and remedy"
    torch._dynamo.reset()
    capture.forget_denied()
    with pytest.raises(Exception, match="a bug of ours") as raised:
        torch.compile(layer, backend="moec", options={**EAGER, "moec.strict": True})(x)
    assert KeyError in causes(raised.value)


@pytest.mark.parametrize("idiom", ["static_where", "hit_stacked"])
def test_internal_fault_is_in_the_report(idiom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "No MoE dispatch was found" would be a lie."""
    break_it(monkeypatch, "lower")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = moec.explain(layers.build(idiom), layers.tokens(17))
    assert "No MoE dispatch was found" not in str(report)
    assert any(s.status == "refused" and "fault" in s.reason for s in report.sites), report.sites


def test_fault_in_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch, "verify")
    layer = layers.build("static_where")
    backend, results = layers.kept(EAGER)
    agree(torch.compile(layer, backend=backend), layer, layers.tokens(17))
    (site,) = results[0].sites
    assert site.status == "rewritten"
    assert site.verified.startswith("not verified: ")
    assert "a bug of ours" in site.verified


@pytest.mark.parametrize("idiom", ["static_where", "hit_stacked"])
def test_mismatch(idiom: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A lowering that computes something else is found out: the original runs, and the site says that it was this."""
    right = moec.pipeline.lower

    def wrong(graph: torch.fx.Graph, detection: object, whole: object) -> object:
        done = right(graph, detection, whole)
        for node in (n for one in done for n in one.nodes if "relu" in str(n.target)):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.tanh, node.args[:1], {}
        return done

    monkeypatch.setattr(moec.pipeline, "lower", wrong)
    monkeypatch.setattr(moec.pipeline.schedule, "in_one", lambda problem: False)
    layer = layers.build(idiom, body="relu2")
    x = layers.tokens(17)
    backend, results = layers.kept(EAGER)
    with caplog.at_level(logging.ERROR, "moec"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(torch.compile(layer, backend=backend), layer, x)
    assert any("does not agree" in r.getMessage() for r in caplog.records)
    statuses = layers.statuses(results)
    assert any("agree" in s for s in statuses), f"refused for a reason that is not the mismatch: {statuses}"
    torch._dynamo.reset()
    capture.forget_denied()
    with pytest.raises(Exception, match="does not agree") as raised:
        torch.compile(layer, backend="moec", options={**EAGER, "moec.strict": True})(x)
    assert StrictError in causes(raised.value)


@pytest.mark.parametrize("how", ["off", "sample", "full"])
def test_verify(how: str) -> None:
    """Two equal layers: checked not at all, once, or each."""
    checked: list[object] = []
    verify = moec.pipeline.verify
    model = nn.Sequential(layers.build("static_where"), layers.build("static_where", seed=1))
    backend, results = layers.kept({**EAGER, "moec.verify": how})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moec.pipeline, "verify", lambda *args: checked.append(args) or verify(*args))
        torch.compile(model, backend=backend)(layers.tokens(17))
    assert layers.statuses(results) == ["rewritten"] * 2
    assert len(checked) == {"off": 0, "sample": 1, "full": 2}[how]
    expected = None if how == "off" else "values and gradients agree"
    for site in results[0].sites:
        assert (site.verified is None) if expected is None else site.verified.startswith(expected)


# -- options and modes -------------------------------------------------------------------------------------------------------


def compile_with(**kwargs: object) -> None:
    torch.compile(nn.Linear(3, 3), backend="moec", **kwargs)(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moec.stric": True}, r"unknown option 'moec.stric'; the nearest is 'moec.strict'"),
        ({"moec.innner": "eager"}, r"the nearest is 'moec.inner'"),
        ({"moec.": 1}, r"unknown option 'moec.'; the nearest is 'moec\."),
        ({"max_autotun": True}, r"unknown option 'max_autotun'; the nearest is 'max_autotune'"),
        ({"moec_strict": True}, r"unknown option 'moec_strict'; the nearest is 'moec.strict'"),
        ({"triton.cudagraph": True}, r"unknown option 'triton.cudagraph'; the nearest is 'triton.cudagraphs'"),
        ({"moec.verify": "some"}, r"moec.verify is one of 'off', 'sample', 'full', not 'some'"),
        ({"moec.verify": True}, r"moec.verify is one of"),
        ({"moec.verify": ["off"]}, r"moec.verify is one of"),
        ({"moec.strict": "yes"}, r"moec.strict is True or False, not 'yes'"),
        ({"moec.strict": 1}, r"moec.strict is True or False, not 1"),
        ({"moec.disable": 3}, r"moec.disable is True, False or a string of locations, not 3"),
        ({"moec.inner": torch.nn}, r"moec.inner is a string"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises((OptionError, BackendCompilerFailed), match=message) as raised:
        compile_with(options=options)
    assert OptionError in causes(raised.value)


def test_unknown_inner_backend() -> None:
    with pytest.raises(Exception, match="'aot_eagr'"):
        compile_with(options={"moec.inner": "aot_eagr"})


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    layer = layers.build("static_where", torch.float32)
    x = layers.tokens(17, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="moec", mode=mode)(x), layer(x))


def test_unknown_mode() -> None:
    with pytest.raises(Exception, match="unknown mode 'reduce-overhed'; the nearest is 'reduce-overhead'") as raised:
        compile_with(mode="reduce-overhed")
    assert OptionError in causes(raised.value)


def test_options_of_inductor_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as module

    seen: list[dict[str, object]] = []
    original = module.compile_fx

    def spy(*args: object, **kwargs: object) -> object:
        if kwargs.get("config_patches"):  # it calls itself again without
            seen.append(dict(kwargs["config_patches"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", spy)
    layer = layers.build("static_where", torch.float32)
    x = layers.tokens(17, torch.float32)
    options = {"max_autotune": False, "epilogue_fusion": False, "triton.cudagraphs": False, "moec.strict": True}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="moec", options=options)(x), layer(x))
    assert seen == [{"max_autotune": False, "epilogue_fusion": False, "triton.cudagraphs": False}]


def test_dashes_in_option_names() -> None:
    """torch.compile's own Inductor accepts `max-autotune` for `max_autotune`; so do we."""
    compile_with(options={"epilogue-fusion": False})


def test_without_moe() -> None:
    model = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))
    x = torch.randn(5, D)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="moec")(x), model(x))
    report = moec.explain(model, x)
    assert (report.sites, len(report.graphs), report.graph_breaks) == ([], 1, 0)
    assert "No MoE dispatch was found" in str(report)
    model = torch.compile(model, backend="moec", options={**AOT, "moec.strict": True})  # nothing to refuse
    model(x).sum().backward()


def test_near_miss_is_reported() -> None:
    report = moec.explain(TwoWidths(), layers.tokens(17))
    assert [s.status for s in report.sites] == ["refused"]
    text = str(report)
    assert text.startswith("moec: 0 of 1 MoE sites rewritten")
    assert f"refused: {report.sites[0].reason}" in text


# -- others' functions called from inside ------------------------------------------------------------------------------------


def count(hit: Tensor) -> int:
    """Loops over and branches on what is really there: an assumption would change the answer."""
    seen = [int(e) for e in hit.nonzero().flatten()]
    if (hit > 100).any():
        seen.append(100)
    return len(seen)


class CallsOthers(nn.Module):
    def __init__(self, other: object) -> None:
        super().__init__()
        self.layer, self.other = layers.prefer(layers.build("hit_modules"), (0, 1, 6)), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        hit = torch.bincount(self.layer.router(x)[0].flatten(), minlength=E)
        return y * self.other(hit)


@pytest.mark.parametrize("how", ["disable", "eager", "aot_eager", "inductor"])
def test_functions_of_others_called_from_inside(how: str) -> None:
    other = torch.compiler.disable(count if how == "disable" else torch.compile(count, backend=how))
    model = CallsOthers(other)
    plain = CallsOthers(count)
    plain.load_state_dict(model.state_dict())
    backend, results = layers.kept(EAGER)
    for tokens in (17, 64):
        x = layers.tokens(tokens)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), plain(x))
    assert "rewritten" in layers.statuses(results)


def test_a_compiled_submodule_inside() -> None:
    """moec's own layer inside a model of another backend, and the other way around."""
    x = layers.tokens(17)
    inner = layers.build("hit_modules")
    want = nn.Sequential(inner, nn.Tanh())(x)
    got = torch.compile(nn.Sequential(torch.compile(inner, backend="moec", options=AOT), nn.Tanh()), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(got(x), want)
    assert K <= E
