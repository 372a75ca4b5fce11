"""Separate parameters that cross the inner compiler as one tensor: gradients, life times, writes, and what is left alone.

Shape letters: T tokens, K top-k, E experts, D model width, F expert width.
"""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import moec
from moec import pipeline, schedule
from moec.ops import bundles
from moec.ops.bundles import Bundle
from moec.passes import bundle as bundle_pass

T, K, E, D, F = 11, 2, 16, 12, 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every body that is known becomes one op, whatever kernels this machine has."""
    monkeypatch.setattr(schedule, "in_one", lambda problem: problem.gating is not None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((D, F), (D, F), (F, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, E, bias=False), nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out


def layer(seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    return MoE().double()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bundle_pass.Bundled | None]:
    """What the pass returned, call by call."""
    found: list[bundle_pass.Bundled | None] = []
    original = bundle_pass.bundle

    def record(*args: object) -> bundle_pass.Bundled | None:
        found.append(original(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr("moec.backend.bundle", record)
    return found


def compiled(model: nn.Module, inner: str = "aot_eager") -> nn.Module:
    return torch.compile(model, backend="moec", options={"moec.inner": inner})  # type: ignore[return-value]


def run(model: nn.Module, of: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output and every gradient, zeros where there is none."""
    of.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out**2).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in of.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def agree(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, e in expected.items():
        torch.testing.assert_close(got[name], e, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_values_and_gradients(inner: str, seen: list[bundle_pass.Bundled | None]) -> None:
    model = layer()
    fast = compiled(model, inner)
    for seed in (0, 1):
        x = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        agree(run(fast, model, x), run(model, model, x))
    (found,) = seen
    assert found is not None
    inputs = [n for n in found.gm.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == 2 + 1 + 3  # x, the router, the key, gate, up and down
    assert len(found.layers[0]) == 3
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_state_stays_the_users() -> None:
    model = layer()
    fast, x = compiled(model), torch.randn(T, D, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), 0.1)
    for _ in range(3):  # each step writes every parameter
        for m, call, opt in ((model, fast, optimizer), (twin, twin, twin_optimizer)):
            opt.zero_grad()
            (call(x) ** 2).sum().backward()
            for p in m.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            opt.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        model.experts[3].up.weight.data = torch.randn(F, D, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x))
        model.experts[4].up.weight = nn.Parameter(torch.randn(F, D, dtype=torch.float64))
        torch.testing.assert_close(fast(x), model(x))


def test_gradients_accumulate_and_can_be_asked_for_alone() -> None:
    model = layer()
    fast, x = compiled(model), torch.randn(T, D, dtype=torch.float64)
    for call in (fast, model):
        model.zero_grad()
        for _ in range(2):
            call(x).sum().backward()
        grad = model.experts[0].up.weight.grad
        total = torch.zeros(F, D) if grad is None else grad.clone()
        (alone,) = torch.autograd.grad(call(x).sum(), [model.experts[0].up.weight], allow_unused=True)
        if call is fast:
            first = total, alone
    torch.testing.assert_close(first[0], total)
    torch.testing.assert_close(first[1], alone)


def test_hooks_on_parameters_run() -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    fast = compiled(model)
    called = []
    for e in range(E):
        model.experts[e].down.weight.register_post_accumulate_grad_hook(lambda p, e=e: called.append(e))
    fast(x).sum().backward()
    assert sorted(called) == list(range(E))


def test_a_write_between_forward_and_backward_raises_as_in_eager() -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    for call in (model, compiled(model)):
        out = call(x).sum()
        with torch.no_grad():
            for expert in model.experts:  # type: ignore[union-attr]
                expert.down.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_two_forwards_with_a_write_between_them() -> None:
    """The first backward must not take the second forward's parameters for its own."""
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    fast = compiled(model)
    first = fast(x).sum()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    second = fast(x).sum()
    second.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
    model.zero_grad()
    model(x).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_saved_tensors_may_be_packed() -> None:
    """What is kept for the backward may be copied, moved and brought back: the key is found by its value."""
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    expected = run(model, model, x)
    fast = compiled(model, "eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        agree(run(fast, model, x), expected)


def test_inside_inference_mode_and_checkpoint() -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    fast = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    expected = run(model, model, x)
    recomputed = nn.Module()
    recomputed.forward = lambda x: torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)  # type: ignore[assignment]
    agree(run(recomputed, model, x), expected)


def test_some_frozen_experts_stay_separate(seen: list[bundle_pass.Bundled | None]) -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    model.experts[5].requires_grad_(False)
    got = run(compiled(model), model, x)
    agree(got, run(model, model, x))
    assert seen == [None]
    assert model.experts[5].up.weight.grad is None


def test_all_frozen_experts_in_a_bundle(seen: list[bundle_pass.Bundled | None]) -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    model.experts.requires_grad_(False)
    agree(run(compiled(model), model, x), run(model, model, x))
    assert seen[0] is not None
    assert all(p.grad is None for p in model.experts.parameters())


def test_parameters_that_the_graph_reads_elsewhere_stay(seen: list[bundle_pass.Bundled | None]) -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x) + self.moe.experts[2].up.weight.square().mean()

    model, x = Penalized(), torch.randn(T, D, dtype=torch.float64)
    agree(run(compiled(model), model, x), run(model, model, x))
    assert seen == [None]


