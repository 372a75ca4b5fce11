"""All declared layers of a model at once, for the training loop.

    loss = cross_entropy(model(ids), targets) + moec.nn.aux_loss(model)
    loss.backward(); optimizer.step(); moec.nn.update_biases(model)

A layer with coefficients leaves its loss of the last forward in `layer.aux_loss`, a tensor in the graph of autograd. That works
in eager, under torch.compile (an attribute that is set is one more output), under DDP (each process has the loss of its own
tokens, gradients are averaged) and under `torch.utils.checkpoint` with use_reentrant=False. Only checkpointing inside a compiled
region objects to attributes being set: Dynamo breaks the graph there, and says that
`torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True` avoids it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .moe import MoE


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of `layer.aux_loss` over all layers of the model, each already times its coefficient: a scalar to add to the loss.

    Raises RuntimeError where no layer has one: no coefficients were given, or there was no forward in training.
    """
    losses = [layer.aux_loss for layer in layers(model) if layer.aux_loss is not None]
    if not losses:
        raise RuntimeError(
            "no layer has an auxiliary loss: give moec.nn.MoE balance_loss=0.01 or z_loss=0.001, and call the model in training"
        )
    return torch.stack(losses).sum()


def update_biases(model: nn.Module, rate: float = 1e-3) -> None:
    """`update_bias(rate)` of every layer whose router keeps a bias. Raises RuntimeError where none does."""
    found = [layer for layer in layers(model) if layer.router.expert_bias is not None]
    if not found:
        raise RuntimeError("no router keeps a bias: take router='sigmoid' or TokenChoice(bias=True)")
    for layer in found:
        layer.update_bias(rate)


def layers(model: nn.Module) -> Iterator[MoE]:
    """All `moec.nn.MoE` in a model, compiled or not."""
    return (module for module in model.modules() if isinstance(module, MoE))
