"""Programs that once came out wrong, or would if a guard of the dense forms, of views under no_grad or of stamping were missing.

Each is run with verification off and held against eager: value and every gradient. Sizes that coincide (T = E, T = D) are part of
the attack: what is told apart by shape alone is not told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec

K, E, D, H = 2, 4, 8, 16
OFF = {"moec.inner": "eager", "moec.verify": "off"}


class Layer(nn.Module):
    """Separate and stacked experts; `attack` is one of the functions below."""

    def __init__(self, attack: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attack = attack
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(*s)) for s in ((E, D), (E, H, D), (E, D, H)))
        self.ups = nn.ParameterList(torch.randn(H, D) for _ in range(E))
        self.downs = nn.ParameterList(torch.randn(D, H) for _ in range(E))
        self.double()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights [T, K], ids [T, K], weights [T, E])"""
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K, -1)
        return w, ids, x.new_zeros(*x.shape[:-1], E).scatter(-1, ids, w)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.ups[e])), self.downs[e])

    def dense(self, x: Tensor) -> Tensor:
        return torch.einsum("tef,edf->ted", F.gelu(torch.einsum("td,efd->tef", x, self.up)), self.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.attack(self, x)


def looped(self: Layer, x: Tensor, weigh: Callable[[int], Tensor]) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.expert(x, e) * weigh(e)
    return out


def plain(self, x):
    _, _, W = self.route(x)
    return looped(self, x, lambda e: W[:, e, None])


def mask_of_another_expert(self, x):
    _, ids, W = self.route(x)
    return looped(self, x, lambda e: W[:, e, None] * (ids == 0).any(-1)[:, None])


def mask_of_the_next_expert(self, x):
    _, ids, W = self.route(x)
    return looped(self, x, lambda e: W[:, e, None] * (ids == (e + 1) % E).any(-1)[:, None])


def mask_that_counts(self, x):
    _, ids, W = self.route(x)
    return (self.dense(x) * W[..., None] * F.one_hot(ids.view(1, -1), E).sum(1)[..., None]).sum(1)


def mask_transposed(self, x):
    _, ids, W = self.route(x)
    return (self.dense(x) * W[..., None] * F.one_hot(ids, E).sum(1).t()[..., None]).sum(1)


def weights_transposed(self, x):
    _, ids, _ = self.route(x)
    p = F.linear(x, self.gate).softmax(-1)
    return torch.einsum("et,ted->td", p.t() * F.one_hot(ids, E).sum(1).t(), self.dense(x))


def weight_of_the_next_expert(self, x):
    w, ids, W = self.route(x)
    return looped(self, x, lambda e: W[:, e, None] * (1 + (w * (ids == (e + 1) % E)).sum(-1)[:, None]))


def experts_of_another_rank(self, x):
    w, ids = F.linear(x, torch.cat([self.gate, -self.gate])).softmax(-1).topk(K, -1)
    W = ((ids.unsqueeze(-1) == torch.arange(E, 2 * E)) * w[..., None]).sum(1)
    return (self.dense(x) * W[..., None]).sum(1)


def rows_put_in_reverse(self, x):
    w, ids, _ = self.route(x)
    rows = torch.arange(x.shape[0] - 1, -1, -1)[:, None]
    return (self.dense(x) * torch.index_put(x.new_zeros(x.shape[0], E), (rows, ids), w)[..., None]).sum(1)


def tokens_in_reverse(self, x):
    w, ids, _ = self.route(x)
    i, t = ids.reshape(-1), torch.arange(x.shape[0] - 1, -1, -1).repeat_interleave(K)
    h = F.gelu(torch.bmm(self.up[i], x[t].unsqueeze(-1)).squeeze(-1))
    return (torch.bmm(self.down[i], h.unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)).view(-1, K, D).sum(1)


def inverse_of_the_reverse(self, x):
    w, ids, _ = self.route(x)
    i = ids.view(-1)
    order, n = i.argsort(stable=True), torch.bincount(i, minlength=E).tolist()
    rows = torch.cat([self.expert(p, e) for e, p in enumerate(torch.split(x[order // K], n))])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(x.shape[0] * K - 1, -1, -1)
    return (rows[inverse].view(-1, K, D) * w[..., None]).sum(1)


def hardtanh_of_zero(self, x):
    _, _, W = self.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + F.linear(F.hardtanh(F.linear(x * W[:, e, None], self.ups[e]), 0.5, 1.0), self.downs[e])
    return out


def infinity_made_true(self, x):
    w, ids, _ = self.route(x)
    W = torch.full((x.shape[0], E), -torch.inf, dtype=x.dtype).scatter(1, ids, w).bool().exp().to(x.dtype)
    return (self.dense(x) * W[..., None]).sum(1)


def weights_put_on_a_hundredth(self, x):
    w, ids, _ = self.route(x)
    W = torch.full((x.shape[0], E), 0.01, dtype=x.dtype).scatter(1, ids, w)
    return looped(self, x, lambda e: W[:, e, None])


def one_keeps_the_dim(self, x):
    w, ids, _ = self.route(x)
    return looped(self, x, lambda e: (w * (ids == e)).sum(-1, keepdim=e != 1))


def token_dims_swapped(self, x):
    x = x.view(3, 3, D)
    _, _, W = self.route(x)
    return looped(self, x, lambda e: W.transpose(0, 1)[..., e, None])


def narrow_from_the_end(self, x):
    _, _, W = self.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        h = F.gelu(F.linear(x, self.ups[e]))
        h = h * h.narrow(-1, -1, 1).sum(-1, keepdim=True)
        out = out + F.linear(h, self.downs[e]) * W[:, e, None]
    return out


def input_cloned_without_gradient(self, x):
    _, _, W = self.route(x)
    with torch.no_grad():
        h = x.clone()
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.expert(h, e) * W[:, e, None]
    return out


def input_viewed_there_and_back_without_gradient(self, x):
    _, _, W = self.route(x)
    with torch.no_grad():
        h = x.view(3, 3, D)
    return (self.dense(h.view(-1, D)) * W[..., None]).sum(1)


def weights_transposed_without_gradient(self, x):
    _, _, W = self.route(x)
    with torch.no_grad():
        W = W.t()
    return torch.einsum("et,ted->td", W, self.dense(x))


def token_added_without_gradient(self, x):
    _, _, W = self.route(x)
    with torch.no_grad():
        row = x[:, None]
    return ((self.dense(x) + row) * W[..., None]).sum(1)


def input_repeated_without_gradient(self, x):
    _, _, W = self.route(x)
    with torch.no_grad():
        rows = x.repeat(E, 1)
    h = F.gelu(torch.bmm(rows.view(E, -1, D), self.up.transpose(1, 2)))
    return (torch.bmm(h, self.down.transpose(1, 2)) * W.t()[..., None]).sum(0)


# (attack, tokens)
ATTACKS = [
    *((attack, 9) for attack in (
        plain, mask_of_another_expert, mask_of_the_next_expert, mask_that_counts, weight_of_the_next_expert,
        experts_of_another_rank, rows_put_in_reverse, tokens_in_reverse, inverse_of_the_reverse, hardtanh_of_zero,
        infinity_made_true, weights_put_on_a_hundredth, token_dims_swapped, narrow_from_the_end, input_cloned_without_gradient,
        input_viewed_there_and_back_without_gradient, weights_transposed_without_gradient, token_added_without_gradient,
        input_repeated_without_gradient,
    )),
    (mask_transposed, E), (weights_transposed, E), (one_keeps_the_dim, D),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "tokens"), ATTACKS, ids=lambda a: getattr(a, "__name__", str(a)))
@pytest.mark.filterwarnings("ignore:moec. traced again")
def test_as_eager(attack: Callable[[Layer, Tensor], Tensor], tokens: int) -> None:
    layer = Layer(attack)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    runs = []
    for call in (layer, torch.compile(layer, backend="moec", options=OFF)):
        out = call(x)
        grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        runs.append((out, *(torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads))))
    for want, got in zip(*runs):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def stacked_weights(self, x):
    _, _, W = self.route(x)
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + F.linear(F.gelu(F.linear(x, self.up[e])), self.down[e]) * W[:, e, None]
    return out


@pytest.mark.parametrize("attack", [plain, stacked_weights, input_cloned_without_gradient])
def test_what_is_sound_is_rewritten(attack: Callable[[Layer, Tensor], Tensor]) -> None:
    report = moec.explain(Layer(attack), torch.randn(9, D, dtype=torch.float64))
    assert [s.status for s in report.sites] == ["rewritten"]


# -- loops over equal layers whose Python is not equal ------------------------------------------------------------------------


class Equal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(x))


class Stream(nn.Module):
    """Six equal layers; the fourth output is doubled, in the way that `scales` says."""

    def __init__(self, scales: Callable[[Stream], Callable[[nn.Module], float]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Equal() for _ in range(6))
        self.by_id, self.by_hash = {id(self.layers[3]): 2.0}, {hash(self.layers[3]): 2.0}
        self.by_weight = {self.layers[3].f.weight: 2.0}
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scales(self)
        for layer in self.layers:
            x = layer(x) * scale(layer)
        return x


VALUES = [1.0, 1.0, 1.0, 2.0, 1.0, 1.0]


def _advance(values: Iterator[float]) -> Callable[[nn.Module], float]:
    return lambda layer: next(values)


STREAMS = {
    "id": lambda self: lambda layer: self.by_id.get(id(layer), 1.0),
    "hash": lambda self: lambda layer: self.by_hash.get(hash(layer), 1.0),
    "tensor as key": lambda self: lambda layer: self.by_weight.get(layer.f.weight, 1.0),
    "generator": lambda self: _advance(v for v in VALUES),
    "list iterator": lambda self: _advance(iter(VALUES)),
    "cycle": lambda self: _advance(itertools.cycle(VALUES)),
    "chain": lambda self: _advance(itertools.chain(VALUES)),
    "values of a dict": lambda self: _advance(iter(dict(enumerate(VALUES)).values())),
    "enumerate": lambda self: (lambda pairs: lambda layer: next(pairs)[1])(enumerate(VALUES)),
    "range": lambda self: (lambda numbers: lambda layer: 1.0 + (next(numbers) == 3))(iter(range(6))),
}


@pytest.mark.parametrize("how", STREAMS)
def test_layers_that_differ_in_python(how: str) -> None:
    model, x = Stream(STREAMS[how]), torch.randn(5, D)
    torch.testing.assert_close(torch.compile(model, backend="moec", options=OFF)(x), model(x))