def test_parameters_that_share_memory_with_another_input_stay(seen: list[bundle_pass.Bundled | None]) -> None:
    """The graph writes that memory through a buffer: what the experts read would not be what eager reads."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layer()
            weight = self.moe.experts[1].up.weight
            self.register_buffer("alias", weight.detach())

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.alias.mul_(2)
            return self.moe(x)

    with torch.no_grad():
        model, x = Flat(), torch.randn(T, D, dtype=torch.float64)
        twin = copy.deepcopy(model)
        twin.alias = twin.moe.experts[1].up.weight.detach()
        torch.testing.assert_close(compiled(model)(x), twin(x))
    assert not any(seen)


def test_entries_go_with_their_bundle() -> None:
    torch._dynamo.reset()
    gc.collect()
    before = len(bundles._entries)
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    bundle = Bundle()
    key, (stood,) = bundle.tie([parameters], grad=True)
    assert int(key) == int(bundle.tie([parameters], grad=True)[0])
    assert bundles.resolve(key, unwritten=True) == [parameters]
    assert stood.shape == (4, 3, 2)
    assert stood.untyped_storage().nbytes() == 4
    with torch.no_grad():
        parameters[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        bundles.resolve(key, unwritten=True)
    assert int(bundle.tie([parameters], grad=True)[0]) != int(key)
    stood.backward(torch.arange(24.0).view(4, 3, 2))
    assert torch.equal(parameters[2].grad, torch.arange(12.0, 18.0).view(3, 2))  # type: ignore[arg-type]
    number = key.clone()
    del bundle, stood, key
    gc.collect()
    assert len(bundles._entries) == before
    with pytest.raises(RuntimeError, match="is gone"):
        bundles.resolve(number, unwritten=False)


def test_no_parameter_is_kept_alive() -> None:
    import weakref

    model = layer()
    fast, x = compiled(model), torch.randn(T, D, dtype=torch.float64)
    fast(x).sum().backward()
    dead = weakref.ref(model.experts[0].up.weight)
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert dead() is None


def test_a_second_call_while_a_backward_waits() -> None:
    model = layer()
    fast = compiled(model)
    xs = [torch.randn(t, D, dtype=torch.float64) for t in (5, 9, 9)]
    outs = [fast(x).sum() for x in xs]
    torch.stack(outs).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.stack([model(x).sum() for x in xs]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reports_graphs_show_the_parameters() -> None:
    model, x = layer(), torch.randn(T, D, dtype=torch.float64)
    report = moec.explain(model, x)
    (site,) = report.sites
    assert site.status == "rewritten"
    assert site.after is not None
    assert sum(n.op == "placeholder" for n in site.after.graph.nodes) >= 3 * E
    assert pipeline.schedule.in_one is schedule.in_one


def test_threads_with_two_models_of_one_class() -> None:
    """They share compiled code, and so the bundle: neither may compute with the other's parameters."""
    models = [layer(seed) for seed in (0, 1)]
    fast = [compiled(m) for m in models]
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.no_grad():
        expected = [m(x) for m in models]
        for f, e in zip(fast, expected):
            torch.testing.assert_close(f(x), e)
    wrong: list[object] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                try:
                    if not torch.allclose(fast[i](x), expected[i]):
                        wrong.append(i)
                except Exception as fault:
                    wrong.append(fault)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_frozen_experts_while_a_backward_waits() -> None:
    """Nothing is differentiated but x: the graph alone keeps the parameters that its backward reads."""
    models = [layer(seed) for seed in (0, 1)]
    for m in models:
        m.experts.requires_grad_(False)
    fast = [compiled(m) for m in models]
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(models[0](x).sum(), x)
    out = fast[0](x).sum()
    fast[1](x)
    models[0].experts[0].up.weight = nn.Parameter(torch.zeros(F, D, dtype=torch.float64), requires_grad=False)
    gc.collect()
    (got,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(got, expected)


def test_parameters_made_for_one_call() -> None:
    model = layer()
    fast, x = compiled(model), torch.randn(T, D, dtype=torch.float64)
    for call in (fast, model):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        out = torch.func.functional_call(call, {_name(n, call, model): 1.5 * p for n, p in leaves.items()}, (x,))
        gc.collect()
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves.values())]
        if call is fast:
            got = found
    for g, e in zip(got, found):
        torch.testing.assert_close(g, e)


def _name(name: str, call: nn.Module, model: nn.Module) -> str:
    return name if call is model else f"_orig_mod.{name}"


def test_two_layers_that_share_parameters_of_which_one_is_small(
    seen: list[bundle_pass.Bundled | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays as it is must find its parameters in the graph."""
    monkeypatch.setattr(bundle_pass, "FEWEST", 3 * E)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layer()
            self.router = nn.Linear(D, E, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.moe(x)
            weights, ids = self.router(x).softmax(-1).topk(K, -1)
            out = torch.zeros_like(x)
            for e in range(E):
                token, choice = torch.where(ids == e)
                expert = self.moe.experts[e]
                y = expert.down(nn.functional.silu(expert.up(x[token])))  # two matrices, not three
                out.index_add_(0, token, y * weights[token, choice, None])
            return out

    model, x = Shared(), torch.randn(T, D, dtype=torch.float64)
    agree(run(compiled(model), model, x), run(model, model, x))
    assert seen == [None]
