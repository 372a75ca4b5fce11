"""What a layer really costs here: a measured table takes the place of the FLOPs of MoE layers, and the break-even rule.

FLOPs say that finer experts cost nothing but routing. A machine says otherwise: tiles run half empty, gathers grow. The table
holds training time (forward and backward) of single MoE layers; `moec.scaling.measure` writes one, any tool may. JSON:

    {"machine": "2 cores of ...", "dtype": "float32", "flops_per_second": 1.1e11,
     "rows": [{"d_model": 256, "d_expert": 1024, "num_experts": 8, "top_k": 1, "tokens_per_second": 41000.0}, ...]}

or CSV with these five columns; `seconds_per_token` may stand instead of `tokens_per_second`. `flops_per_second` is the rate of
plain matrix products, forward and backward; it prices everything that is not an MoE layer, and turns a budget in FLOPs into
seconds. Without it (and in CSV) the best rate among the rows is taken.

Between rows, FLOPs per second of the layer (routing not counted as FLOPs, but in the time) is interpolated over log d_model, then
over log G; beyond the widths measured the nearest is taken, which `limits` flags; beyond the G measured nothing is planned.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moec.scaling.costs import FF_RATIO, Costs, blocks
from moec.scaling.errors import ScalingError
from moec.scaling.law import Coefficients, Floats, Real, compute_ratio

_SHAPE = ("d_model", "d_expert", "num_experts", "top_k")


@dataclass(frozen=True)
class LayerTime:
    """Training time of one MoE layer: seconds per token, forward and backward, routing included."""

    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    seconds_per_token: float

    @property
    def granularity(self) -> float:
        return FF_RATIO * self.d_model / self.d_expert

    @property
    def expansion(self) -> float:
        return self.num_experts / self.granularity

    def rate(self, costs: Costs) -> float:
        """FLOP/s of the experts' own products: 2 matrices of d_model * d_expert for each of top_k."""
        return costs.per_param * 2 * self.d_model * self.d_expert * self.top_k / self.seconds_per_token


@dataclass(frozen=True)
class Device:
    """A measured machine. `rate` in FLOP/s prices what is not an MoE layer; None: the best rate among the rows."""

    machine: str
    rows: tuple[LayerTime, ...]
    rate: float | None = None


@dataclass(frozen=True)
class Doubling:
    """Granularity doubled from `before`: how much longer a token takes (0.1: 10 %), and how much longer it may take."""

    before: float
    after: float
    slowdown: float
    allowed: float

    @property
    def pays(self) -> bool:
        return self.slowdown < self.allowed


def read_device(path: str | Path) -> Device:
    """Reads a table as described above. Raises ScalingError naming the row and the column that cannot be used."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix.lower() == ".csv":
        rows: object = list(csv.DictReader(text.splitlines()))
        head: dict[str, object] = {}
    else:
        try:
            data = json.loads(text)
        except ValueError as bad:
            raise ScalingError(f"{path} is not JSON ({bad}); write it with python -m moec.scaling.measure") from bad
        head = data if isinstance(data, dict) else {"rows": data}
        rows = head.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ScalingError(f'{path} has no rows; the table is a list under "rows" (JSON) or one line per layer (CSV)')
    rate = head.get("flops_per_second")
    if rate is not None:
        rate = _number(rate, f"{path}: flops_per_second")
    times = tuple(_layer_time(row, f"{path}, row {i + 1}") for i, row in enumerate(rows))
    return Device(str(head.get("machine", path.name)), times, rate)


def _layer_time(row: object, where: str) -> LayerTime:
    if not isinstance(row, dict):
        raise ScalingError(f"{where} is not an object; each row has {', '.join(_SHAPE)} and tokens_per_second")
    shape = {name: int(_number(row.get(name), f"{where}: {name}")) for name in _SHAPE}
    if shape["top_k"] > shape["num_experts"]:
        raise ScalingError(
            f"{where}: top_k {shape['top_k']} is more than num_experts {shape['num_experts']}; correct the row"
        )
    if row.get("seconds_per_token") not in (None, ""):
        seconds = _number(row["seconds_per_token"], f"{where}: seconds_per_token")
    else:
        seconds = 1 / _number(row.get("tokens_per_second"), f"{where}: tokens_per_second (or seconds_per_token)")
    return LayerTime(**shape, seconds_per_token=seconds)


def _number(value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ScalingError(f"{what} is {value!r}; give a number above zero")
    return number


def matching_rows(device: Device, expansion: float) -> tuple[LayerTime, ...]:
    """The rows whose E is nearest to `expansion`, on a log scale."""
    distance = [abs(math.log(row.expansion / expansion)) for row in device.rows]
    return tuple(row for row, far in zip(device.rows, distance) if far < min(distance) + 0.05)


def rest_rate(device: Device, costs: Costs) -> float:
    """FLOP/s of everything that is not an MoE layer."""
    return device.rate or max(row.rate(costs) for row in device.rows)


def measured_granularities(device: Device, expansion: float) -> tuple[float, ...]:
    """The powers of two between the coarsest and the finest layer measured."""
    gs = [row.granularity for row in matching_rows(device, expansion)]
    powers = (2.0**i for i in range(-2, 13))
    return tuple(g for g in powers if min(gs) * 0.99 <= g <= max(gs) * 1.01)


@functools.lru_cache(maxsize=64)
def _rates(device: Device, expansion: float, costs: Costs) -> tuple[tuple[float, list[float], list[float]], ...]:
    """For every G measured, coarsest first: G, log d_model and log FLOP/s of its layers."""
    by_g: dict[float, list[tuple[float, float]]] = {}
    for row in matching_rows(device, expansion):
        by_g.setdefault(row.granularity, []).append((math.log(row.d_model), math.log(row.rate(costs))))
    return tuple((g, [x for x, _ in sorted(by_g[g])], [y for _, y in sorted(by_g[g])]) for g in sorted(by_g))


def seconds_per_token(device: Device, d_model: Real, expansion: float, g: float, costs: Costs) -> Floats:
    """Of the whole model, forward and backward: n blocks of a measured MoE layer and 4 d^2 of attention at `rest_rate`."""
    d = np.asarray(d_model, dtype=np.float64)
    rates = _rates(device, expansion, costs)
    finer = min(max(sum(grain < g for grain, _, _ in rates), 1), len(rates) - 1)
    (g0, widths0, rates0), (g1, widths1, rates1) = rates[max(finer - 1, 0)], rates[finer]
    weight = min(max(math.log(g / g0) / math.log(g1 / g0), 0.0), 1.0) if g1 > g0 else 0.0
    log_d = np.log(d)
    rate = np.exp((1 - weight) * np.interp(log_d, widths0, rates0) + weight * np.interp(log_d, widths1, rates1))
    params = np.square(d) * blocks(d)
    return np.asarray(costs.per_param * params * (8 / rate + 4 / rest_rate(device, costs)))


def doublings(
    device: Device, law: Coefficients, d_model: float, expansion: float, costs: Costs, at: tuple[float, ...]
) -> tuple[Doubling, ...]:
    """The break-even rule at one width, for neighbors in `at`: going finer pays while a token takes less than `allowed` longer.

    At equal loss finer experts need `compute_ratio` times less of what a token costs, routing not counted: that is what the
    measured time counts instead.
    """
    seconds = [float(seconds_per_token(device, d_model, expansion, g, costs)) for g in at]
    pairs = zip(at, at[1:], seconds, seconds[1:])
    return tuple(Doubling(g, finer, t2 / t1 - 1, compute_ratio(law, g, finer) - 1) for g, finer, t1, t2 in pairs)
