"""What two later laws say about granularity, each in its own convention, beside the plan of this one.

Efficiency Leverage (Ling, arXiv 2507.17702), G = 2 d_model / d_expert: how many times more compute a dense model needs,

    EL = A^ ^ (a + d log10 C + gamma (log2 G)^2 + beta log2 G),   1/A^ = 1/(A + 1/(1/A_start - 1/A_max)) + 1/A_max

with A the share of experts active. The bases of the logarithms are not stated where this was read; only log2 G with log10 C gives
both figures that the paper states (G* = 11.3, and EL above 7 at A = 3.1 %, G = 12, C = 1e22; here 7.24).

Zhao et al. (arXiv 2509.23678), G = number of active experts, S = share of shared experts: the loss has the factor
(e G + f/G + m S^2 + n S) over everything that depends on size, so the best G is sqrt(f/e) whatever the budget.

Both sets of coefficients come from secondary notes and were not checked against the papers. They are second opinions: nothing is
planned with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.scaling.costs import FF_RATIO
from moec.scaling.optimum import Plan

_A, _D, _GAMMA, _BETA, _START, _MAX = 1.23, -7.61e-2, 1.67e-2, -1.17e-1, 1.63e-2, 5.28e16
_E, _F, _K, _H = 0.1577, 7.2446, 0.0013, 0.045
_ALPHA = 0.2383  # of Zhao et al.'s N and N_a
_DIFFERENT = 2.0  # opinions differ where their G differ by more than this factor


@dataclass(frozen=True)
class Opinion:
    """What a law advises: `own` in its convention, `paper` as 4 d_model / d_expert, `planned` the plan's G in its convention.

    `worth` is what it thinks of moving from the plan's G to its own, in `unit`.
    """

    law: str
    convention: str
    own: float
    paper: float
    planned: float
    worth: float
    unit: str
    disagrees: bool


def leverage(active_share: float, g: float, flops: float) -> float:
    """EL: by how much more compute a dense model of equal loss needs. G = 2 d_model / d_expert, C in FLOPs."""
    shifted = active_share + 1 / (1 / _START - 1 / _MAX)
    saturated = 1 / (1 / shifted + 1 / _MAX)
    grain = math.log2(g)
    return float(saturated ** (_A + _D * math.log10(flops) + _GAMMA * grain**2 + _BETA * grain))


def leverage_optimum() -> float:
    """The G that maximizes EL, whatever the rest: 2^(-beta / 2 gamma) = 11.3."""
    return float(2 ** (-_BETA / (2 * _GAMMA)))


def active_experts_factor(k: float) -> float:
    """e k + f / k of Zhao et al., without shared experts: what the size terms of their loss are multiplied with."""
    return _E * k + _F / k


def size_terms(total: float, active: float) -> float:
    """N^-alpha + k N_a^-alpha + h N_a / N of Zhao et al.: what that factor stands before. Parameters as they count them."""
    return float(total**-_ALPHA + _K * active**-_ALPHA + _H * active / total)


def active_experts_optimum() -> float:
    """sqrt(f / e) = 6.8 active experts."""
    return math.sqrt(_F / _E)


def second_opinions(plan: Plan) -> tuple[Opinion, ...]:
    """Both laws on a plan. Zhao's count of active experts is taken for the paper's G, since there a token visits G experts."""
    best, ours = leverage_optimum(), plan.granularity * 2 / FF_RATIO
    share = plan.top_k / plan.num_experts
    gain = leverage(share, best, plan.flops) / leverage(share, ours, plan.flops) - 1
    k = active_experts_optimum()
    size = size_terms(plan.total_params, plan.active_params)
    nats = (active_experts_factor(plan.top_k) - active_experts_factor(k)) * size
    return (
        _opinion(
            "Efficiency Leverage", "2 d_model / d_expert", best, best * FF_RATIO / 2, ours, plan, gain, "of compute"
        ),
        _opinion("Zhao et al.", "number of active experts", k, k, plan.top_k, plan, nats, "nats of loss"),
    )


def _opinion(
    law: str, convention: str, own: float, paper: float, planned: float, plan: Plan, worth: float, unit: str
) -> Opinion:
    differs = abs(math.log(paper / plan.granularity)) > math.log(_DIFFERENT)
    return Opinion(law, convention, own, paper, planned, worth, unit, differs)
