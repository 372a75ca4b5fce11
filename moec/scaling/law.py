"""The law: what loss a fine-grained MoE reaches, given its size, its data and its granularity.

    L(N, D, G) = c + (g / G^gamma + a) / N^alpha + b / D^beta

Equation 9 of Krajewski, Ludziejewski et al., "Scaling Laws for Fine-Grained Mixture of Experts" (arXiv 2402.07871). N counts
*total* non-embedding parameters without routers, D training tokens (less than one epoch), G = d_ff / d_expert with d_ff = 4 *
d_model; L is in nats per token. E does not appear: each expansion rate has coefficients of its own.

Not here: what a FLOP or a second buys (`costs`, `device`), the best N, D, G for it (`optimum`), and where the law was not
measured (`limits`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.scaling.errors import ScalingError

Floats = NDArray[np.float64]
Real = float | Floats  # one number, or an array of them


@dataclass(frozen=True)
class Measured:
    """The runs behind a fit: the least and the most of each quantity, and their context in tokens (None: unknown)."""

    total_params: tuple[float, float]
    tokens: tuple[float, float]
    granularity: tuple[float, float]
    context: int | None


# Tables 3 and 4 and Appendix A of the paper. The fit code leaves out G >= 32. Of the runs with E = 16 no list was seen.
PAPER_RUNS = Measured(total_params=(129e6, 3.7e9), tokens=(16e9, 130e9), granularity=(1.0, 16.0), context=256)


@dataclass(frozen=True)
class Coefficients:
    """One fit of the law. `expansion` is the E of the runs behind it (1: dense, 0: unknown); `source` says where it stands."""

    name: str
    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float
    expansion: float
    source: str
    measured: Measured = PAPER_RUNS


_PAPER = "arXiv 2402.07871"
PUBLISHED = (
    Coefficients(
        "e64", 18.0712, 0.1146, 30.8082, 0.1465, 2.0760, 0.5843, 0.472, 64,
        "unrounded: comment in scaling_laws/plotND.py of llm-random/llm-random, branch scaling_laws_paper",
    ),
    Coefficients("e64-rounded", 18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47, 64, f"{_PAPER}, Table 1"),
    Coefficients("e64-heldout", 17.6, 0.114, 26.7, 0.140, 2.07, 0.570, 0.472, 64, f"{_PAPER}, Table 5: best 20% held out"),
    Coefficients("e16", 19.64, 0.124, 57.07, 0.169, 1.18, 0.986, 0.472, 16, f"{_PAPER}, Table 8"),
    Coefficients("dense", 16.3, 0.126, 26.7, 0.127, 0.0, 1.0, 0.47, 1, f"{_PAPER}, Table 1: no MoE, G means nothing"),
)  # fmt: skip
_DEFAULTS = ("e64", "e16")  # what an expansion rate is looked up in


def loss(law: Coefficients, n: Real, d: Real, g: Real) -> Floats:
    """Nats per token at N total parameters, D tokens, granularity G; the three broadcast. Equation 9."""
    n, d, g = (np.asarray(x, dtype=np.float64) for x in (n, d, g))
    return np.asarray(law.c + size_term(law, g) * n**-law.alpha + law.b * d**-law.beta)


def size_term(law: Coefficients, g: Real) -> Floats:
    """g / G^gamma + a: what stands over N^alpha."""
    return np.asarray(law.g * np.asarray(g, dtype=np.float64) ** -law.gamma + law.a)


def compute_ratio(law: Coefficients, before: float, after: float) -> float:
    """By how much compute multiplies, at equal loss, when G goes from `after` back to `before`, with routing free.

    [(g/G1^gamma + a) / (g/G2^gamma + a)]^(1/alpha): N enters the loss through (g/G^gamma + a)/N^alpha alone and compute is
    proportional to N at fixed D, so the ratio is the same at every budget. G2 = inf is allowed.
    """
    return float((size_term(law, before) / size_term(law, after)) ** (1 / law.alpha))


def published(name: str) -> Coefficients:
    """The set of that name. Raises ScalingError listing the names there are."""
    found = next((law for law in PUBLISHED if law.name == name), None)
    if found is None:
        names = ", ".join(law.name for law in PUBLISHED)
        raise ScalingError(
            f"no coefficients are called {name!r}; say one of {names}, or a JSON file that moec fit wrote"
        )
    return found


def for_expansion(expansion: float) -> Coefficients:
    """The set fitted at the nearest E, on a log scale: 64 (unrounded) or 16."""
    return min((published(n) for n in _DEFAULTS), key=lambda law: abs(np.log(law.expansion / expansion)))
