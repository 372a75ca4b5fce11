"""Each attack comes out as in eager, in value and every gradient: rewritten and right, or refused."""

import functools

import pytest
import torch
from torch import Tensor, nn

from moec import report

from .attacks import ATTACKS, Attack, D, E, H


class Program(nn.Module):
    def __init__(self, of: Attack) -> None:
        super().__init__()
        self.call = of.call
        g = torch.Generator().manual_seed(0)

        def make(*sizes: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(sizes, generator=g) / sizes[-1] ** 0.5).to(of.dtype))

        code = of.call.__code__
        self.names = code.co_varnames[1 : code.co_argcount]
        self.gate = make(E, D)
        self.up = nn.ParameterList(make(H, D) for _ in range(E))
        self.down = nn.ParameterList(make(D, H) for _ in range(E))
        self.UP, self.DOWN = make(E, H, D), make(E, D, H)
        for name in ("gate", "up", "down", "UP", "DOWN"):
            if name not in self.names:
                delattr(self, name)

    def forward(self, x: Tensor) -> object:
        given = {name: getattr(self, name) for name in self.names}
        return self.call(x, **{n: list(v) if isinstance(v, nn.ParameterList) else v for n, v in given.items()})


def run(call: nn.Module, module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = call(x)
    if out.requires_grad:
        out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
    found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad(set_to_none=True)
    return found


def tokens(of: Attack) -> list[Tensor]:
    x = torch.randn(of.rows, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(of.dtype)
    return [x[:1].expand_as(x).contiguous() if of.same else x, x]


# AOTAutograd itself copies where eager's dropout returns its input: `backend="aot_eager"` differs from eager just so
TORCHS_OWN = {("input_written_through_dropout_in_eval", "aot_eager")}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("of", ATTACKS, ids=lambda of: of.name)
@pytest.mark.filterwarnings("ignore:moec. traced again")
def test_equals_eager(of: Attack, inner: str, poison: None) -> None:
    if (of.name, inner) in TORCHS_OWN:
        pytest.skip("torch's own aot_eager differs from eager here")
    module = Program(of)
    report._recent.clear()
    compiled = torch.compile(module, backend="moec", options={"moec.inner": inner, "moec.verify": of.verify})
    for x in tokens(of):
        want = run(module, module, x)
        got = run(compiled, module, x)
        sites = [(s.status, s.reason, s.verified) for s in report.last_sites()]
        for name, theirs in want.items():
            ours = got[name]
            if ours is None or theirs is None:  # the licence: zero where eager leaves None
                left = ours if theirs is None else theirs
                assert left is None or not bool(left.any()), f"{name}: only one has a gradient; {sites}"
                continue
            told = functools.partial("{}: {}\n{}".format, name, sites)
            torch.testing.assert_close(ours, theirs, rtol=of.rtol, atol=of.rtol, msg=told)
