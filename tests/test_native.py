"""The CPU kernels of whole experts against a float64 reference; the composed `moec::` ops are the measure of error.

Shape letters: T tokens, K slots per row, S = T*K slots, E experts, D model width, F expert width.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moec.kernels  # noqa: F401  (registers the ops)
from moec.kernels import native
from moec.kernels.native import build
from moec.ops import experts

ops = torch.ops.moec

needs_library = pytest.mark.skipif(native.available() is not None, reason=f"no native kernels: {native.available()}")
pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda t: F.relu(t).square(),
    "identity": lambda t: t,
}
GATINGS = ("none", "halves", "interleaved", "separate")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
NAMES = ("x", "scale", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    gating: str = "halves"
    activation: str = "silu"
    bias: bool = False
    up_transposed: bool = False
    down_transposed: bool = False
    stacked: bool = True
    scale: str | None = "float32"  # or "same", the dtype of x
    tokens: int = 67
    d_model: int = 33
    d_expert: int = 19
    experts: int = 5
    top_k: int = 3
    routing: str = "random"
    seed: int = 0


@dataclass
class Layer:
    """A case's tensors. `ids` outside 0..E-1 belong to no expert."""

    case: Case
    ids: Tensor
    x: Tensor
    scale: Tensor | None
    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]
    gate_bias: list[Tensor]
    up_bias: list[Tensor]
    down_bias: list[Tensor]
    grad: Tensor

    def lists(self) -> list[list[Tensor]]:
        return [self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias]

    def leaves(self) -> list[Tensor]:
        return [self.x, *([] if self.scale is None else [self.scale]), *itertools.chain(*self.lists())]

    def to(self, dtype: torch.dtype) -> Layer:
        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_()

        lists = [[cast(t) for t in tensors] for tensors in self.lists()]
        scale = None if self.scale is None else cast(self.scale)
        return Layer(self.case, self.ids, cast(self.x), scale, *lists, self.grad.to(dtype))


def route_ids(case: Case, g: torch.Generator) -> Tensor:
    shape = (case.tokens, case.top_k)
    if case.routing == "one takes all":
        return torch.full(shape, case.experts - 1)
    if case.routing == "sentinels":  # of no expert: about half
        return torch.randint(-case.experts, 2 * case.experts, shape, generator=g)
    if case.routing == "sentinels only":
        return torch.full(shape, case.experts)
    if case.routing == "empty experts":
        return torch.randint(0, 2, shape, generator=g) * 2 + 1
    return torch.randint(0, case.experts, shape, generator=g)


def make(case: Case) -> Layer:
    g = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * by).to(case.dtype)

    def weights(out: int, inner: int, transposed: bool, by: float) -> list[Tensor]:
        shape = (inner, out) if transposed else (out, inner)
        if case.stacked:
            return [random(case.experts, *shape, by=by)]
        return [random(*shape, by=by) for _ in range(case.experts)]

    def biases(out: int) -> list[Tensor]:
        if not case.bias:
            return []
        return [random(case.experts, out)] if case.stacked else [random(out) for _ in range(case.experts)]

    d, f, separate = case.d_model, case.d_expert, case.gating == "separate"
    up_out = 2 * f if case.gating in ("halves", "interleaved") else f
    scale = None
    if case.scale:
        scale = torch.rand(case.tokens * case.top_k, generator=g).to(
            case.dtype if case.scale == "same" else torch.float32
        )
    return Layer(
        case=case,
        ids=route_ids(case, g),
        x=random(case.tokens, d),
        scale=scale,
        gate=weights(f, d, case.up_transposed, d**-0.5) if separate else [],
        up=weights(up_out, d, case.up_transposed, d**-0.5),
        down=weights(d, f, case.down_transposed, f**-0.5),
        gate_bias=biases(f) if separate else [],
        up_bias=biases(up_out),
        down_bias=biases(d),
        grad=random(case.tokens, d),
    )


def body(case: Case, gate: Tensor | None, up: Tensor) -> Tensor:
    act = ACTIVATIONS[case.activation]
    if case.gating == "halves":
        gate, up = up.chunk(2, dim=-1)
    if case.gating == "interleaved":
        gate, up = up[..., ::2], up[..., 1::2]
    return act(up) if gate is None else act(gate) * up


