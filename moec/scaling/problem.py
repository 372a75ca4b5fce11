"""One G at a time: the width that a given compute is best spent on, and how much compute a G is worth.

    tokens = min(compute / price of a token, tokens there are),     memory of the parameters <= memory there is

The loss is minimized over d_model, a real number, on a grid in its logarithm that is zoomed in on: no derivative is needed, so
that the price may as well be a measured table. Compute is in FLOPs; with a `Device` it is seconds times its rate of plain
products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moec.scaling import costs as cost
from moec.scaling.costs import Costs
from moec.scaling.device import Device, rest_rate, seconds_per_token
from moec.scaling.errors import ScalingError
from moec.scaling.law import Coefficients, Floats, loss

WIDTHS = (8.0, 3e6)  # d_model: where the optimum is looked for
_BUDGETS = (1e6, 1e36)  # FLOPs: where an implied budget is looked for
_MOST = math.log(1e4)  # how much more compute is tried to make up for a worse G
_GRID = 129


@dataclass(frozen=True)
class Choice:
    """The best width and tokens at one G."""

    granularity: float
    d_model: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """What is asked: a law, what tokens cost, and what there is of data (tokens) and memory (bytes)."""

    law: Coefficients
    expansion: float
    costs: Costs
    device: Device | None
    granularities: tuple[float, ...]
    tokens: float
    memory: float
    bytes_per_param: float


def price(problem: Problem, d: Floats, g: float) -> Floats:
    """Of one token in a model of width d: FLOPs, or with a table seconds times the rate of plain products."""
    if problem.device is None:
        return cost.flops_per_token(d, cost.blocks(d), problem.expansion, g, problem.costs)
    rate = rest_rate(problem.device, problem.costs)
    return rate * seconds_per_token(problem.device, d, problem.expansion, g, problem.costs)


def memory(problem: Problem, d: float, g: float) -> float:
    """Bytes of the parameters of a model of width d, routers included."""
    n = cost.blocks(d)
    params = cost.total_params(d, n, problem.expansion) + cost.router_params(d, n, problem.expansion, g)
    return problem.bytes_per_param * float(params)


def best(problem: Problem, compute: float) -> Choice:
    """The best of all its granularities."""
    return min((search(problem, compute, g) for g in problem.granularities), key=lambda found: found.loss)


def search(problem: Problem, compute: float, g: float) -> Choice:
    """The best at one G. Raises ScalingError where no model fits the memory."""
    low, high = math.log(WIDTHS[0]), _widest(problem, g)
    for _ in range(4):
        log_d = np.linspace(low, high, _GRID)
        d = np.exp(log_d)
        tokens = np.minimum(compute / price(problem, d, g), problem.tokens)
        losses = loss(problem.law, cost.total_params(d, cost.blocks(d), problem.expansion), tokens, g)
        i = int(np.argmin(losses))
        low, high = float(log_d[max(i - 1, 0)]), float(log_d[min(i + 1, _GRID - 1)])
    return Choice(g, float(d[i]), float(tokens[i]), float(losses[i]))


def worth(problem: Problem, compute: float, before: float, after: float) -> float:
    """How many times the compute G = `before` needs for the loss of G = `after`, routing or measured time charged to both.

    inf where the limits on tokens and memory do not let it.
    """
    if before == after:
        return 1.0
    target = search(problem, compute, after).loss

    def short(log: float) -> float:
        return search(problem, compute * math.exp(log), before).loss - target

    low, high = (0.0, _MOST) if short(0.0) > 0 else (-_MOST, 0.0)
    return math.inf if short(high) > 0 else math.exp(_falling_zero(short, low, high))


def implied(problem: Problem, share: Callable[[Choice], float]) -> float:
    """The compute at whose optimum `share` is 1: it grows with compute, but for small jumps where G changes.

    First over all G to learn which one it is, then for that one alone, where there are no jumps.
    """
    low, high = (math.log(x) for x in _BUDGETS)
    coarse = _bisect(lambda x: share(best(problem, math.exp(x))) >= 1, low, high, 1e-2)
    g = best(problem, math.exp(coarse)).granularity
    return math.exp(_bisect(lambda x: share(search(problem, math.exp(x), g)) >= 1, low, high, 1e-9))


def _widest(problem: Problem, g: float) -> float:
    """log of the largest d_model that fits the memory."""
    low, high = (math.log(w) for w in WIDTHS)
    if math.isinf(problem.memory):
        return high
    if memory(problem, WIDTHS[0], g) > problem.memory:
        raise ScalingError(
            f"memory of {problem.memory:g} bytes holds no model at all; give more, or fewer bytes per parameter"
        )
    return _bisect(lambda x: memory(problem, math.exp(x), g) > problem.memory, low, high, 1e-12)


def _falling_zero(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling f is zero, between f(low) > 0 >= f(high): regula falsi with the Illinois rule."""
    at_low, at_high = f(low), f(high)
    for _ in range(60):
        middle = high if at_low == at_high else low + (high - low) * at_low / (at_low - at_high)
        value = f(middle)
        if abs(value) < 1e-9 or high - low < 1e-9:
            return middle
        if value > 0:
            low, at_low, at_high = middle, value, at_high / 2
        else:
            high, at_high, at_low = middle, value, at_low / 2
    return middle


def _bisect(reached: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """The last point, within the tolerance, where `reached` is still false."""
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low
