"""The model stays the user's: names, identity, optimizers, saving, in-place writes and hooks behave as in eager."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F_
from torch.nn.utils import parametrize

from moec.models import Decoder

from . import hf, layers
from .layers import AOT, D, E, F, K

IDIOMS = ("static_where", "hit_stacked")  # separate and stacked weights
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def compiled(layer: nn.Module, inner: str = "eager") -> Callable[..., Tensor]:
    """AOTAutograd where it takes part in what is tested: gradients, saved tensors, optimizers."""
    return torch.compile(layer, backend="moec", options={"moec.inner": inner, "moec.strict": True})


def assert_runs_alike(call: Callable[[Tensor], Tensor], layer: nn.Module, count: int = 17) -> None:
    """`call` against `layer` in float64; an expert without tokens has zeros where eager may have None."""
    x = layers.tokens(count)
    got, want = layers.run(call, layer, x), layers.run(layer, layer, x)
    torch.testing.assert_close(got.logits, want.logits, **TIGHT)
    for name, grad in want.grads.items():
        ours = got.grads[name]
        if grad is None or ours is None:
            assert ours is None or not bool(ours.any()), name
            assert grad is None, name
        else:
            torch.testing.assert_close(ours, grad, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("idiom", IDIOMS)
def test_names_identity_and_storage(idiom: str) -> None:
    layer = layers.build(idiom, body="gelu")
    keys = list(layer.state_dict())
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in layer.named_parameters()}
    call = compiled(layer, "aot_eager")
    layers.run(call, layer, layers.tokens(17))
    assert list(layer.state_dict()) == keys
    assert list(call.state_dict()) == [
        f"_orig_mod.{key}" for key in keys
    ]  # torch's own wrapper, the same for every backend
    for name, p in layer.named_parameters():
        old, pointer, stride = before[name]
        assert p is old, name
        assert (type(p), p.is_leaf, p.data_ptr(), p.stride()) == (nn.Parameter, True, pointer, stride), name


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(idiom: str, assign: bool) -> None:
    layer = layers.build(idiom)
    call = compiled(layer)
    assert_runs_alike(call, layer)
    layer.load_state_dict(layers.build(idiom, seed=3).state_dict(), assign=assign)
    assert_runs_alike(call, layer)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_adamw(idiom: str) -> None:
    """Three steps, with weight decay, beside an eager copy. Every expert has tokens, so None and zeros do not differ."""
    ours = layers.build(idiom)
    theirs = copy.deepcopy(ours)
    results = []
    for layer, call in ((ours, compiled(ours, "aot_eager")), (theirs, theirs)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(3):
            loss = (call(layers.tokens(64, seed=step)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in layer.parameters())
            optimizer.step()
        results.append(layer.state_dict())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_deepcopy(idiom: str) -> None:
    layer = layers.build(idiom)
    call = compiled(layer)
    assert_runs_alike(call, layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert_runs_alike(compiled(twin), twin)
    assert_runs_alike(call, layer)
    wrapped = copy.deepcopy(call)  # torch.compile's wrapper and all
    assert wrapped._orig_mod is not layer
    with torch.no_grad():
        for p in wrapped.parameters():
            p.mul_(0.5)
    assert_runs_alike(wrapped, wrapped._orig_mod)
    assert_runs_alike(call, layer)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_torch_save(idiom: str) -> None:
    layer = layers.build(idiom)
    call = compiled(layer)
    assert_runs_alike(call, layer)
    for weights_only, thing in ((True, layer.state_dict()), (False, layer)):
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=weights_only)
        again = loaded if isinstance(loaded, nn.Module) else layers.build(idiom, seed=9)
        if again is not loaded:
            again.load_state_dict(loaded)
        assert_runs_alike(compiled(again), again)
        torch.testing.assert_close(again(layers.tokens(5)), layer(layers.tokens(5)))


def test_save_pretrained(tmp_path: Path) -> None:
    model = hf.build("mixtral")
    inputs = hf.example_inputs(model)
    call = torch.compile(model, backend="moec", options={**AOT, "moec.strict": True})
    want = call(**inputs).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    assert list(again.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(again(**inputs).logits, want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(again, backend="moec", options=AOT)(**inputs).logits, want)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_gradient_accumulation(idiom: str) -> None:
    layer = layers.build(idiom)
    call = compiled(layer, "aot_eager")
    grads = []
    for run in (call, layer):
        layer.zero_grad()
        for seed in range(2):
            run(layers.tokens(64, seed=seed)).square().sum().backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_retain_graph(idiom: str) -> None:
    """The same graph backward twice: nothing that is saved may be overwritten."""
    layer = layers.build(idiom)
    out = compiled(layer, "aot_eager")(layers.tokens(64)).square().sum()
    parameters = list(layer.parameters())
    first = torch.autograd.grad(out, parameters, retain_graph=True)
    second = torch.autograd.grad(out, parameters)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("grads_on", [False, True])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_writes_are_seen(idiom: str, grads_on: bool) -> None:
    """`.data`, in-place under no_grad, a row of a stack, and storage swapped: each seen by the next call."""
    layer = layers.build(idiom)
    call = compiled(layer)
    x = layers.tokens(17)

    def agree() -> None:
        with torch.set_grad_enabled(grads_on):
            torch.testing.assert_close(call(x), layer(x), **TIGHT)

    agree()
    weight = next(p for name, p in layer.named_parameters() if "down_proj" in name)
    before = layer(x).detach()
    weight.data.mul_(2)
    agree()
    with torch.no_grad():
        weight.add_(0.25)
        weight[0].zero_()
    agree()
    weight.data = torch.randn_like(weight)
    agree()
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_replaced_parameters(idiom: str) -> None:
    layer = layers.build(idiom)
    call = compiled(layer)
    assert_runs_alike(call, layer)
    owner = layer.experts if idiom == "hit_stacked" else layer.experts[3].down_proj
    name = "down_proj" if idiom == "hit_stacked" else "weight"
    setattr(owner, name, nn.Parameter(torch.randn_like(getattr(owner, name))))
    assert_runs_alike(call, layer)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_to_another_dtype(idiom: str) -> None:
    layer = layers.build(idiom, torch.float32)
    call = compiled(layer)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer.to(dtype)
        x = layers.tokens(17, dtype)
        worst = layers.judge(layers.run(call, layer, x), layer, x)
        assert worst.ratio <= 1, (dtype, worst)


# -- Which gradients there are -----------------------------------------------------------------------------------------------


def frozen_choices(layer: nn.Module) -> dict[str, Callable[[str], bool]]:
    return {
        "all experts": lambda name: "experts." in name,
        "one expert": lambda name: name.startswith("experts.3."),
        "up projections": lambda name: "up_proj" in name,
        "the router": lambda name: name.startswith("router"),
    }


@pytest.mark.parametrize("which", ["all experts", "one expert", "up projections", "the router"])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_frozen_parameters_keep_none(idiom: str, which: str) -> None:
    layer = layers.build(idiom)
    frozen = frozen_choices(layer)[which]
    for name, p in layer.named_parameters():
        p.requires_grad_(not frozen(name))
    x = layers.tokens(64)
    got, want = layers.run(compiled(layer, "aot_eager"), layer, x), layers.run(layer, layer, x)
    assert {name for name, g in got.grads.items() if g is None} == {name for name, g in want.grads.items() if g is None}
    for name, grad in want.grads.items():
        if grad is not None:
            torch.testing.assert_close(got.grads[name], grad, **TIGHT)


def test_thawing_is_seen() -> None:
    layer = layers.build("static_where")
    layer.experts.requires_grad_(False)
    call = compiled(layer, "aot_eager")
    x = layers.tokens(64)
    assert layers.run(call, layer, x).grads["experts.3.up_proj.weight"] is None
    layer.experts.requires_grad_(True)
    assert_runs_alike(call, layer, 64)


class Extra(nn.Module):
    """A layer with parameters that no forward touches, one of them inside an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layers.build("static_where")
        self.layer.experts[2].register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        self.spare = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_parameters_that_never_take_part_keep_none() -> None:
    model = Extra()
    got = layers.run(compiled(model, "aot_eager"), model, layers.tokens(64))
    missing = {name for name, grad in got.grads.items() if grad is None}
    assert missing == {"layer.experts.2.unused", "spare.weight", "spare.bias"}