def exact(layer: Layer) -> Tensor:
    """Every expert on every token, masked; shares nothing with the ops."""
    case = layer.case

    def linear(t: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], e: int, transposed: bool) -> Tensor:
        w = weights[0][e] if case.stacked else weights[e]
        b = None if not biases else biases[0][e] if case.stacked else biases[e]
        return F.linear(t, w.mT if transposed else w, b)

    scale = torch.ones(layer.ids.numel(), dtype=layer.x.dtype) if layer.scale is None else layer.scale
    out = layer.x.new_zeros(layer.x.shape)
    for e in range(case.experts):
        gate = linear(layer.x, layer.gate, layer.gate_bias, e, case.up_transposed) if layer.gate else None
        h = body(case, gate, linear(layer.x, layer.up, layer.up_bias, e, case.up_transposed))
        y = linear(h, layer.down, layer.down_bias, e, case.down_transposed)
        out = out + ((layer.ids == e) * scale.view(layer.ids.shape)).sum(1, keepdim=True) * y
    return out


def composed(layer: Layer) -> Tensor:
    case = layer.case
    order, inverse, offsets = ops.route(layer.ids, case.experts)
    rows = ops.dispatch(layer.x, order, inverse, offsets, case.top_k)
    gate = None
    if layer.gate:
        gate = ops.grouped_linear(rows, layer.gate, layer.gate_bias, offsets, case.up_transposed)
    h = body(case, gate, ops.grouped_linear(rows, layer.up, layer.up_bias, offsets, case.up_transposed))
    y = ops.grouped_linear(h, layer.down, layer.down_bias, offsets, case.down_transposed)
    if layer.scale is not None:
        y = y * ops.dispatch(layer.scale, order, inverse, offsets, 1).unsqueeze(-1)
    return ops.combine(y, order, inverse, offsets, case.top_k).to(layer.x.dtype)


def arguments(layer: Layer) -> experts.Layer:
    case = layer.case
    with torch.no_grad():
        routed = ops.route(layer.ids, case.experts)
    flags = (case.top_k, case.activation, case.gating, case.up_transposed, case.down_transposed)
    return experts.unpack((*routed, layer.scale, *layer.lists(), *flags))


def forward(layer: Layer, keep: bool = True) -> tuple[Tensor, Tensor]:
    return native.forward(layer.x, arguments(layer), keep)


def backward(layer: Layer, pre: Tensor, needs: Sequence[object] = (True,) * 8) -> tuple[object, ...]:
    return native.backward(layer.grad, layer.x, pre, arguments(layer), needs)


def flatten(grads: Sequence[object]) -> list[Tensor]:
    lists = [g if isinstance(g, list) else [g] for g in grads]
    return [t for t in itertools.chain(*lists) if t is not None]


