"""The ops against a dense float64 oracle that computes every expert on every token and masks; eager is the measure of error.

Shape letters: T tokens, K top-k, S = T*K slots, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import moec.kernels
from moec.kernels import cpu, cuda, eager, gathered, grouped_mm
from moec.ops import OPS, reference

ops = torch.ops.moec

D, WIDTH = 33, 17  # odd on purpose

# name -> ids [T, K], E. Ids outside of 0..E-1 belong to no expert.
ROUTINGS: dict[str, tuple[list[list[int]], int]] = {
    "even": ([[0, 1], [2, 3], [1, 0], [3, 2], [0, 2]], 4),
    "empty experts": ([[1, 4], [4, 1], [1, 4]], 6),
    "one takes all": ([[2, 2], [2, 2], [2, 2]], 4),
    "duplicates": ([[0, 0, 1], [1, 1, 1]], 2),
    "sentinels": ([[0, 4], [-1, 2], [4, 9], [2, -7]], 4),
    "sentinels only": ([[4, 5], [-1, -1]], 4),
    "K = E": ([[0, 1, 2], [2, 1, 0], [1, 2, 0]], 3),
    "one expert": ([[0], [0], [1]], 1),
    "one token": ([[3, 1]], 4),
    "no tokens": ([], 4),
}


def ids_of(name: str) -> tuple[Tensor, int]:
    rows, num_experts = ROUTINGS[name]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1 if rows else 2), num_experts


@dataclass
class Layer:
    """Leaves of one routed linear layer: x [T, D], w [E, F, D], b [E, F], a [T, K]."""

    x: Tensor
    w: Tensor
    b: Tensor
    a: Tensor

    @staticmethod
    def random(ids: Tensor, num_experts: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Layer:
        g = torch.Generator().manual_seed(seed)
        shapes = ((ids.shape[0], D), (num_experts, WIDTH, D), (num_experts, WIDTH), tuple(ids.shape))
        return Layer(*(torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes))

    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.w, self.b, self.a)

    def double(self) -> Layer:
        return Layer(*(t.detach().double().requires_grad_() for t in self.leaves()))


def dense(layer: Layer, ids: Tensor, num_experts: int) -> Tensor:
    """[T, F]: all experts on all tokens, by vmap, then masked. Shares nothing with the ops."""
    y = torch.func.vmap(lambda w, b: F.linear(layer.x, w, b))(layer.w, layer.b)  # [E, T, F]
    chosen = torch.stack([(ids == e) * layer.a for e in range(num_experts)])  # [E, T, K]
    return torch.einsum("etk,etf->tf", chosen, y)


def routed(layer: Layer, ids: Tensor, num_experts: int, *, stacked: bool = True, transposed: bool = False) -> Tensor:
    order, inverse, offsets = ops.route(ids, num_experts)
    w = layer.w.mT if transposed else layer.w
    weights, biases = ([w], [layer.b]) if stacked else (list(w.unbind()), list(layer.b.unbind()))
    rows = ops.dispatch(layer.x, order, inverse, offsets, ids.shape[1])
    y = ops.grouped_linear(rows, weights, biases, offsets, transposed)
    y = y * ops.dispatch(layer.a.reshape(-1), order, inverse, offsets, 1).unsqueeze(-1)
    return ops.combine(y, order, inverse, offsets, ids.shape[1])


def eager_loop(layer: Layer, ids: Tensor, num_experts: int) -> Tensor:
    out = layer.x.new_zeros(layer.x.shape[0], WIDTH)
    for e in range(num_experts):
        token, choice = torch.where(ids == e)
        y = F.linear(layer.x[token], layer.w[e], layer.b[e]) * layer.a[token, choice, None]
        out = out.index_add(0, token, y)
    return out


def grads(out: Tensor, leaves: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, g)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pytestmark = pytest.mark.usefixtures("poison", "_one_thread")


# ---- values and gradients


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("transposed", [False, True], ids=["FD", "DF"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_float64_values_and_gradients(name: str, stacked: bool, transposed: bool) -> None:
    ids, num_experts = ids_of(name)
    layer = Layer.random(ids, num_experts)
    got, expected = (
        routed(layer, ids, num_experts, stacked=stacked, transposed=transposed),
        dense(layer, ids, num_experts),
    )
    torch.testing.assert_close(got, expected)
    for g, e in zip(grads(got, layer.leaves()), grads(expected, layer.leaves())):
        torch.testing.assert_close(g, e)


@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_random_routings(data: st.DataObject) -> None:
    num_experts, tokens, k = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 7)), data.draw(st.integers(1, 4))
    flat = data.draw(st.lists(st.integers(-2, num_experts + 1), min_size=tokens * k, max_size=tokens * k))
    ids = torch.tensor(flat, dtype=torch.int64).view(tokens, k)
    layer = Layer.random(ids, num_experts)
    got, expected = routed(layer, ids, num_experts, stacked=data.draw(st.booleans())), dense(layer, ids, num_experts)
    torch.testing.assert_close(got, expected)
    for g, e in zip(grads(got, layer.leaves()), grads(expected, layer.leaves())):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["even", "one takes all", "sentinels", "K = E"])
def test_error_is_no_larger_than_that_of_eager(name: str, dtype: torch.dtype) -> None:
    ids, num_experts = ids_of(name)
    layer = Layer.random(ids.repeat(6, 1), num_experts, dtype)
    ids = ids.repeat(6, 1)
    oracle = layer.double()
    truth = dense(oracle, ids, num_experts)
    ours, theirs = routed(layer, ids, num_experts), eager_loop(layer, ids, num_experts)
    for ours_t, theirs_t, truth_t in zip(
        (ours, *grads(ours, layer.leaves())),
        (theirs, *grads(theirs, layer.leaves())),
        (truth, *grads(truth, oracle.leaves())),
    ):
        assert ours_t.dtype == dtype
        ulp = torch.finfo(dtype).eps * truth_t.abs().max().item()
        error, measure = ((t.double() - truth_t).abs().max().item() for t in (ours_t, theirs_t))
        assert error <= 1.5 * measure + ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [D, 32])
def test_each_product_is_bitwise_that_of_linear(dtype: torch.dtype, bias: bool, width: int) -> None:
    """What the numerics of the contract promise on CPU: one rounding, the same GEMM."""
    offsets = routing("sentinels")[2]
    rows, w, b = (torch.randn(s).to(dtype) for s in ((8, width), (4, 16, width), (4, 16)))
    args = (rows, [w], [b] if bias else [], offsets)
    assert torch.equal(ops.grouped_linear(*args), reference.grouped_linear(*args))


# ---- route


@pytest.mark.parametrize("kernel", [ops.route, reference.route, cuda.route], ids=["op", "reference", "cuda"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_route(kernel: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0 if dtype == torch.uint8 else -2, 9, (3, 4, 5), generator=g).to(dtype)
    for t in (ids, ids.transpose(0, 2), ids[..., :1].expand(3, 4, 5), ids[:0]):
        order, inverse, offsets = kernel(t, 7)
        flat = [i if 0 <= i < 7 else 7 for i in t.reshape(-1).tolist()]
        assert order.tolist() == sorted(range(len(flat)), key=flat.__getitem__)
        assert inverse[order].tolist() == list(range(len(flat)))
        assert offsets.tolist() == [sum(i <= e for i in flat) for e in range(7)]
        assert {order.dtype, inverse.dtype, offsets.dtype} == {torch.int64}


@pytest.mark.parametrize("kernel", [ops.route, cuda.route], ids=["op", "cuda"])
@pytest.mark.parametrize("num_experts", [254, 255, 256, 300, 32767, 65535, 70000])
def test_route_where_keys_grow_wider(kernel: Callable[..., tuple[Tensor, ...]], num_experts: int) -> None:
    ids = torch.tensor([num_experts - 1, num_experts, 0, 255, -1, 2**40, num_experts - 1])
    for got, expected in zip(kernel(ids, num_experts), reference.route(ids, num_experts)):
        assert torch.equal(got, expected)


# ---- tails, poison, aliasing


def routing(name: str = "sentinels") -> tuple[Tensor, Tensor, Tensor, int]:
    ids, num_experts = ids_of(name)
    return (*ops.route(ids, num_experts), ids.shape[1])


@pytest.mark.parametrize("shape", [(), (D,), (3, 5), (0,)])
def test_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    order, inverse, offsets, k = routing()
    x, y = torch.randn(4, *shape), torch.randn(8, *shape)
    torch.testing.assert_close(
        ops.dispatch(x, order, inverse, offsets, k), reference.dispatch(x, order, inverse, offsets, k)
    )
    torch.testing.assert_close(
        ops.combine(y, order, inverse, offsets, k), reference.combine(y, order, inverse, offsets, k)
    )


@pytest.mark.parametrize("module", [ops, reference], ids=["op", "reference"])
def test_tails_are_zeros_and_never_read(module: object) -> None:
    order, inverse, offsets, k = routing()
    end = int(offsets[-1])
    x, y = torch.randn(4, D), torch.randn(8, D)
    x[2], y[end:] = float("nan"), float("nan")  # token 2 has sentinels only
    w, b = torch.randn(4, WIDTH, D), torch.randn(4, WIDTH)
    tails = [
        module.dispatch(x, order, inverse, offsets, k),
        module.grouped_linear(y, [w], [b], offsets),
        module.grouped_linear(y, list(w), list(b), offsets),
        module.expert_rows([b], offsets, 8),
        module.expert_rows(list(b), offsets, 11),
    ]
    assert end < 8
    assert all((t[end:] == 0).all() and t.isfinite().all() for t in tails)
    assert module.combine(y, order, inverse, offsets, k).isfinite().all()
    assert (module.combine(y, order, inverse, offsets, k)[2] == 0).all()


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("width", [D, 32])
def test_weights_of_experts_without_rows_are_never_read(stacked: bool, width: int) -> None:
    offsets = routing("empty experts")[2]
    w = torch.full((6, 16, width), float("nan"))
    w[[1, 4]] = torch.randn(2, 16, width)
    x = torch.randn(6, width, requires_grad=True)
    out = ops.grouped_linear(x, [w] if stacked else list(w), [], offsets)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_layouts_of_inputs_and_gradients_do_not_matter() -> None:
    ids, num_experts = ids_of("sentinels")
    layer = Layer.random(ids, num_experts)
    with torch.no_grad():
        spread = Layer(
            layer.x.t().contiguous().t(), layer.w.permute(2, 0, 1).contiguous().permute(1, 2, 0), layer.b, layer.a
        )
    spread = Layer(*(t.detach().requires_grad_() for t in spread.leaves()))
    torch.testing.assert_close(routed(spread, ids, num_experts), routed(layer, ids, num_experts))
    expanded = torch.autograd.grad(routed(spread, ids, num_experts).sum(), spread.leaves())
    plain = torch.autograd.grad(dense(layer, ids, num_experts).sum(), layer.leaves())
    for got, expected in zip(expanded, plain):
        torch.testing.assert_close(got, expected)
    row = torch.randn(1, D).double().expand(8, D)
    torch.testing.assert_close(
        ops.grouped_linear(row, [layer.w], [], routing()[2]),
        ops.grouped_linear(row.contiguous(), [layer.w], [], routing()[2]),
    )


def test_list_is_stacked_and_runs_repeat_bit_for_bit() -> None:
    ids, num_experts = ids_of("even")
    layer = Layer.random(ids, num_experts, torch.bfloat16)
    runs = [routed(layer, ids, num_experts, stacked=s) for s in (True, False, True)]
    first, *others = [(out, *grads(out, layer.leaves())) for out in runs]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


# ---- which gradients exist


def test_gradients_follow_requires_grad_and_have_storage_of_their_own() -> None:
    order, inverse, offsets, k = routing("empty experts")
    w = [torch.randn(WIDTH, D, requires_grad=e not in (0, 4)) for e in range(6)]
    b = [torch.randn(WIDTH, requires_grad=e != 1) for e in range(6)]
    x = torch.randn(6, D)
    ops.grouped_linear(x, w, b, offsets).sum().backward()
    assert [t.grad is None for t in w] == [True, False, False, False, True, False]
    assert [t.grad is None for t in b] == [False, True, False, False, False, False]
    found = [t.grad for t in (*w, *b) if t.grad is not None]
    assert all((w[e].grad == 0).all() and (b[e].grad == 0).all() for e in (2, 3, 5))
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)
    assert all(g.untyped_storage().nbytes() == g.numel() * g.element_size() for g in found)


def test_expert_rows_gradients() -> None:
    offsets = routing("empty experts")[2]
    values = [torch.randn(3, requires_grad=e != 2) for e in range(6)]
    ops.expert_rows(values, offsets, 8).sum().backward()
    counts = torch.diff(offsets, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    assert [None if v.grad is None else v.grad[0].item() for v in values] == [*counts[:2], None, *counts[3:]]


def test_sums_of_16_bit_gradients_are_accumulated_in_float32() -> None:
    offsets = torch.tensor([3000])
    b = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    ops.expert_rows([b], offsets, 3000).sum().backward()
    assert b.grad is not None
    assert (b.grad == 3008).all()  # 3000 rounded once; bfloat16 sums stop at 256
    y = torch.ones(1000, 8, dtype=torch.bfloat16)
    slots = torch.arange(1000)
    assert (ops.combine(y, slots, slots, torch.tensor([1000]), 1000) == 1000).all()


def test_second_derivative_of_weights_raises_and_others_are_right() -> None:
    offsets = torch.tensor([1, 3])
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    (gx,) = torch.autograd.grad(ops.grouped_linear(x, [w], [], offsets).pow(2).sum(), x, create_graph=True)
    (ggw,) = torch.autograd.grad(gx.sum(), w, retain_graph=True)
    y = torch.cat([x[:1] @ w[0].T, x[1:3] @ w[1].T])
    (expected,) = torch.autograd.grad(torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0].sum(), w)
    torch.testing.assert_close(ggw, expected)
    (gw,) = torch.autograd.grad(ops.grouped_linear(x, [w], [], offsets).pow(2).sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of an expert's weight"):
        gw.sum().backward()


# ---- autocast


def test_dtype_does_what_autocast_does() -> None:
    ids, num_experts = ids_of("even")
    layer = Layer.random(ids, num_experts, torch.float32)
    _, _, offsets, _ = routing("even")
    rows = torch.randn(10, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat(
            [F.linear(rows[begin:end], layer.w[e], layer.b[e]) for e, begin, end in reference.segments(offsets)]
        )
    leaves = (rows, layer.w, layer.b)
    expected_grads = grads(expected, leaves)
    for stacked in (True, False):
        w, b = ([layer.w], [layer.b]) if stacked else (list(layer.w.unbind()), list(layer.b.unbind()))
        got = ops.grouped_linear(rows, w, b, offsets, dtype=torch.bfloat16)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected)
        for g, e in zip(grads(got, leaves), expected_grads):
            assert g.dtype == torch.float32
            torch.testing.assert_close(g, e, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="of one dtype"):  # as F.linear under autocast: float64 is not cast
        ops.grouped_linear(rows.double(), [layer.w], [], offsets, dtype=torch.bfloat16)


@pytest.mark.parametrize("kernel", [cpu, eager], ids=["loop", "reference"])
def test_autocast_around_the_ops_changes_nothing(kernel: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moec.kernels.PRODUCTS, "loop", kernel)
    ids, num_experts = ids_of("sentinels")
    layer = Layer.random(ids, num_experts, torch.float32)
    plain = routed(layer, ids, num_experts)
    with torch.autocast("cpu", torch.bfloat16):
        around = routed(layer, ids, num_experts)
        around_grads = grads(around, layer.leaves())
    assert torch.equal(around, plain)
    assert all(torch.equal(a, p) for a, p in zip(around_grads, grads(plain, layer.leaves())))


# ---- the machinery of torch


def sample_args(grad: bool = True) -> dict[str, list[tuple[object, ...]]]:
    """Arguments for every op; fresh leaves, float64."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=grad)

    order, inverse, offsets, k = routing()
    ids, _ = ids_of("sentinels")
    r = (order, inverse, offsets)
    return {
        "route": [(ids, 4), (ids.to(torch.uint8).t(), 4), (ids[:0], 4)],
        "dispatch": [(leaf(4, 3), *r, k), (leaf(8), *r, 1)],
        "combine": [(leaf(8, 3), *r, k), (leaf(8), *r, 1)],
        "grouped_linear": [
            (leaf(8, 3), [leaf(4, 5, 3)], [leaf(4, 5)], offsets),
            (leaf(8, 3), [leaf(3, 5) for _ in range(4)], [leaf(5) for _ in range(4)], offsets, True),
            (leaf(8, 3), [leaf(5, 3) for _ in range(4)], [], offsets),
        ],
        "expert_rows": [([leaf(4, 3)], offsets, 8), ([leaf(3) for _ in range(4)], offsets, 9)],
        "grouped_outer": [
            (leaf(8, 3).detach(), leaf(8, 5).detach(), offsets, None, torch.float64),
            (leaf(8, 3).detach(), leaf(8, 5).detach(), offsets, [0, 3], torch.float32),
        ],
        "expert_sums": [(leaf(8, 3), offsets, None, torch.float64), (leaf(8, 3), offsets, [1, 2], torch.float64)],
    }


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    for args in sample_args()[name]:
        torch.library.opcheck(getattr(ops, name).default, args)


