"""The decoder of "Scaling Laws for Fine-Grained Mixture of Experts" (arXiv 2402.07871): pre-norm, d_ff = 4 * d_model.

    FineGrainedDecoder(vocab_size, d_model=256, num_blocks=4, make_moe=lambda d_model, d_ff: MoE(d_model, d_ff, ...))

Token and position embedding, then per block x + attention(norm(x)) and x + moe(norm(x)), norm, head; causal attention of
d_model / 64 heads, no biases. A block has d_model**2 * (8 * expansion + 4) parameters in matrices, routers left out. The MoE
layer is passed in: anything that maps [B, T, D] to itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal, of d_model / head width heads: x [B, T, D] -> [B, T, D]."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for h in self.qkv(x_BTD).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(d_model), Attention(d_model, num_heads)
        self.moe_norm, self.moe = nn.LayerNorm(d_model), moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.moe(self.moe_norm(x_BTD))


class FineGrainedDecoder(nn.Module):
    """Maps token ids [B, T] (int64), T at most `max_length`, to logits [B, T, vocab_size].

    `make_moe(d_model, d_ff)` is called once for each block, with d_ff = 4 * d_model. `init_scale`: weights are a truncated normal
    of standard deviation sqrt(init_scale / fan_in), as in the paper. Raises ValueError where heads do not divide the width.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_blocks: int,
        make_moe: Callable[[int, int], nn.Module],
        *,
        num_heads: int | None = None,
        max_length: int = 256,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__()
        heads = max(d_model // 64, 1) if num_heads is None else num_heads
        if d_model % heads:
            raise ValueError(f"{heads} heads do not divide d_model={d_model}: pass num_heads, a divisor of {d_model}")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_length, d_model)
        self.blocks = nn.ModuleList()
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for _ in range(num_blocks):
            block = Block(d_model, heads, make_moe(d_model, 4 * d_model))
            _truncated_normal(block.attention.qkv, init_scale)
            _truncated_normal(block.attention.out, init_scale)
            self.blocks.append(block)
        _truncated_normal(self.head, init_scale)
        for embedding in (self.embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens, more than max_length={self.max_length}: pass a larger max_length")
        x_BTD = self.embedding(token_ids) + self.position_embedding.weight[:length]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


def _truncated_normal(linear: nn.Linear, scale: float) -> None:
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=(scale / linear.in_features) ** 0.5, a=-2 * scale, b=2 * scale)
