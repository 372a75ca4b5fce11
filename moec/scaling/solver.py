"""Least squares for the law, many data sets at once.

    L = c + A n^-alpha (1 + h (G^-gamma - 1)) + B m^-beta,      n = N / N0,  m = D / D0

is the law with N0, D0 the geometric means of the runs: A and B are what size and data cost in the middle of the grid, h =
g/(g + a) is the share of the size term that depends on G. These are known well even where a, b, g at N = D = 1 are not, which
is what makes the problem easy. h may be negative: finer experts may hurt.

Minimized is the sum of Huber's loss of the residuals plus priors: on c as given, and wide ones on h and the logarithms of the
exponents, which keep them finite where the runs say nothing. Starts come from variable projection: over a grid of exponents the
law is linear in (c, A, A h, B), solved exactly; the best few go on with Levenberg-Marquardt. A bootstrap is one call with a row
per resample.

Shape letters: B data sets, R runs, P = 7 parameters in the order of `Params`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moec.scaling.law import Floats

HUBER = 0.1  # nats; as in the paper (section 5.2). Larger residuals count linearly
EXPONENTS = 0.13, 0.13, 0.6  # alpha, beta, gamma: centers of their priors
EXPONENT_WIDTH = 1.5  # standard deviation of the prior on the logarithm of each: a factor of 4.5 either way
SHARE_WIDTH = 1.0  # standard deviation of the prior on h, around 0
_STARTS = 6
_LOG_RANGE = 3.0  # exponents stay within exp(+-3) of their centers


class Params(NamedTuple):
    """Indices into the last axis of a [B, P] array."""

    c: int = 0
    log_a: int = 1
    h: int = 2
    log_b: int = 3
    log_alpha: int = 4
    log_beta: int = 5
    log_gamma: int = 6


P = Params()


@dataclass(frozen=True)
class Design:
    """The runs without their losses: log n, log m and log G, each [R]; N0 and D0."""

    log_n: Floats
    log_m: Floats
    log_g: Floats
    n0: float
    d0: float


@dataclass(frozen=True)
class Prior:
    """c is near `c`, give or take `width`, nats; `noise` of one run, nats, says what a prior weighs. All standard deviations."""

    c: float
    width: float
    noise: float


def centers(prior: Prior) -> Floats:
    """[P] where the priors have their centers; 0 where there is none."""
    return np.array([prior.c, 0.0, 0.0, 0.0, *np.log(EXPONENTS)])


def widths(prior: Prior) -> Floats:
    """[P] standard deviations of the priors; inf where there is none."""
    return np.array([prior.width, np.inf, SHARE_WIDTH, np.inf, *(EXPONENT_WIDTH,) * 3])


def design(total_params: Floats, tokens: Floats, granularity: Floats) -> Design:
    """Of runs with N total parameters, D tokens and granularity G, each [R]."""
    log_n, log_d = np.log(total_params), np.log(tokens)
    return Design(
        log_n - log_n.mean(),
        log_d - log_d.mean(),
        np.log(granularity),
        float(np.exp(log_n.mean())),
        float(np.exp(log_d.mean())),
    )


def predict(runs: Design, params: Floats) -> Floats:
    """[B, R] losses of [B, P] parameters."""
    return _terms(runs, params)[0]


def jacobian(runs: Design, params: Floats) -> Floats:
    """[B, R, P] derivatives of `predict`."""
    _, size, data, grain, share = _terms(runs, params)
    alpha, beta, gamma = (np.exp(params[:, i : i + 1]) for i in (P.log_alpha, P.log_beta, P.log_gamma))
    h = params[:, P.h : P.h + 1]
    columns = (
        np.ones_like(size),
        size * share,
        size * (grain - 1),
        data,
        -alpha * runs.log_n * size * share,
        -beta * runs.log_m * data,
        -gamma * runs.log_g * size * h * grain,
    )
    return np.stack(columns, axis=-1)


def _terms(runs: Design, params: Floats) -> tuple[Floats, ...]:
    c, log_a, h, log_b, *logs = (params[:, i : i + 1] for i in range(len(P)))
    alpha, beta, gamma = (np.exp(log) for log in logs)
    size = np.exp(log_a - alpha * runs.log_n)
    data = np.exp(log_b - beta * runs.log_m)
    grain = np.exp(-gamma * runs.log_g)
    share = 1 + h * (grain - 1)
    return c + size * share + data, size, data, grain, share


def solve(runs: Design, losses: Floats, prior: Prior, middle: Floats, start: Floats, steps: int = 60) -> Floats:
    """[B, P] parameters for [B, R] losses, from [B, P] starts: Levenberg-Marquardt with Huber's weights.

    `middle` [B, P] are the centers of the priors, which a bootstrap draws anew as it does the losses.
    """
    params, damping = start.copy(), np.full(len(losses), 1e-3)
    precision = (prior.noise / widths(prior)) ** 2
    value = _objective(runs, losses, precision, middle, params)
    for _ in range(steps):
        residual = losses - predict(runs, params)
        weight = np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-12))
        slope = jacobian(runs, params)
        weighted = slope * weight[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ slope
        gradient = (np.swapaxes(weighted, 1, 2) @ residual[..., None])[..., 0] + precision * (middle - params)
        normal += np.diag(precision)
        diagonal = np.einsum("bii->bi", normal)
        damped = normal + np.eye(len(P)) * (damping[:, None] * diagonal)[:, None, :]
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        trial = _clip(params + step)
        new = _objective(runs, losses, precision, middle, trial)
        better = new < value
        gained = np.where(better, value - new, 0.0)
        params = np.where(better[:, None], trial, params)
        value = np.where(better, new, value)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-12, 1e8)
        if np.all(gained <= 1e-9 * value) and np.all((damping > 1) | better):
            break
    return params


def fit(runs: Design, losses: Floats, prior: Prior) -> Floats:
    """[P] parameters for [R] losses: variable projection over a grid of exponents, then `solve` from the best."""
    starts = projected(runs, losses, prior)
    many = np.repeat(losses[None], len(starts), axis=0)
    middle = np.broadcast_to(centers(prior), starts.shape)
    found = solve(runs, many, prior, middle, starts, steps=200)
    precision = (prior.noise / widths(prior)) ** 2
    return np.asarray(found[int(np.argmin(_objective(runs, many, precision, middle, found)))])


def projected(runs: Design, losses: Floats, prior: Prior) -> Floats:
    """[B, P] starts: the best points of a grid of exponents, the rest solved exactly."""
    factors = np.exp(np.linspace(-1.5, 1.5, 9))
    alpha, beta, gamma = (
        axis.ravel()[:, None] for axis in np.meshgrid(*(center * factors for center in EXPONENTS), indexing="ij")
    )
    size, data = np.exp(-alpha * runs.log_n), np.exp(-beta * runs.log_m)
    grain = np.exp(-gamma * runs.log_g)
    columns = np.stack([np.ones_like(size), size, size * (grain - 1), data], axis=-1)
    pull = np.array([(prior.noise / prior.width) ** 2, 1e-9, 1e-9, 1e-9])
    normal = np.swapaxes(columns, 1, 2) @ columns + np.eye(4) * pull
    right = np.swapaxes(columns, 1, 2) @ losses + pull * np.array([prior.c, 0, 0, 0])
    c, a, ah, b = np.linalg.solve(normal, right[..., None])[..., 0].T
    wrong = losses - (columns @ np.stack([c, a, ah, b], axis=-1)[..., None])[..., 0]
    score = (wrong**2).sum(axis=1) + ((c - prior.c) * prior.noise / prior.width) ** 2 + 1e9 * ((a <= 0) | (b <= 0))
    best = np.argsort(score)[:_STARTS]
    a, b = np.maximum(a, 1e-3), np.maximum(b, 1e-3)
    logs = [np.log(x[:, 0]) for x in (alpha, beta, gamma)]
    return np.stack([c, np.log(a), ah / a, np.log(b), *logs], axis=-1)[best]


def _objective(runs: Design, losses: Floats, precision: Floats, middle: Floats, params: Floats) -> Floats:
    size = np.abs(losses - predict(runs, params))
    huber = np.where(size <= HUBER, size**2, HUBER * (2 * size - HUBER)).sum(axis=1)
    return np.asarray(huber + (precision * (params - middle) ** 2).sum(axis=1))


def _clip(params: Floats) -> Floats:
    """Keeps exponents and logarithms where exp is finite, and h below 1: a = A (1 - h) is positive."""
    low, high = np.full(len(P), -30.0), np.full(len(P), 30.0)
    low[P.log_alpha :], high[P.log_alpha :] = np.log(EXPONENTS) - _LOG_RANGE, np.log(EXPONENTS) + _LOG_RANGE
    low[P.h], high[P.h] = -5.0, 0.99
    return np.clip(params, low, high)
