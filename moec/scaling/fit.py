"""The law from runs: coefficients with intervals, and an honest "not identifiable" where the runs cannot say.

    fit = fit_runs(read_runs("rows.csv"))
    fit.estimates["gamma"]        # value, 80 % interval, identifiable or why not
    gain(fit, 1, 8)               # by how much compute the law says G = 8 saves over G = 1

Intervals are 10 to 90 % of a wild bootstrap: the residuals, each divided by 1 - its leverage (as a jackknife does: the fit hugs
the runs it was made from), keep their size and get random signs, one sign for all branches of a trunk, whose noise is shared. The
priors are drawn anew in each resample: where runs say nothing, the interval is the prior's, instead of nothing at all. `solver`
has the minimization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moec.scaling import solver
from moec.scaling.errors import ScalingError, positive
from moec.scaling.law import Coefficients, Floats, compute_ratio
from moec.scaling.rows import Run, measured
from moec.scaling.solver import Design, P, Params, Prior

PRIOR_C = (
    0.472,
    0.2,
)  # every published fit has c = 0.47, per token of GPT-2; bytes of prose have an entropy of about 0.4 nats
LEVEL = (10.0, 90.0)  # percentiles of the intervals
_FIRST_NOISE = 0.01  # nats: what priors weigh until the residuals tell
_SPAN = 2.0  # an exponent whose interval spans more than this factor is not identified
_NAMES = ("a", "alpha", "b", "beta", "g", "gamma", "c")


@dataclass(frozen=True)
class Estimate:
    """A number with its 80 % interval. `doubt` says why it is not identifiable; "" where it is."""

    value: float
    low: float
    high: float
    doubt: str = ""

    @property
    def identifiable(self) -> bool:
        return not self.doubt


@dataclass(frozen=True)
class Fit:
    """The law of some runs. `residuals` [R] in nats; `noise` and `seed_noise` (None: no repeated runs) are standard deviations.

    `samples` [B, P] are the parameters of the resamples, as `solver.Params`, over `design`.
    """

    coefficients: Coefficients
    estimates: Mapping[str, Estimate]
    runs: tuple[Run, ...]
    residuals: Floats
    noise: float
    seed_noise: float | None
    prior: Prior
    design: Design
    samples: Floats

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why what is not identifiable is not, each reason once."""
        return tuple(dict.fromkeys(e.doubt for e in self.estimates.values() if e.doubt))


def fit_runs(
    runs: Sequence[Run],
    prior_c: tuple[float, float] = PRIOR_C,
    resamples: int = 400,
    seed: int = 0,
    source: str = "moec fit",
) -> Fit:
    """Fits the law. `prior_c` is center and standard deviation of c, nats. The same runs and seed give the same fit.

    Raises ScalingError for fewer than four runs; with few or one-sided ones it fits, and says what is not identifiable.
    """
    positive(prior_c[1], "the width of the prior on c")
    if len(runs) < 4:
        raise ScalingError(f"{len(runs)} runs are too few to fit anything; make a sweep over d_model, tokens and G")
    n, d, g, losses = (
        np.array([getattr(r, k) for r in runs]) for k in ("total_params", "tokens", "granularity", "loss")
    )
    design = solver.design(n, d, g)
    prior = Prior(*prior_c, _FIRST_NOISE)
    found = solver.fit(design, losses, prior)
    for _ in range(2):  # noise says what priors weigh, and they move the residuals a little
        residuals = losses - solver.predict(design, found[None])[0]
        prior = Prior(*prior_c, _noise(residuals, _leverage(design, found, prior)))
        found = solver.solve(design, losses[None], prior, solver.centers(prior)[None], found[None])[0]
    residuals = losses - solver.predict(design, found[None])[0]
    noise = _noise(residuals, _leverage(design, found, prior))
    samples = _bootstrap(design, found, residuals, prior, runs, resamples, seed)
    doubts = _structure(runs)
    law = coefficients(design, found, runs, source)
    many = [coefficients(design, sample, runs, source) for sample in samples]
    estimates = {k: _estimate(getattr(law, k), [getattr(s, k) for s in many], k, doubts, prior) for k in _NAMES}
    spread = _seed_noise(runs)
    return Fit(law, estimates, tuple(runs), residuals, noise, spread, prior, design, samples)


def coefficients(design: Design, params: Floats, runs: Sequence[Run], source: str) -> Coefficients:
    """[P] parameters as the law has them, at N = D = 1."""
    p = Params(*params.tolist())
    alpha, beta, gamma = math.exp(p.log_alpha), math.exp(p.log_beta), math.exp(p.log_gamma)
    size, data = math.exp(p.log_a) * design.n0**alpha, math.exp(p.log_b) * design.d0**beta
    expansion = runs[0].expansion
    return Coefficients(
        "fit", size * (1 - p.h), alpha, data, beta, size * p.h, gamma, p.c, expansion, source, measured(runs)
    )