@pytest.mark.parametrize("name", ["dispatch", "combine", "grouped_linear", "expert_rows", "expert_sums"])
def test_gradcheck(name: str) -> None:
    for args in sample_args()[name]:
        leaves = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        leaves = [t for t in leaves if t.requires_grad]

        def call(*values: Tensor, args: tuple[object, ...] = args) -> object:
            it = iter(values)

            def swap(a: object) -> object:
                if isinstance(a, list):
                    return [swap(t) for t in a]
                return next(it) if isinstance(a, Tensor) and a.requires_grad else a

            return getattr(ops, name)(*(swap(a) for a in args))

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_compiled_without_guards_on_the_number_of_tokens(stacked: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(routed, backend=counter, fullgraph=True, dynamic=None)
    for tokens in (5, 9, 2, 7, 64):  # the second makes T dynamic, the rest must fit
        ids = torch.randint(-1, 5, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
        layer = Layer.random(ids, 4)
        got, expected = compiled(layer, ids, 4, stacked=stacked), dense(layer, ids, 4)
        torch.testing.assert_close(got, expected)
        for g, e in zip(grads(got, layer.leaves()), grads(expected, layer.leaves())):
            torch.testing.assert_close(g, e)
    assert counter.frame_count == 2


def test_compiled_with_inductor() -> None:
    compiled = torch.compile(routed, fullgraph=True, dynamic=True)
    for name in ("sentinels", "no tokens", "one token"):
        ids, num_experts = ids_of(name)
        layer = Layer.random(ids, num_experts)
        got, expected = compiled(layer, ids, num_experts, stacked=False), dense(layer, ids, num_experts)
        torch.testing.assert_close(got, expected)
        leaves = layer.leaves()
        for g, e in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
            torch.testing.assert_close(g, e)


# ---- kernels that this machine does not choose, called directly


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("bias", ["none", "stacked", "list"])
@pytest.mark.parametrize("transposed", [False, True], ids=["FD", "DF"])
@pytest.mark.parametrize("kernel", [gathered, grouped_mm, cpu, eager], ids=lambda m: m.__name__.rpartition(".")[2])
def test_products_agree(kernel: object, transposed: bool, bias: str, dtype: torch.dtype | None) -> None:
    for name in ("sentinels", "empty experts", "sentinels only", "no tokens"):
        ids, num_experts = ids_of(name)
        _, _, offsets = ops.route(ids, num_experts)
        given_dtype = torch.float32 if dtype else torch.bfloat16
        x = torch.randn(ids.numel(), 16, dtype=given_dtype)
        w = torch.randn(num_experts, *((16, 8) if transposed else (8, 16)), dtype=given_dtype)
        b = torch.randn(num_experts, 8, dtype=given_dtype)
        biases = {"none": [], "stacked": [b], "list": list(b)}[bias]
        expected = reference.grouped_linear(x, [w], biases, offsets, transposed, dtype)
        got = kernel.grouped_linear(x, [w], biases, offsets, transposed, dtype)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-5)
        assert (got[offsets[-1] :] == 0).all()


def test_products_that_grouped_mm_would_refuse_by_their_layout_are_copied() -> None:
    offsets = torch.tensor([1, 3])
    x = torch.randn(16, 5).bfloat16().t()[:, ::2]
    w = torch.randn(2, 8, 16).bfloat16()[..., ::2]
    torch.testing.assert_close(
        grouped_mm.grouped_linear(x, [w], [], offsets),
        reference.grouped_linear(x, [w], [], offsets),
        rtol=2**-7,
        atol=2**-5,
    )


@pytest.mark.parametrize("kernel", [grouped_mm, cpu, eager], ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outer_products_agree(kernel: object, dtype: torch.dtype) -> None:
    _, _, offsets, _ = routing("empty experts")
    left, right = torch.randn(6, 16).bfloat16(), torch.randn(6, 8).bfloat16()
    (expected,) = reference.grouped_outer(left, right, offsets, None, dtype)
    (got,) = kernel.grouped_outer(left, right, offsets, None, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("kernel", [cuda, cpu], ids=["cuda", "cpu"])
@pytest.mark.parametrize("experts", [None, [0, 1, 4]])
def test_sums_agree(kernel: object, experts: list[int] | None) -> None:
    for name in ("empty experts", "sentinels", "sentinels only", "no tokens"):
        ids, num_experts = ids_of(name)
        _, _, offsets = ops.route(ids, num_experts)
        some = None if experts is None else [e for e in experts if e < num_experts]
        rows = torch.randn(ids.numel(), 3, 5).bfloat16()
        got = kernel.expert_sums(rows, offsets, some, torch.float32)
        torch.testing.assert_close(got, reference.expert_sums(rows, offsets, some, torch.float32))


# ---- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: ops.route(torch.zeros(3), 2), "integer topk_ids"),
        (lambda o: ops.route(torch.zeros(3, dtype=torch.int64), 0), "num_experts >= 1"),
        (lambda o: ops.dispatch(torch.zeros(3, 2), *o, 2), "slots / 2 rows"),
        (lambda o: ops.combine(torch.zeros(3, 2), *o, 2), "8 slots / 1 rows"),
        (lambda o: ops.combine(torch.zeros(8, 2), *o, 3), "multiple of slots_per_row=3"),
        (lambda o: ops.grouped_linear(torch.zeros(8, 2, 3), [torch.zeros(4, 5, 3)], [], o[2]), "reshape x"),
        (lambda o: ops.grouped_linear(torch.zeros(8, 3), [torch.zeros(3, 5, 3)], [], o[2]), "a stack of 3"),
        (lambda o: ops.grouped_linear(torch.zeros(8, 3), [torch.zeros(5, 3)] * 2, [], o[2]), "2 tensor"),
        (lambda o: ops.grouped_linear(torch.zeros(8, 5), [torch.zeros(4, 5, 3)], [], o[2]), "3 columns"),
        (
            lambda o: ops.grouped_linear(torch.zeros(8, 3), [torch.zeros(4, 5, 3)], [torch.zeros(4, 3)], o[2]),
            "5 columns",
        ),
        (lambda o: ops.grouped_linear(torch.zeros(8, 3), [torch.zeros(4, 5, 3).half()], [], o[2]), "of one dtype"),
        (
            lambda o: ops.grouped_linear(torch.zeros(8, 3), [torch.zeros(5 + (e == 2), 3) for e in range(4)], [], o[2]),
            "expert 2",
        ),
        (lambda o: ops.expert_rows([torch.zeros(3)], o[2], 8), "a stack of 3"),
        (lambda o: ops.expert_rows([], o[2], 8), "one stacked"),
    ],
)
def test_errors_name_what_was_found(call: Callable[[tuple[Tensor, ...]], object], message: str) -> None:
    order, inverse, offsets, _ = routing()
    with pytest.raises(ValueError, match=message):
        call((order, inverse, offsets))


def test_every_kernel_is_registered() -> None:
    for name, key, _ in moec.kernels.REGISTERED:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moec::{name}", key)