def close(got: Tensor, composed: Tensor, exact: Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == exact.shape, what
    if not exact.numel():
        return
    size = max(float(exact.abs().max()), 1e-30)
    error = float((got.double() - exact).abs().max()) / size
    measure = float((composed.detach().double() - exact).abs().max()) / size
    assert error <= 2 * measure + 4 * torch.finfo(dtype).eps, f"{what}: {error:.2e}, composed {measure:.2e}"


def check(case: Case) -> None:
    layer = make(case)
    oracle, plain = layer.to(torch.float64), layer
    for leaf in plain.leaves():
        leaf.requires_grad_()
    expected, measure = exact(oracle), composed(plain)
    out, pre = forward(layer)
    close(out, measure, expected.detach(), case.dtype, f"out of {case}")
    assert out.dtype == case.dtype
    expected_grads = torch.autograd.grad(expected, oracle.leaves(), oracle.grad)
    measured_grads = torch.autograd.grad(measure, plain.leaves(), plain.grad)
    got = flatten(backward(layer, pre))
    assert len(got) == len(expected_grads), case
    for i, (g, m, e) in enumerate(zip(got, measured_grads, expected_grads)):
        assert g.dtype == m.dtype, case
        close(g, m, e, case.dtype, f"gradient {i} of {case}")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gating", GATINGS)
def test_every_layout(dtype: torch.dtype, gating: str, poison: None) -> None:
    names, scales = itertools.cycle(ACTIVATIONS), itertools.cycle(["float32", "same", None])
    sizes = itertools.cycle([(67, 33, 19), (5, 64, 32), (40, 17, 50), (1, 7, 1), (90, 96, 80)])
    flags = (False, True)
    for bias, up_t, down_t, stacked in itertools.product(flags, flags, flags, flags):
        tokens, d_model, d_expert = next(sizes)
        case = Case(dtype, gating, next(names), bias, up_t, down_t, stacked, next(scales), tokens, d_model, d_expert)
        check(replace(case, routing="sentinels" if bias and stacked else "random"))


@needs_library
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(activation: str, dtype: torch.dtype, poison: None) -> None:
    for gating, scale in itertools.product(GATINGS, ("float32", "same", None)):
        check(Case(dtype, gating, activation, scale=scale, tokens=21))


@needs_library
@pytest.mark.parametrize("routing", ["random", "one takes all", "sentinels", "sentinels only", "empty experts"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 67, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_routings(routing: str, tokens: int, dtype: torch.dtype, poison: None) -> None:
    for gating, stacked in (("separate", False), ("halves", True)):
        check(
            Case(dtype, gating, tokens=tokens, routing=routing, stacked=stacked, bias=stacked, d_model=65, d_expert=40)
        )


@needs_library
@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (31, 32), (130, 257), (257, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for gating, transposed in itertools.product(GATINGS, (False, True)):
        case = Case(dtype, gating, tokens=30, d_model=sizes[0], d_expert=sizes[1])
        check(replace(case, up_transposed=transposed, down_transposed=transposed))


@needs_library
def test_activations_over_their_whole_range() -> None:
    """One row per number, identity weights: what comes out is the activation, and the gradient of x its derivative."""
    numbers = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, -88.0, 89.0, 1e4])])
    x = numbers.view(-1, 1)
    order, inverse, offsets = ops.route(torch.zeros(len(x), 1, dtype=torch.int64), 1)
    one = torch.ones(1, 1, 1)
    for name, act in ACTIVATIONS.items():
        routed = (order, inverse, offsets, None, [], [one], [one], [], [], [])
        layer = experts.unpack((*routed, 1, name, "none", False, False))
        out, pre = native.forward(x, layer, True)
        oracle = x.double().requires_grad_()
        expected = act(oracle)
        (slope,) = torch.autograd.grad(expected.sum(), oracle)
        grad_x, *_ = native.backward(torch.ones_like(x), x, pre, layer, (True,) + (False,) * 7)
        assert isinstance(grad_x, Tensor)
        expected = expected.detach()
        # float64 cancels in the tails
        assert torch.allclose(out.double(), expected, rtol=2e-6, atol=1e-12), name
        assert torch.allclose(grad_x.double(), slope, rtol=2e-6, atol=2e-7), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_anywhere(dtype: torch.dtype) -> None:
    """Stacks that are slices or views of transposed memory, and x and grad that are not contiguous."""
    layer = make(Case(dtype, "halves", tokens=23))
    out, pre = forward(layer)
    grads = flatten(backward(layer, pre))
    views = replace(layer)
    views.up = [torch.cat([layer.up[0], layer.up[0]], 1)[:, : layer.up[0].shape[1]]]
    views.down = [layer.down[0].mT.contiguous().mT]
    views.x = layer.x.t().contiguous().t()
    views.grad = layer.grad.t().contiguous().t()
    again, pre_again = forward(views)
    assert torch.equal(out, again)
    for got, expected in zip(flatten(backward(views, pre_again)), grads):
        assert torch.equal(got, expected)
    views.down = [torch.stack([layer.down[0], layer.down[0]], -1)[..., 0]]  # no stride of 1: copied
    assert torch.equal(forward(views)[0], out)


@needs_library
def test_only_what_is_needed() -> None:
    layer = make(Case(gating="separate", stacked=False, bias=True, tokens=23))
    _, pre = forward(layer)
    full = backward(layer, pre)
    none = backward(layer, pre, (False,) * 8)
    assert all(t is None for g in none for t in (g if isinstance(g, list) else [g]))
    some = [True, False, True, False, True]
    picked = backward(layer, pre, (True, False, some, False, some, False, some, True))
    assert picked[1] is None
    assert torch.equal(picked[0], full[0])
    for i in (2, 4, 6):
        for wanted, got, expected in zip(some, picked[i], full[i]):
            assert (got is not None) == wanted
            assert got is None or torch.equal(got, expected)
    joint = make(Case(gating="halves", stacked=False, tokens=23))
    _, pre = forward(joint)
    full, picked = backward(joint, pre), backward(joint, pre, (False, False, False, some, False, False, False, False))
    for wanted, got, expected in zip(some, picked[3], full[3]):
        assert torch.equal(got, expected) if wanted else got is None


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype, tokens: int) -> None:
    layer = make(Case(dtype, "halves", bias=True, tokens=tokens, d_model=200, d_expert=136, experts=3))
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        out, pre = forward(layer)
        results.append([out, forward(layer, keep=False)[0], pre, *flatten(backward(layer, pre))])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert torch.equal(results[0][0], results[0][1])


