"""The instruments of tests/hf.py, before anything is measured with them."""

import dataclasses

import pytest
import torch

from . import hf

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", hf.NAMES)
def test_build(name: str) -> None:
    model = hf.build(name)
    assert len(hf.routers(model)) == len(hf.experts(model)) == hf.NUM_MOE_LAYERS
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    constant = [k for k, v in values.items() if v.numel() > 1 and bool((v == v.flatten()[0]).all())]
    assert not constant, "left at a constant initial value"
    with hf.recorded_choices(model) as choices:
        done = hf.run(model, hf.example_inputs(model))
    missing = [k for k, g in done.grads.items() if g is None or not bool(g.any())]
    assert not missing, "no gradient reaches these"
    for ids in choices:
        assert len(ids.unique()) >= 6, "nearly all experts should be visited"


@pytest.mark.parametrize("implementation", hf.IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("name", hf.NAMES)
def test_other_implementations_are_within_the_bound(name: str, implementation: str) -> None:
    """transformers' own paths hold to the measure in float32, so it is not too strict; and they see the same weights."""
    model = hf.build(name)
    inputs = hf.example_inputs(model)
    eager, ref = hf.run(model, inputs), hf.reference(model, inputs)
    other = hf.run(hf.build(name, implementation), inputs)
    worst = hf.measure(other, eager, ref, EPS)
    assert worst.ratio <= 1, worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", hf.NAMES)
def test_replay(name: str, dtype: torch.dtype) -> None:
    """With the choices replayed the float64 reference is near a 16-bit run; forced choices come out as recorded."""
    model = hf.build(name, "grouped_mm", dtype)
    inputs = hf.example_inputs(model)
    with hf.recorded_choices(model) as choices:
        got = hf.run(model, inputs)
    plain = hf.build(name, "eager", dtype)
    with hf.recorded_choices(plain) as replayed:
        eager = hf.run(plain, inputs, choices=choices)
    assert all(torch.equal(a, b) for a, b in zip(choices, replayed))
    ref = hf.reference(model, inputs, choices)
    worst = hf.measure(got, eager, ref, torch.finfo(dtype).eps)
    assert worst.ratio <= 1, worst


def test_replay_reaches_the_model() -> None:
    model = hf.build("deepseek_v3")
    inputs = hf.example_inputs(model)
    with hf.recorded_choices(model) as choices:
        own = hf.run(model, inputs)
    same = hf.run(model, inputs, choices=choices)
    torch.testing.assert_close(own.logits, same.logits, rtol=0, atol=0)
    other = hf.run(model, inputs, choices=[(ids + 1) % 8 for ids in choices])
    assert not torch.allclose(own.logits, other.logits, atol=1e-2)
    with pytest.raises(ValueError, match="1 recorded choices for 2 routers"):
        hf.run(model, inputs, choices=choices[:1])


@pytest.mark.parametrize("name", hf.NAMES)
def test_reference_is_float64_throughout(name: str) -> None:
    """No float32 is left inside: a change of 1e-12 in the weights moves the logits by about as little, not by 1e-8."""
    model = hf.build(name, dtype=torch.float64)
    inputs = hf.example_inputs(model)
    before = hf.reference(model, inputs).logits
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-13)
    after = hf.reference(model, inputs).logits
    assert (after - before).abs().max() < 1e-10


def test_choices_of_a_compiled_model() -> None:
    """In bfloat16: transformers' grouped path in float32 has a backward that AOTAutograd cannot trace (5.17)."""
    model = hf.build("mixtral", "grouped_mm", torch.bfloat16)
    inputs = hf.example_inputs(model)
    with hf.recorded_choices(model) as eager_choices:
        eager = hf.run(model, inputs)
    with hf.recorded_choices(model) as choices:
        got = hf.run(model, inputs, call=torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(choices) == hf.NUM_MOE_LAYERS
    assert all(torch.equal(a, b) for a, b in zip(choices, eager_choices))
    worst = hf.measure(got, eager, hf.reference(model, inputs, choices), torch.finfo(torch.bfloat16).eps)
    assert worst.ratio <= 1, worst


def test_measure_sees_what_is_wrong() -> None:
    model = hf.build("olmoe")
    inputs = hf.example_inputs(model)
    eager, ref = hf.run(model, inputs), hf.reference(model, inputs)
    assert hf.measure(eager, eager, ref, EPS).ratio < 1

    def changed(name: str, value: torch.Tensor | None) -> hf.Run:
        return dataclasses.replace(eager, grads={**eager.grads, name: value})

    name = "model.layers.1.mlp.experts.down_proj"
    grad = eager.grads[name]
    assert grad is not None
    slightly_off = grad.clone()
    slightly_off[3] *= 1 + 1e-3
    poisoned = grad.clone()
    poisoned[3, 0, 0] = float("nan")
    for value in (slightly_off, poisoned, None):
        worst = hf.measure(changed(name, value), eager, ref, EPS)
        assert worst.name == name
        assert worst.ratio > 1
    assert hf.measure(changed(name, poisoned), eager, ref, EPS).ratio == float("inf")
    # an expert without tokens: the reference has no gradient, zeros are welcome, anything else is not
    none_ref = dataclasses.replace(ref, grads={**ref.grads, name: None})
    none_eager = changed(name, None)
    assert hf.measure(changed(name, torch.zeros_like(grad)), none_eager, none_ref, EPS).ratio < 1
    assert hf.measure(eager, none_eager, none_ref, EPS).ratio == float("inf")
