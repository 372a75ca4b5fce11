"""Real transformers decoders, small, with random weights: build one, run it, and measure a run against float64.

    model = hf.build("mixtral", dtype=torch.bfloat16)
    inputs = hf.example_inputs(model)
    with hf.recorded_choices(model) as choices:
        got = hf.run(model, inputs, call=torch.compile(model, backend="moec"))
    eager = hf.run(model, inputs, choices=choices)
    ref = hf.reference(model, inputs, choices=choices)
    worst = hf.measure(got, eager, ref, torch.finfo(torch.bfloat16).eps)
    assert worst.ratio <= 1, worst

Where rounding changes which experts a token visits, two runs are different functions and cannot be compared; so the choices
of the run under test are recorded and forced on the other two, which compute the weights from their own scores.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Widths are multiples of 8, since torch's grouped GEMM wants rows of 16 bytes, and otherwise odd. Two MoE layers each.
_COMMON = {
    "vocab_size": 96,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# name -> (config class, model class, what differs)
_MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 56, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "moe_intermediate_size": 24,
            "intermediate_size": 72,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "moe_intermediate_size": 24,
            "intermediate_size": 72,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 8,
            "max_position_embeddings": 131072,  # what its YaRN factor expects
        },
    ),
}
NAMES = tuple(_MODELS)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
NUM_MOE_LAYERS = 2

Grads = dict[str, Tensor | None]


@dataclass(frozen=True)
class Run:
    """Logits [B, S, V] and the gradient of the loss for every parameter by name, None where there is none."""

    logits: Tensor
    grads: Grads

    def tensors(self) -> Grads:
        return {"logits": self.logits, **self.grads}


@dataclass(frozen=True)
class Worst:
    """The tensor closest to its bound, or furthest past it: `ratio` is error / bound, and at most one when all is well."""

    ratio: float
    name: str
    error: float
    eager_error: float
    norm: float

    def __str__(self) -> str:
        return (
            f"{self.name}: ||got - ref|| = {self.error:.3g}, {self.ratio:.2f} times the bound; "
            f"||eager - ref|| = {self.eager_error:.3g}, ||ref|| = {self.norm:.3g}"
        )


def config(name: str, **changes: object) -> transformers.PreTrainedConfig:
    config_class, _, own = _MODELS[name]
    return getattr(transformers, config_class)(**{**_COMMON, **own, **changes})


def build(
    name: str,
    implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: object,
) -> nn.Module:
    """A decoder in training mode (none has dropout). `changes` are fields of its config, such as `num_hidden_layers`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    cfg = config(name, **changes)
    model_class = getattr(transformers, _MODELS[name][1])
    model = model_class._from_config(cfg, attn_implementation="eager", experts_implementation=implementation)
    _randomize(model, seed)
    model.to(dtype)
    if dtype != torch.float64:
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):  # from_pretrained keeps this one in float32
                buffer.data = buffer.data.float()
    return model.train()


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """The library's own initial values are small, and zero for biases, some routers and the correction bias."""
    generator = torch.Generator().manual_seed(seed)
    buffers = {k: b for k, b in model.named_buffers() if k.endswith("e_score_correction_bias")}
    for key, value in sorted({**dict(model.named_parameters()), **buffers}.items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1 and "norm" in key:
            value.copy_(1 + 0.1 * noise)
        elif key.endswith(("bias", "sinks")) or "_bias" in key:
            value.copy_(0.1 * noise)
        else:
            value.copy_(noise / value.shape[-1] ** 0.5)


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of every MoE layer, in order. Their third output is the ids of the chosen experts, [T, K]."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def experts(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def example_inputs(model: nn.Module, batch: int = 2, seq: int = 17, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(model.config.vocab_size, (batch, seq), generator=generator)}


def loss_of(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Next-token cross-entropy over all positions (the last one predicts the first), so that one token is enough."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype).flatten(0, 1), inputs["input_ids"].roll(-1, dims=1).flatten())


def run(
    model: nn.Module,
    inputs: dict[str, Tensor],
    call: Callable[..., object] | None = None,
    choices: Sequence[Tensor] | None = None,
) -> Run:
    """Forward and backward. `call` is the compiled model, if it is not `model` itself that runs; `choices` are forced."""
    if call is not None and choices is not None:
        raise ValueError("choices are forced on an eager model; record them from the compiled one instead")
    model.zero_grad(set_to_none=True)
    with nullcontext() if choices is None else _Replay(model, choices):
        logits = (model if call is None else call)(**inputs).logits
    loss_of(logits, inputs).backward()
    grads = {key: None if p.grad is None else p.grad.detach().clone() for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return Run(logits.detach().clone(), grads)


def reference(model: nn.Module, inputs: dict[str, Tensor], choices: Sequence[Tensor] | None = None) -> Run:
    """The eager implementation with the same weights in float64, its internal casts to float32 included."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    with _Widen():
        return run(exact, inputs, choices=choices)


def measure(got: Run, eager: Run, ref: Run, eps: float) -> Worst:
    """||got - ref|| <= 2 ||eager - ref|| + 4 eps ||ref|| for the logits and every gradient; the worst tensor by error / bound.

    Where the reference has no gradient, `got` may have none or zeros. Where it has one, an eager loop that skipped an expert
    may still leave None, which counts as zeros; `got` may do so only if the reference is zero.
    """
    if got.grads.keys() != ref.grads.keys():
        raise ValueError(f"different parameters: {sorted(got.grads.keys() ^ ref.grads.keys())}")
    found = []
    for name, exact in ref.tensors().items():
        value, plain = got.tensors()[name], eager.tensors()[name]
        template = next((t for t in (exact, value, plain) if t is not None), None)
        if template is None:
            continue
        zeros = torch.zeros(template.shape, dtype=torch.float64)
        exact_, value_, plain_ = (zeros if t is None else t.double().cpu() for t in (exact, value, plain))
        if value_.shape != exact_.shape:
            raise ValueError(f"{name}: shape {tuple(value_.shape)}, the reference has {tuple(exact_.shape)}")
        error, eager_error, norm = ((value_ - exact_).norm(), (plain_ - exact_).norm(), exact_.norm())
        bound = 2 * eager_error + 4 * eps * norm
        # not `error <= bound`: NaN must come out as infinitely bad
        ratio = float(error / bound) if bool(error > 0) else 0.0 if bool(error == 0) else float("inf")
        ratio = float("inf") if ratio != ratio else ratio
        found.append(Worst(ratio, name, float(error), float(eager_error), float(norm)))
    return max(found, key=lambda worst: worst.ratio)


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, after one forward of `model`, compiled or not, the expert ids [T, K] of each MoE layer.

    The hooks are part of what Dynamo traces, so enter this before the first call of a compiled model.
    """
    choices: list[Tensor] = []

    def record(_module: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        choices.append(output[2].detach())

    handles = [router.register_forward_hook(record) for router in routers(model)]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


class _Replay(TorchFunctionMode):
    """The last `topk` of each router returns the given ids, and the scores found there.

    Every router here ends in one `topk(k=top_k)` over all experts, and either uses the values it returns or gathers its
    scores at the ids. DeepSeek's choice of groups is over fewer columns and stays as it is.
    """

    def __init__(self, model: nn.Module, choices: Sequence[Tensor]) -> None:
        super().__init__()
        found = routers(model)
        if len(choices) != len(found):
            raise ValueError(f"{len(choices)} recorded choices for {len(found)} routers")
        self.pending = list(choices)
        self.shape = {(router.num_experts, router.top_k) for router in found}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        scores, k = args[0], kwargs.get("k", args[1] if len(args) > 1 else None)
        if (scores.shape[-1], k) not in self.shape:
            return func(*args, **kwargs)
        ids = self.pending.pop(0).to(scores.device)
        return torch.return_types.topk((scores.gather(-1, ids), ids))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if exc[0] is None and self.pending:
            raise RuntimeError(f"{len(self.pending)} recorded choices were never asked for")


class _Widen(TorchFunctionMode):
    """Casts to float32 become casts to float64: routers and norms ask for float32 by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*wide, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})