@needs_library
def test_calls_from_several_python_threads() -> None:
    layer = make(Case(tokens=50, d_model=128, d_expert=96))
    expected, _ = forward(layer)
    with ThreadPoolExecutor(3) as pool:
        for out, _ in pool.map(lambda _: forward(layer), range(30)):
            assert torch.equal(out, expected)


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(bad: float, dtype: torch.dtype) -> None:
    for tokens in (3, 67):
        layer = make(Case(dtype, "halves", tokens=tokens, d_model=33, d_expert=19))
        clean, _ = forward(layer)
        layer.x[1, 5] = bad
        out, pre = forward(layer)
        others = torch.arange(tokens) != 1
        assert torch.equal(out[others], clean[others])
        assert not out[1].isfinite().any()
        grad_x = backward(layer, pre, (True,) + (False,) * 7)[0]
        assert isinstance(grad_x, Tensor)
        assert grad_x[others].isfinite().all()


@needs_library
def test_nothing_is_read_in_the_tail() -> None:
    layer = make(Case(routing="sentinels", tokens=40))
    out, pre = forward(layer)
    grads = flatten(backward(layer, pre))
    routing = arguments(layer).routing
    end = int(routing.offsets[-1])
    pre[end:] = float("nan")
    tail_slots = routing.order[end:]
    assert layer.scale is not None
    layer.scale[tail_slots] = float("nan")
    assert torch.equal(forward(layer)[0], out)
    for a, b in zip(flatten(backward(layer, pre)), grads):
        assert torch.equal(a, b)


def test_refusals() -> None:
    assert native.refuses(torch.bfloat16, 8, 8, "silu") is None
    assert "float64" in str(native.refuses(torch.float64, 8, 8, "silu"))
    assert "mish" in str(native.refuses(torch.float32, 8, 8, "mish"))
    assert "widths" in str(native.refuses(torch.float32, 0, 8, None))


@needs_library
def test_mixed_dtypes_are_refused() -> None:
    layer = make(Case(torch.float32))
    layer.down = [layer.down[0].bfloat16()]
    with pytest.raises(ValueError, match="expected weights and biases of torch.float32, found torch.bfloat16"):
        forward(layer)


# ---- the cache. Each test runs processes of its own.

PROBE = "from moec.kernels import native; print(native.available())"


def start(cache: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture
def seeded(tmp_path: Path) -> Path:
    """A cache with this process's library in it."""
    command = [build._compiler(), *build.FLAGS, *build._openmp()]
    name = f"{build._key(command)}.so"
    (tmp_path / "moec").mkdir()
    (tmp_path / "moec" / name).write_bytes((build._folder() / name).read_bytes())
    return tmp_path / "moec" / name


@pytest.fixture
def hasty(tmp_path: Path) -> str:
    """A compiler that does not optimize: what it makes is never called here."""
    script = tmp_path / "hasty-g++"
    script.write_text(f'#!/bin/sh\nexec {build._compiler()} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@needs_library
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path, hasty: str) -> None:
    both = [start(tmp_path, CXX=hasty), start(tmp_path, CXX=hasty)]
    assert [said(p) for p in both] == ["None", "None"]
    (left,) = (tmp_path / "moec").iterdir()
    assert build._intact(left)


@needs_library
@pytest.mark.slow
def test_a_truncated_library_is_built_again(tmp_path: Path, hasty: str) -> None:
    assert said(start(tmp_path, CXX=hasty)) == "None"
    (library,) = (tmp_path / "moec").iterdir()
    size = library.stat().st_size
    os.truncate(library, size // 2)
    assert said(start(tmp_path, CXX=hasty)) == "None"
    assert library.stat().st_size == size


@needs_library
def test_a_library_in_the_cache_is_used(seeded: Path) -> None:
    before = seeded.stat().st_mtime_ns
    assert said(start(seeded.parents[1], CXX="g++")) == "None"
    assert seeded.stat().st_mtime_ns == before


@needs_library
def test_no_compiler(tmp_path: Path) -> None:
    assert "no C++ compiler" in said(start(tmp_path, CXX="no-such-compiler"))


@needs_library
def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")  # a folder cannot be made there, whoever asks
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="no cache folder"):
        build._load()


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_NATIVE", "0")
    build._loaded.cache_clear()
    assert native.available() == "switched off by MOEC_NATIVE"
    with pytest.raises(RuntimeError, match="cannot be used: switched off"):
        build.library()
    build._loaded.cache_clear()


@needs_library
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    with pytest.raises(build.Unavailable, match="cannot compile into .*Read-only file system"):
        build._load()


@needs_library
def test_a_machine_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: {"avx512f", "fma"})
    with pytest.raises(build.Unavailable, match="the processor lacks avx512bw, .*avx512_bf16"):
        build._load()
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(build.Unavailable, match="not for aarch64 Linux"):
        build._load()