def gain(fit: Fit, before: float, after: float) -> Estimate:
    """`compute_ratio` with its interval: how much less compute G = `after` needs than `before` at equal loss, routing free."""
    draws = [compute_ratio(coefficients(fit.design, s, fit.runs, ""), before, after) for s in fit.samples]
    low, high = np.percentile(draws, LEVEL)
    grains = sorted({r.granularity for r in fit.runs})
    needed = [fit.estimates["alpha"].doubt]
    if before not in grains or after not in grains:
        needed.append(fit.estimates["gamma"].doubt)
    doubt = next((d for d in needed if d), "") if len(grains) > 1 else fit.estimates["gamma"].doubt
    return Estimate(compute_ratio(fit.coefficients, before, after), float(low), float(high), doubt)


def _leverage(design: Design, params: Floats, prior: Prior) -> Floats:
    """[R] how much each run pulls its own prediction: the diagonal of J (J'J + prior)^-1 J'."""
    slope = solver.jacobian(design, params[None])[0]
    weights = np.diag((prior.noise / solver.widths(prior)) ** 2 + 1e-12)
    inverse = np.linalg.solve(slope.T @ slope + weights, slope.T)
    return np.asarray(np.clip(np.einsum("rp,pr->r", slope, inverse), 0.0, 0.99))


def _noise(residuals: Floats, leverage: Floats) -> float:
    free = max(len(residuals) - float(leverage.sum()), 1.0)
    return max(math.sqrt(float((residuals**2).sum()) / free), 1e-6)


def _bootstrap(
    design: Design, found: Floats, residuals: Floats, prior: Prior, runs: Sequence[Run], resamples: int, seed: int
) -> Floats:
    random = np.random.default_rng(seed)
    names = {name: i for i, name in enumerate(dict.fromkeys(r.run for r in runs))}
    group = np.array([names[r.run] for r in runs])
    signs = random.choice([-1.0, 1.0], (resamples, len(names)))[:, group]
    spread = residuals / (1 - _leverage(design, found, prior))
    losses = solver.predict(design, found[None]) + signs * spread
    widths = solver.widths(prior)
    known = np.isfinite(widths)
    middle = np.repeat(solver.centers(prior)[None], resamples, axis=0)
    middle[:, known] += random.normal(0.0, widths[known], (resamples, int(known.sum())))
    return solver.solve(design, losses, prior, middle, np.repeat(found[None], resamples, axis=0))


def _structure(runs: Sequence[Run]) -> dict[str, str]:
    """Coefficient -> why these runs cannot tell it, whatever their losses."""
    doubts: dict[str, str] = {}
    sizes, tokens, grains = (
        _distinct([getattr(r, k) for r in runs]) for k in ("total_params", "tokens", "granularity")
    )
    if len(runs) <= len(P):
        doubts |= dict.fromkeys(
            _NAMES, f"{len(runs)} runs cannot tell {len(P)} coefficients; make at least {2 * len(P)}"
        )
    if grains == 1:
        doubts |= dict.fromkeys(("g", "gamma"), "G never varies; make runs with two other granularities")
    if grains == 2:
        doubts |= dict.fromkeys(
            ("g", "gamma"), "two granularities give one difference, any gamma explains it; add a third"
        )
    if sizes == 1:
        doubts |= dict.fromkeys(("a", "alpha", "g"), "N never varies; make runs with other d_model")
    if tokens == 1:
        doubts |= dict.fromkeys(
            ("b", "beta"), "D never varies: its term is a constant like c; train for other numbers of tokens"
        )
    return doubts


def _distinct(values: list[float]) -> int:
    """How many values there are, within 2 %."""
    return len({round(math.log(v) / 0.02) for v in values})


def _estimate(value: float, draws: list[float], name: str, doubts: Mapping[str, str], prior: Prior) -> Estimate:
    low, high = (float(x) for x in np.percentile(draws, LEVEL))
    doubt = doubts.get(name, "")
    if not doubt and name in ("alpha", "beta", "gamma") and high > _SPAN * low:
        doubt = f"{name} is anywhere in {low:.3g}..{high:.3g}: the runs are too few, too noisy or too alike"
    if not doubt and name == "c" and high - low > 0.8 * 2 * 1.2816 * prior.width:
        doubt = "c is known from its prior alone; longer runs and larger models would tell"
    return Estimate(value, low, high, doubt)


def _seed_noise(runs: Sequence[Run]) -> float | None:
    """Pooled standard deviation of runs that differ in nothing but their seed."""
    same: dict[tuple[float, float, float], dict[str, float]] = {}
    for r in runs:
        same.setdefault((r.total_params, r.tokens, r.granularity), {})[r.seed] = r.loss
    repeated = [np.array(list(losses.values())) for losses in same.values() if len(losses) > 1]
    if not repeated:
        return None
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in repeated)
    return math.sqrt(squares / sum(len(x) - 1 for x in repeated))
