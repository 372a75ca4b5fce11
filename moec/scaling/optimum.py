"""The best width, tokens and granularity for what there is: compute, time, data, memory, or a size one has in mind.

    plan(published("e64"), Budget(flops=1.93e20), expansion=64)      # G = 16, 28.8e9 tokens, 1.0e9 active parameters

For every G in {1, 2, 4, ..., 256} (as the paper's code does) `problem` finds the best d_model, a real number; `buildable` rounds
it. The price of a token is FLOPs (`costs`) or, with a measured table, seconds (`device`). Where no compute is given, the budget
is the one whose own optimum has just these tokens, this memory or this many active parameters: "my data ends at 3e9 tokens"
means the model that is compute-optimal for 3e9 tokens, and what it costs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from moec.scaling import costs as cost
from moec.scaling.costs import TRAINING_BYTES, WIDTH_PER_BLOCK, Costs
from moec.scaling.device import Device, measured_granularities, rest_rate, seconds_per_token
from moec.scaling.errors import ScalingError, positive
from moec.scaling.law import Coefficients, loss
from moec.scaling.problem import WIDTHS, Problem, best, implied, memory, price, search, worth

GRANULARITIES = tuple(2.0**i for i in range(9))


@dataclass(frozen=True)
class Budget:
    """What there is. `flops` or `seconds` (which needs a Device); `tokens`; `memory` in bytes; or `active_params` wanted."""

    flops: float | None = None
    seconds: float | None = None
    tokens: float | None = None
    memory: float | None = None
    active_params: float | None = None
    bytes_per_param: float = TRAINING_BYTES


@dataclass(frozen=True)
class Alternative:
    """Another G for the same budget: its loss, and by how much compute must grow for the loss of the best (inf: it cannot)."""

    granularity: float
    d_model: float
    tokens: float
    loss: float
    extra_compute: float


@dataclass(frozen=True)
class Plan:
    """One training run. Parameters are non-embedding; `flops` are those of the law; `memory` in bytes, routers included.

    `bound_by` names the limits that held the optimum back ("tokens", "memory"). `seconds` only with a Device.
    """

    expansion: float
    granularity: float
    d_model: float
    n_blocks: float
    d_expert: float
    num_experts: float
    top_k: float
    tokens: float
    active_params: float
    total_params: float
    flops: float
    loss: float
    memory: float
    seconds: float | None = None
    bound_by: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


def plan(
    law: Coefficients,
    budget: Budget,
    expansion: float,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    device: Device | None = None,
    granularities: tuple[float, ...] = GRANULARITIES,
) -> Plan:
    """The best run within `budget`. Raises ScalingError for a budget that is empty, negative, or too small for any model.

    With a `device`, only powers of two between the coarsest and the finest layer measured are considered.
    """
    problem, compute = pose(law, budget, expansion, costs, device, granularities)
    found = best(problem, compute)
    g, d = found.granularity, found.d_model
    if not WIDTHS[0] * 1.01 < d < WIDTHS[1] / 1.01:
        raise ScalingError(
            f"the best d_model would be {d:g}, the edge of what is searched; the budget is too small or too large"
        )
    held = {"tokens": found.tokens / problem.tokens, "memory": memory(problem, d, g) / problem.memory}
    others = [search(problem, compute, other) for other in problem.granularities]
    alternatives = tuple(
        Alternative(**asdict(o), extra_compute=worth(problem, compute, o.granularity, g) - 1) for o in others
    )
    result = describe(
        law,
        expansion,
        costs,
        device,
        budget.bytes_per_param,
        g=g,
        d_model=d,
        n_blocks=d / WIDTH_PER_BLOCK,
        tokens=found.tokens,
    )
    return replace(result, bound_by=tuple(n for n, share in held.items() if share > 0.9999), alternatives=alternatives)


def pose(
    law: Coefficients,
    budget: Budget,
    expansion: float,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    device: Device | None = None,
    granularities: tuple[float, ...] = GRANULARITIES,
) -> tuple[Problem, float]:
    """(what `plan` solves, the compute there is for it); raises as `plan` does."""
    positive(expansion, "expansion")
    cost.check_costs(costs)
    _check(budget, device)
    if device is not None:
        measured = measured_granularities(device, expansion)
        granularities = tuple(g for g in granularities if g in measured)
    if not granularities:
        raise ScalingError(
            "no granularity is left to choose from; measure layers whose G = 4 * d_model / d_expert is a power of two"
        )
    problem = _problem(law, budget, expansion, costs, device, granularities)
    return problem, _compute(problem, budget)


def describe(
    law: Coefficients,
    expansion: float,
    costs: Costs,
    device: Device | None,
    bytes_per_param: float,
    *,
    g: float,
    d_model: float,
    n_blocks: float,
    tokens: float,
) -> Plan:
    """The run with these choices, optimal or not."""
    total = float(cost.total_params(d_model, n_blocks, expansion))
    routers = float(cost.router_params(d_model, n_blocks, expansion, g))
    seconds = None
    if device is not None:
        each = float(seconds_per_token(device, d_model, expansion, g, costs))
        seconds = tokens * each * n_blocks / float(cost.blocks(d_model))
    return Plan(
        expansion=expansion,
        granularity=g,
        d_model=d_model,
        n_blocks=n_blocks,
        d_expert=cost.FF_RATIO * d_model / g,
        num_experts=g * expansion,
        top_k=g,
        tokens=tokens,
        active_params=float(cost.active_params(d_model, n_blocks)),
        total_params=total,
        flops=tokens * float(cost.flops_per_token(d_model, n_blocks, expansion, g, costs)),
        loss=float(loss(law, total, tokens, g)),
        memory=bytes_per_param * (total + routers),
        seconds=seconds,
    )


def buildable(law: Coefficients, budget: Budget, found: Plan, costs: Costs, device: Device | None = None) -> Plan:
    """`found` with d_model rounded to a whole number of blocks (down where memory binds), tokens set to spend as much."""
    n = found.n_blocks
    n_blocks = max(math.floor(n + 1e-9) if "memory" in found.bound_by else round(n), 1)
    d_model = float(WIDTH_PER_BLOCK * n_blocks)
    problem = _problem(law, budget, found.expansion, costs, device, (found.granularity,))
    before, after = (float(price(problem, np.asarray(d), found.granularity)) for d in (found.d_model, d_model))
    tokens = min(found.tokens * before / after, problem.tokens)
    g, per_param = found.granularity, budget.bytes_per_param
    return describe(
        law, found.expansion, costs, device, per_param, g=g, d_model=d_model, n_blocks=n_blocks, tokens=tokens
    )


def _check(budget: Budget, device: Device | None) -> None:
    given = {n: getattr(budget, n) for n in ("flops", "seconds", "tokens", "memory", "active_params")}
    for name, value in given.items():
        if value is not None:
            positive(value, f"the budget in {name.replace('_', ' ')}")
    positive(budget.bytes_per_param, "bytes per parameter")
    if all(value is None for value in given.values()):
        raise ScalingError("no budget: give flops, seconds, tokens, memory or active parameters")
    if budget.flops is not None and budget.seconds is not None:
        raise ScalingError("flops and seconds are both given; keep one of them")
    if budget.seconds is not None and device is None:
        raise ScalingError(
            "a budget in seconds needs a measured table: --device measured.json, from python -m moec.scaling.measure"
        )
    if budget.active_params is not None and any(given[n] is not None for n in ("flops", "seconds")):
        raise ScalingError(
            "active parameters already say how much compute is right; leave out flops and seconds, or them"
        )


def _problem(
    law: Coefficients,
    budget: Budget,
    expansion: float,
    costs: Costs,
    device: Device | None,
    granularities: tuple[float, ...],
) -> Problem:
    tokens, memory = (math.inf if x is None else x for x in (budget.tokens, budget.memory))
    return Problem(law, expansion, costs, device, granularities, tokens, memory, budget.bytes_per_param)


def _compute(problem: Problem, budget: Budget) -> float:
    """The budget in units of price: given, or implied by size, tokens or memory."""
    if budget.flops is not None:
        return budget.flops
    if budget.seconds is not None:
        assert problem.device is not None
        return budget.seconds * rest_rate(problem.device, problem.costs)
    free = replace(problem, tokens=math.inf, memory=math.inf)
    if budget.active_params is not None:
        width = (budget.active_params * WIDTH_PER_BLOCK / 12) ** (1 / 3)
        return implied(free, lambda found: found.d_model / width)
    if budget.tokens is not None:
        return implied(free, lambda found: found.tokens / problem.tokens)
    return implied(free, lambda found: memory(problem, found.d_model, found.granularity) / problem.memory)
