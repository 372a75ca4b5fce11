"""transformers' own decoders, unedited, through the backend: one graph, every MoE layer rewritten, as near to float64."""

import contextlib
import warnings

import pytest
import torch

from . import hf, layers

CASES = [
    *[("eager", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)],
    *[("grouped_mm", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],  # torch's has no float64
    ("batched_mm", torch.float32),
]


def check(name: str, implementation: str, dtype: torch.dtype, options: dict[str, object] | None = None) -> None:
    model = hf.build(name, implementation, dtype)
    inputs = hf.example_inputs(model)
    backend, results = layers.kept(options)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    with hf.recorded_choices(model) if sixteen_bit else contextlib.nullcontext() as choices:
        got = hf.run(model, inputs, call=compiled)
    plain = hf.build(name, "eager", dtype)
    eager, ref = hf.run(plain, inputs, choices=choices), hf.reference(plain, inputs, choices=choices)
    worst = hf.measure(got, eager, ref, torch.finfo(dtype).eps)
    assert worst.ratio <= 1, worst
    assert len(results) == 1
    assert layers.statuses(results) == ["rewritten"] * hf.NUM_MOE_LAYERS


@pytest.mark.parametrize(("implementation", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("name", hf.NAMES)
def test_trains(name: str, implementation: str, dtype: torch.dtype) -> None:
    """AOTAutograd sees nothing in float64 and float16 that it does not see in the other two, and takes its time."""
    check(name, implementation, dtype, {"moec.inner": "eager"} if dtype in (torch.float64, torch.float16) else None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), [("mixtral", "eager"), ("gpt_oss", "grouped_mm")])
def test_trains_with_inductor(name: str, implementation: str) -> None:
    check(name, implementation, torch.float32, {"moec.inner": "inductor"})


@pytest.mark.parametrize(("name", "implementation"), [("qwen3_moe", "eager"), ("deepseek_v3", "grouped_mm")])
def test_infers(name: str, implementation: str) -> None:
    model = hf.build(name, implementation).eval()
    inputs = hf.example_inputs(model)
    backend, results = layers.kept({"moec.inner": "eager"})
    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
        want = model(**inputs).logits
    torch.testing.assert_close(got, want)
    assert layers.statuses(results) == ["rewritten"] * hf.NUM_MOE_LAYERS


def test_sequence_lengths() -> None:
    """Batch and length change: the MoE layer is not what recompiles."""
    model = hf.build("olmoe")
    backend, results = layers.kept({"moec.inner": "eager"})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seq in (9, 17, 33, 64):
        inputs = hf.example_inputs(model, seq=seq)
        got, want = hf.run(model, inputs, call=compiled), hf.run(model, inputs)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert len(results) <= 2
    assert set(layers.statuses(results)) == {"rewritten"}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_decodes_with_a_cache(implementation: str) -> None:
    """Five tokens at once, then one by one, beside eager: what `generate` does."""
    model = hf.build("mixtral", implementation, use_cache=True).eval()
    ids = hf.example_inputs(model, seq=8)["input_ids"]
    backend, results = layers.kept({"moec.inner": "eager"})

    def decode(call: object) -> list[torch.Tensor]:
        out = call(input_ids=ids[:, :5], use_cache=True)
        steps = [out.logits]
        for i in range(5, 8):
            out = call(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        return steps

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = decode(torch.compile(model, backend=backend)), decode(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert set(layers.statuses(results)) == {"rewritten"}


def test_generates() -> None:
    """`model.generate` with its forward compiled, as transformers' documentation tells people to."""
    model = hf.build("mixtral", use_cache=True).eval()
    ids = hf.example_inputs(model, seq=5)["input_ids"]
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    backend, results = layers.kept({"moec.inner": "eager"})
    model.forward = torch.compile(model.forward, backend=backend)
    got = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, want)
    assert set(layers.statuses(results)) == {"rewritten"}


def test_gradient_checkpointing() -> None:
    """transformers wraps each decoder layer in torch.utils.checkpoint: the regions lie in the bodies."""
    model = hf.build("olmoe")
    inputs = hf.example_inputs(model)
    eager, ref = hf.run(model, inputs), hf.reference(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    backend, results = layers.kept()
    got = hf.run(model, inputs, call=torch.compile(model, backend=backend))
    worst = hf.measure(got, eager, ref, torch.finfo(torch.float32).eps)
    assert worst.ratio <= 1, worst
    assert layers.statuses(results) == ["rewritten"] * hf.NUM_MOE_LAYERS


def test_router_logits_and_auxiliary_loss() -> None:
    """What else is made of the router's scores stays: the load-balancing loss is differentiated beside the rewritten region."""
    model = hf.build("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    inputs = hf.example_inputs(model)
    backend, results = layers.kept()
    outs = []
    for call in (torch.compile(model, backend=backend), model):
        model.zero_grad()
        out = call(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        outs.append((out.loss, out.aux_loss, {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(outs[0][:2], outs[1][:2])
    torch.testing.assert_close(outs[0][2], outs[1][2], rtol=1e-3, atol=1e-5)
    assert layers.statuses(results) == ["rewritten"] * hf.NUM_MOE_LAYERS
