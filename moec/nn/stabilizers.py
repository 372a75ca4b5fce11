"""What keeps routers in balance: the Switch loss, the z-loss, and the bias of loss-free balancing.

Functions of one layer's routing. `moe` says when they are called, `model` how a training loop reads them.

Shape letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import count


def balance_loss(probabilities_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """E * sum over e of (share of slots that chose e) * (mean probability of e), a scalar; 1 when even.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4-6, for any K. Slots count before capacity; only
    probabilities have a gradient.
    """
    tokens, num_experts = probabilities_TE.shape
    share_E = count(chosen_TK, num_experts) / max(tokens * chosen_TK.shape[1], 1)
    mean_E = probabilities_TE.sum(dim=0) / max(tokens, 1)
    return num_experts * (share_E * mean_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, a scalar. Zoph et al. 2022 (arXiv 2202.08906), equation 5."""
    return logits_TE.logsumexp(dim=-1).square().sum() / max(logits_TE.shape[0], 1)


def updated_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias [E] + rate * sign(mean load - load [E]), the load summed over all processes of torch.distributed."""
    if bias.dtype in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"the router's expert_bias is {bias.dtype}, in which steps of {rate} get lost: keep it in float32, "
            "layer.router.expert_bias = layer.router.expert_bias.float()"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        load = load.clone()
        torch.distributed.all_reduce(load)
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)
