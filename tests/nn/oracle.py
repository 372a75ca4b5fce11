"""What `moec.nn.MoE` means, written again: every expert on every token by `vmap`, times a dense matrix of weights.

    want = oracle.dense(layer, x)

Who goes where is decided in loops over plain Python numbers. Only the logits, the parameters and the settings are read from the
layer; nothing of `moec.nn` or of the `moec::` ops is called.

Shape letters: T tokens, K top-k, E experts, D model width, B sequences, L their length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec.nn
from moec.nn import ExpertChoice, TokenChoice

D, WIDTH, EXPANSION, G = 8, 16, 3, 2  # 6 experts of width 8, two for each token

ACTIVATIONS = {
    "relu": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "relu2": lambda h: torch.where(h > 0, h * h, torch.zeros_like(h)),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h / (1 + torch.exp(-h)),
}

SIGMOID = TokenChoice(score="sigmoid", normalize=True, bias=True, scale=2.5, num_groups=3, top_groups=2)

# name -> (router, capacity factor)
ROUTERS: dict[str, tuple[str | TokenChoice | ExpertChoice, float | None]] = {
    **{name: (name, None) for name in ("softmax", "softmax_normalized", "topk_softmax", "sigmoid")},
    "sigmoid-groups": (SIGMOID, None),
    "softmax-bias": (TokenChoice(bias=True), None),
    **{f"{name}-order": (name, 0.6) for name in ("softmax", "softmax_normalized", "topk_softmax", "sigmoid")},
    "softmax-score": (TokenChoice(drop="score"), 0.6),
    "softmax_normalized-score": (TokenChoice(normalize=True, drop="score"), 0.6),
    "topk_softmax-score": (TokenChoice(after=True, drop="score"), 0.6),
    "sigmoid-groups-score": (TokenChoice(**{**vars(SIGMOID), "drop": "score"}), 0.6),
    "ample": ("softmax", 6.0),
    **{f"expert_choice-{group}": (ExpertChoice(group), None) for group in ("position", "sequence", "all")},
    "expert_choice-half": (ExpertChoice("all"), 0.5),
    "expert_choice-more": (ExpertChoice("position"), 1.7),
}


def build(name: str = "softmax", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> moec.nn.MoE:
    """A layer with the router of that name; biases of all kinds are random, so that their absence would show."""
    torch.manual_seed(seed)
    router, capacity_factor = ROUTERS[name]
    sizes = {"d_model": D, "d_ff": WIDTH, "expansion": EXPANSION, "granularity": G}
    settings = {**sizes, "router": router, "capacity_factor": capacity_factor, "init_scale": 1.0, **changes}
    layer = moec.nn.MoE(**settings)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if key.endswith("bias"):
                p.normal_()
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.normal_(std=0.3)
    return layer.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(layer: moec.nn.MoE, x: Tensor) -> Tensor:
    """x [..., D] -> the same shape, differentiable in x and all parameters."""
    x_TD, experts = x.reshape(-1, x.shape[-1]), layer.experts
    biases = [b for b in (experts.up_proj.bias, experts.down_proj.bias) if b is not None]
    body = torch.func.vmap(
        lambda up, down, *b: _body(x_TD, up, down, *(b or (None, None)), experts.body.activation, experts.body.gated)
    )
    y_ETD = body(experts.up_proj.weight, experts.down_proj.weight, *biases)
    out = torch.einsum("te,etd->td", _weights(layer, x).to(x.dtype), y_ETD)
    if layer.output_norm is not None:
        centered = out - out.mean(-1, keepdim=True)
        out = centered / (centered.square().mean(-1, keepdim=True) + layer.output_norm.eps).sqrt()
        out = out * layer.output_norm.weight + layer.output_norm.bias
    if layer.shared is not None:
        up, down = layer.shared.up_proj, layer.shared.down_proj
        out = out + _body(x_TD, up.weight, down.weight, up.bias, down.bias, experts.body.activation, experts.body.gated)
    return out.view(x.shape)


def _body(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool
) -> Tensor:
    h = F.linear(x, up, up_bias)
    if gated:
        width = h.shape[-1] // 2
        h = ACTIVATIONS[act](h[..., :width]) * h[..., width:]
    else:
        h = ACTIVATIONS[act](h)
    return F.linear(h, down, down_bias)


def _weights(layer: moec.nn.MoE, x: Tensor) -> Tensor:
    """[T, E]: the weight of every expert for every token, zero where it was not chosen or the slot was dropped."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.reshape(-1, x.shape[-1]).to(dtype) @ layer.router.weight.to(dtype).T
    settings, num_experts = layer.router.settings, logits.shape[1]
    if isinstance(settings, ExpertChoice):
        probs = logits.softmax(-1)
        return probs * _mask(_taken_by_experts(layer, probs, x), num_experts)
    scores = torch.sigmoid(logits) if settings.score == "sigmoid" else logits.softmax(-1)
    chosen = _chosen_by_tokens(layer, logits if settings.after else scores)
    mask = _mask([set(row) for row in chosen], num_experts)
    if settings.after:
        weights = (logits.exp() * mask) / (logits.exp() * mask).sum(-1, keepdim=True)
    else:
        weights = scores * mask
        if settings.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
    return settings.scale * weights * _mask(_admitted(layer, chosen, scores), num_experts)


