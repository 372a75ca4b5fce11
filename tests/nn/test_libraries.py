"""The layer inside what people put around it: DDP, checkpointing, autocast, saving and copying, peft."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moec

from . import oracle, ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_two_ranks(backend: str, tmp_path: Path) -> None:
    """Gradients and bias are on both ranks those of one process with all tokens."""
    command = [sys.executable, "-m", "tests.nn.ranks"]
    started = [subprocess.Popen([*command, str(r), "2", str(tmp_path), backend], cwd=ROOT) for r in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    layer = ranks.layer()
    ranks.loss(layer, layer, torch.cat([ranks.batch(0), ranks.batch(1)])).backward()
    layer.update_bias(rate=0.01)
    want = {name: p.grad for name, p in layer.named_parameters()}
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(got.pop("expert_bias"), layer.router.expert_bias)
        torch.testing.assert_close(got, want)


def gradients(call: object, model: nn.Module, x: Tensor, aux: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = call(x)
    total = out.square().sum() + (moec.nn.aux_loss(model) if aux else 0)
    named = {"x": x, **dict(model.named_parameters())}
    return {"out": out.detach(), **dict(zip(named, torch.autograd.grad(total, list(named.values()))))}


@pytest.mark.parametrize("aux", [False, True], ids=["plain", "aux"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("router", ["sigmoid", "expert_choice-position"])
def test_activation_checkpointing(router: str, backend: str | None, aux: bool) -> None:
    layer = oracle.build(router, z_loss=0.1 if aux else 0.0, balance_loss=0.1 if aux and router == "sigmoid" else 0.0)
    x = oracle.tokens(3, 5)
    want = gradients(layer, layer, x, aux)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        call = torch.compile(run, backend=backend, fullgraph=True) if backend else run
        torch.testing.assert_close(gradients(call, layer, x, aux), want)


def test_checkpointing_breaks_the_graph_where_attributes_are_set_and_is_right() -> None:
    layer = oracle.build("softmax", z_loss=0.1)
    x = oracle.tokens(3, 5)
    want = gradients(layer, layer, x, True)
    call = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")
    torch.testing.assert_close(gradients(call, layer, x, True), want)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("router", ["softmax_normalized", "expert_choice-position"])
def test_autocast(router: str, backend: str | None) -> None:
    """Products in bfloat16, the router in float32, everything in and out as the user has it."""
    layer = oracle.build(router, torch.float32, activation="silu", gated=True, bias=True, shared_experts=1)
    call = torch.compile(layer, backend=backend, fullgraph=True) if backend else layer
    x = oracle.tokens(4, 5, dtype=torch.float32).requires_grad_()
    rows: list[Tensor] = []
    layer.experts.up_proj.register_forward_hook(lambda module, args, out: rows.append(out)) if not backend else None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.router(x).logits.dtype == torch.float32
        out = call(x)
    assert out.dtype == x.dtype
    assert all(r.dtype == torch.bfloat16 for r in rows)
    grads = oracle.gradients(out, x, layer)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    exact = oracle.gradients(layer(x), x, layer)
    for name, grad in grads.items():
        assert (grad - exact[name]).norm() <= 0.03 * exact[name].norm(), name
    assert (out - layer(x)).norm() <= 0.02 * out.norm()


# ---- saving and copying


def test_state_dict_between_eager_and_compiled(tmp_path: Path) -> None:
    one, two = oracle.build("sigmoid-groups", seed=0), oracle.build("sigmoid-groups", seed=1)
    x = oracle.tokens(5)
    compiled = torch.compile(two, backend="aot_eager")
    assert not torch.equal(compiled(x), one(x))
    torch.save(one.state_dict(), tmp_path / "eager.pt")
    two.load_state_dict(torch.load(tmp_path / "eager.pt"))
    torch.testing.assert_close(compiled(x), one(x))
    torch.save(compiled.state_dict(), tmp_path / "compiled.pt")
    three = torch.compile(oracle.build("sigmoid-groups", seed=2), backend="aot_eager")
    three.load_state_dict(torch.load(tmp_path / "compiled.pt"))
    torch.testing.assert_close(three(x), one(x))


def test_state_dict_holds_what_was_learned_and_no_more() -> None:
    layer = oracle.build("sigmoid", bias=True, shared_experts=1, z_loss=0.1)
    layer(oracle.tokens(3))
    keys = {"router.weight", "router.expert_bias", "output_norm.weight", "output_norm.bias"}
    parts = ("experts.up_proj", "experts.down_proj", "shared.up_proj", "shared.down_proj")
    assert set(layer.state_dict()) == keys | {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    other = oracle.build("sigmoid", bias=True, shared_experts=1, seed=5)
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("router", list(oracle.ROUTERS))
def test_copy_and_pickle_after_a_forward(router: str) -> None:
    """Also while the layer still holds a loss that is in the graph of autograd."""
    layer = oracle.build(router, z_loss=0.1)
    layer.record = True
    x = oracle.tokens(5)
    want = layer(x)
    assert layer.aux_loss.requires_grad
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.aux_loss is None
        assert torch.equal(other(x), want)
        with torch.no_grad():
            other.experts.up_proj.weight.zero_()
        assert not torch.equal(other(x), want)
    assert torch.equal(layer(x), want)


def test_meta_device_then_real() -> None:
    layer = moec.nn.MoE(8, 16, 3, 2, router="sigmoid", bias=True, device="meta")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(4, 8)).isfinite().all()


# ---- peft


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = oracle.build("softmax_normalized", activation="silu", gated=True, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def lora(model: nn.Module) -> nn.Module:
    """Random A and B: fresh ones have B = 0, and would show nothing."""
    names = ["up_proj.weight", "down_proj.weight"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    )


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_lora_on_the_experts(backend: str | None) -> None:
    """peft's own merge says what the adapted model computes; only A and B learn."""
    model = lora(Model())
    x = oracle.tokens(7)
    call = torch.compile(model, backend=backend) if backend else model
    got = call(x)
    got.square().sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(learned) == 4
    assert all("lora_A" in name or "lora_B" in name for name in learned)
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)
    with model.disable_adapter():
        assert not torch.allclose(model(x), got)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), got)
    torch.testing.assert_close(merged(x), oracle.dense(merged.moe, x))


def test_lora_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = lora(Model()), oracle.tokens(7)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
