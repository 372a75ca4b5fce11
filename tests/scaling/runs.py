"""Runs drawn from the law: a grid of three sizes, three lengths and five granularities, as small as one can learn from."""

import numpy as np

from moec.scaling import Coefficients, loss
from moec.scaling.rows import Run

GRANULARITIES = (1, 2, 4, 8, 16)
WIDTHS = (256, 384, 512)
TOKENS = (0.25e9, 1e9, 4e9)


def drawn(
    law: Coefficients,
    random: np.random.Generator,
    noise: float = 0.003,
    granularities: tuple[float, ...] = GRANULARITIES,
    widths: tuple[int, ...] = WIDTHS,
    tokens: tuple[float, ...] = TOKENS,
) -> list[Run]:
    """One run for each point of the grid (45 by default), E = 64, with Gaussian noise in nats."""
    shapes = [(516 * w**3 / 64, d, g) for w in widths for d in tokens for g in granularities]
    return [
        Run(n, d, g, float(loss(law, n, d, g)) + random.normal(0, noise), run=str(i), expansion=64)
        for i, (n, d, g) in enumerate(shapes)
    ]