@pytest.mark.parametrize("idiom", ["skip_empty", "hit_modules", "sort_tolist", "static_where"])
def test_an_expert_without_tokens_gets_zeros(idiom: str) -> None:
    """The one difference that is allowed."""
    layer = layers.prefer(layers.build(idiom), (0, 1))
    x = layers.tokens(17)
    got, want = layers.run(compiled(layer, "aot_eager"), layer, x), layers.run(layer, layer, x)
    name = "experts.5.up_proj.weight"
    assert (want.grads[name] is None) == (idiom in layers.SKIPS)
    assert got.grads[name] is not None
    assert not bool(got.grads[name].any())


def test_only_x_requires_grad() -> None:
    layer = layers.build("one_hot").requires_grad_(False)
    x = layers.tokens(17)
    got, want = layers.run(compiled(layer, "aot_eager"), layer, x), layers.run(layer, layer, x)
    torch.testing.assert_close(got.grads["x"], want.grads["x"], **TIGHT)
    assert {name for name, grad in got.grads.items() if grad is not None} == {"x"}


# -- Hooks, modes, and what else people do to modules ------------------------------------------------------------------------


def agree_with_eager(layer: nn.Module) -> None:
    """Rewritten or refused, the result is eager's."""
    call = torch.compile(layer, backend="moec", options=AOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a frame that breaks says so
        assert_runs_alike(call, layer)


def test_forward_hook_on_an_expert() -> None:
    layer = layers.build("static_where")
    seen: list[int] = []
    layer.experts[3].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    x = layers.tokens(17)
    want = layer(x)
    expected, seen[:] = list(seen), []
    got = torch.compile(layer, backend="moec", options=AOT)(x)
    torch.testing.assert_close(got, want, **TIGHT)
    assert seen == expected


def test_forward_hook_that_changes_one_expert() -> None:
    """The bodies are not equal any more."""
    layer = layers.build("static_where")
    layer.experts[3].register_forward_hook(lambda module, args, out: out * 2)
    agree_with_eager(layer)


def test_forward_hook_on_every_expert() -> None:
    layer = layers.build("static_where")
    for expert in layer.experts:
        expert.register_forward_hook(lambda module, args, out: out * 2)
    agree_with_eager(layer)


def test_forward_hook_added_after_compiling() -> None:
    """Seen or not (Dynamo does not guard on the hooks of inner modules), as with another backend that gets the whole graph."""
    outs = {}
    for backend in ("moec", "eager"):
        torch._dynamo.reset()
        layer = layers.build("static_where")
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            call = torch.compile(layer, backend=backend, fullgraph=True, options=AOT if backend == "moec" else None)
            call(layers.tokens(17))
            layer.experts[3].register_forward_hook(lambda module, args, out: out * 2)
            outs[backend] = call(layers.tokens(17))
    torch.testing.assert_close(outs["moec"], outs["eager"], **TIGHT)


def test_backward_hooks_on_parameters() -> None:
    layer = layers.build("hit_stacked")
    fired: list[str] = []
    for name, p in layer.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    layers.run(compiled(layer, "aot_eager"), layer, layers.tokens(64))
    assert sorted(fired) == sorted(name for name, _ in layer.named_parameters())


class WithDropout(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.layer, self.dropout = layers.build("static_where"), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x))


