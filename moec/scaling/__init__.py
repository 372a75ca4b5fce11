"""Which granularity, how many tokens, on this machine: the scaling law of fine-grained MoE, planned, fitted and tried out.

    from moec.scaling import Budget, plan, published
    plan(published("e64"), Budget(flops=1.93e20), expansion=64)

`law` says what loss is reached, `costs` and `device` what it costs, `optimum` what is best, `limits` and `successors` what speaks
against it; `fit` finds the coefficients in runs, `sweep` makes the runs, `advise` says what to do. numpy is enough for all but
plots (matplotlib), progress bars (tqdm) and the sweep (torch).
"""

from moec.scaling.costs import Costs, conventions
from moec.scaling.device import Device, LayerTime, doublings, read_device
from moec.scaling.errors import ScalingError
from moec.scaling.law import PUBLISHED, Coefficients, compute_ratio, for_expansion, loss, published
from moec.scaling.optimum import Budget, Plan, plan
from moec.scaling.store import read_coefficients

__all__ = [
    "PUBLISHED",
    "Budget",
    "Coefficients",
    "Costs",
    "Device",
    "LayerTime",
    "Plan",
    "ScalingError",
    "compute_ratio",
    "conventions",
    "doublings",
    "for_expansion",
    "loss",
    "plan",
    "published",
    "read_coefficients",
    "read_device",
]
