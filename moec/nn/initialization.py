"""How weights start. The paper (arXiv 2402.07871, appendix A) takes a truncated normal of reduced scale.

    weight ~ normal with std = sqrt(scale / fan_in), cut off at +-2 * scale, scale = 0.1

That is what its code does (llm-random, `lizrd/core/initialization.py`). fan_in of a down projection is top_k * d_expert, all that
a token sees: d_ff, whatever the granularity (their option `use_topk_initialization`; without it they take all experts).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .choices import choose


def truncated_normal(weight: Tensor, fan_in: int, scale: float) -> None:
    """The paper's, in place."""
    nn.init.trunc_normal_(weight, std=(scale / fan_in) ** 0.5, a=-2 * scale, b=2 * scale)


def uniform(weight: Tensor, fan_in: int, scale: float) -> None:
    """`nn.Linear`'s times `scale`, in place: uniform within +-scale / sqrt(fan_in)."""
    nn.init.uniform_(weight, -scale * fan_in**-0.5, scale * fan_in**-0.5)


Init = Callable[[Tensor, int, float], None]

INITS: dict[str, Init] = {"truncated_normal": truncated_normal, "uniform": uniform}


def initializer(name: str) -> Init:
    """Raises ValueError for a name that is not in INITS."""
    return choose("init", name, INITS)