def test_train_and_eval() -> None:
    model = WithDropout()
    call = compiled(model)
    x = layers.tokens(17)
    model.eval()
    torch.testing.assert_close(call(x), model(x), **TIGHT)
    model.train()
    assert 0.2 < float((call(x) == 0).double().mean()) < 0.8
    model.eval()
    torch.testing.assert_close(call(x), model(x), **TIGHT)


def test_tied_experts() -> None:
    """Two experts are one module: its gradient is the sum."""
    layer = layers.build("static_where")
    layer.experts[5] = layer.experts[2]
    agree_with_eager(layer)


def test_parametrized_expert() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = layers.build("static_where")
    for expert in layer.experts:
        parametrize.register_parametrization(expert.up_proj, "weight", Double())
    agree_with_eager(layer)


def test_compile_in_place() -> None:
    """`module.compile(backend=...)` and a compiled layer inside an eager model."""
    torch.manual_seed(0)
    model = Decoder(32, D, 2, [layers.build("static_where", torch.float32) for _ in range(2)])
    ids = torch.randint(32, (2, 9))
    want = model(ids)
    keys = list(model.state_dict())
    for layer in model.layers:
        layer.moe.compile(backend="moec", options={**AOT, "moec.strict": True})
    torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys


def test_decoder_trains_beside_eager() -> None:
    torch.manual_seed(0)
    ours = Decoder(
        32, D, 2, [layers.build("hit_modules", num_experts=E, top_k=K, d_expert=F) for _ in range(2)]
    ).double()
    theirs = copy.deepcopy(ours)
    ids = torch.randint(32, (2, 33))
    losses = []
    for model, call in ((ours, compiled(ours)), (theirs, theirs)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # for which a zero gradient and none are the same
        for _ in range(3):
            loss = F_.cross_entropy(call(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-10)
    assert losses[2] < losses[0]
