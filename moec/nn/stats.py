"""What a router did, for logging. Computed when asked for, outside of any graph; `layer.record` says what is kept.

Shape letters: T tokens, K top-k, E experts, C slots of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .routing import Routing, TokenRouting, count


@dataclass(frozen=True)
class Stats:
    """One forward of one layer; scalars are tensors without dimensions, on the device of the layer.

    routing            what the router gave out, detached: `TokenRouting` or `ExpertRouting`
    tokens_per_expert  [E] int64, slots that were computed
    load_cv            standard deviation over mean of tokens_per_expert; 0 when even
    entropy            mean over tokens of the entropy of the router's probabilities, in nats; log(E) when it knows nothing
    drop_rate          share of slots that found their expert full; for expert choice, of tokens that no expert took
    """

    routing: Routing
    tokens_per_expert: Tensor
    load_cv: Tensor
    entropy: Tensor
    drop_rate: Tensor


@torch.no_grad()
def describe(routing: Routing, probabilities_TE: Tensor, num_experts: int) -> Stats:
    """The statistics of one routing. All are zero where there are no tokens."""
    tokens = probabilities_TE.shape[0]
    if isinstance(routing, TokenRouting):
        load = count(routing.ids, num_experts)
        dropped, of = (routing.ids == num_experts).sum(), routing.ids.numel()
    else:
        load = torch.full((num_experts,), routing.tokens.shape[1], device=routing.tokens.device)
        dropped, of = (count(routing.tokens, tokens) == 0).sum(), tokens
    mean = load.double().mean()
    entropy = torch.special.entr(probabilities_TE).sum() / max(tokens, 1)
    return Stats(
        routing, load, load.double().std(unbiased=False) / mean.clamp(min=1e-300), entropy, dropped / max(of, 1)
    )