def _mask(rows: list[set[int]], num_experts: int) -> Tensor:
    return torch.tensor([[e in row for e in range(num_experts)] for row in rows], dtype=torch.bool).view(
        -1, num_experts
    )


def _chosen_by_tokens(layer: moec.nn.MoE, scores: Tensor) -> list[list[int]]:
    """For each token its K experts, best first."""
    s = layer.router.settings
    bias = [0.0] * scores.shape[1] if layer.router.expert_bias is None else layer.router.expert_bias.tolist()
    found = []
    for row in scores.tolist():
        value = [a + b for a, b in zip(row, bias)]
        size = len(value) // s.num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(s.num_groups)]
        groups.sort(key=lambda members: -sum(sorted((value[e] for e in members), reverse=True)[:2]))
        allowed = [e for members in groups[: s.top_groups] for e in members]
        found.append(sorted(allowed, key=lambda e: -value[e])[: layer.top_k])
    return found


def _admitted(layer: moec.nn.MoE, chosen: list[list[int]], scores: Tensor) -> list[set[int]]:
    """For each token the experts that had room."""
    kept: list[set[int]] = [set() for _ in chosen]
    tokens, num_experts = scores.shape
    slots = [(t, e) for t, row in enumerate(chosen) for e in row]
    room = len(slots)
    if layer.capacity_factor is not None:
        room = math.ceil(layer.capacity_factor * tokens * layer.top_k / num_experts - 1e-9)
    if layer.router.settings.drop == "score":
        values = scores.tolist()
        slots.sort(key=lambda slot: -values[slot[0]][slot[1]])
    taken = [0] * num_experts
    for t, e in slots:
        if taken[e] < room:
            taken[e] += 1
            kept[t].add(e)
    return kept


def _taken_by_experts(layer: moec.nn.MoE, probs: Tensor, x: Tensor) -> list[set[int]]:
    """For each token the experts that took it."""
    tokens, num_experts = probs.shape
    taken: list[set[int]] = [set() for _ in range(tokens)]
    length = x.shape[-2] if x.dim() > 2 else 1
    group = layer.router.settings.group if x.dim() > 2 else "all"
    if group == "position":
        groups = [list(range(position, tokens, length)) for position in range(length)]
    elif group == "sequence":
        groups = [list(range(start, start + length)) for start in range(0, tokens, length)]
    else:
        groups = [list(range(tokens))]
    factor = layer.capacity_factor or 1.0
    values = probs.tolist()
    for members in groups:
        room = math.ceil(factor * len(members) * layer.top_k / num_experts - 1e-9)
        for e in range(num_experts):
            for t in sorted(members, key=lambda t: -values[t][e])[:room]:
                taken[t].add(e)
    return taken


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Of x and every parameter, for a fixed cotangent; zeros where there is none."""
    named = {"x": x, **dict(module.named_parameters())}
    probe = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(named.values()), probe, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}
