"""A small decoder around any MoE layer: embedding, (norm, causal attention, norm, MoE) per layer, norm, head.

    Decoder(vocab_size, d_model, num_heads, [make_moe() for _ in range(2)])

One layer for each MoE given.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for h in self.qkv(x_BTD).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, d_model: int, num_heads: int, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(d_model), Attention(d_model, num_heads)
        self.moe_norm, self.moe = RMSNorm(d_model), moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.moe(self.moe_norm(x_BTD))


class Decoder(nn.Module):
    """Maps token ids [B, T] to logits [B, T, vocab_size]."""

    def __init__(self, vocab_size: int, d_model: int, num_heads: int, moes: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, num_heads, moe) for moe in moes)
        self.norm = RMSNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        x_BTD = self.embedding(token_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.norm(x_BTD))
