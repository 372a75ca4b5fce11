"""A picture of a plan: the load that every GPU is expected to have in every layer, or that recorded routings would give
it.

    heat_map(plan, stats, "plan.png")

Needs matplotlib, which is optional: `pip install moec[scaling]`.
"""

from __future__ import annotations

import os

import numpy as np

from .errors import PlacementError
from .plan import Plan
from .stats import RoutingStats


def gpu_loads(plan: Plan, stats: RoutingStats) -> np.ndarray:
    """[L, G] float64: expected load of each GPU over the mean of its layer, from loads and the plan's fractions.

    Raises PlacementError where the two are for different models.
    """
    if stats.counts.shape[1:] != (plan.num_layers, plan.num_experts):
        raise PlacementError(
            f"statistics of {stats.num_layers} layers x {stats.num_experts} experts, a plan for {plan.num_layers} x "
            f"{plan.num_experts}; pass those of one model"
        )
    slot = np.take_along_axis(stats.loads(), np.maximum(plan.physical_to_logical, 0), axis=1) * plan.fractions
    load = slot.reshape(plan.num_layers, plan.num_gpus, -1).sum(axis=2)
    return load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)


def heat_map(plan: Plan, stats: RoutingStats, path: str | os.PathLike[str]) -> None:
    """Writes the picture in the format of the suffix. Raises ImportError without matplotlib, OSError if it cannot write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = gpu_loads(plan, stats)
    figure = Figure(figsize=(min(4 + plan.num_gpus / 6, 24), min(2.5 + plan.num_layers / 8, 16)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    far = max(0.05, float(np.abs(loads - 1).max()))
    image = axes.imshow(loads, cmap="RdBu_r", vmin=1 - far, vmax=1 + far, aspect="auto", interpolation="nearest")
    for gpu in np.flatnonzero(np.diff(plan.node_of_gpu)):
        axes.axvline(gpu + 0.5, color="black", linewidth=1)
    axes.set(
        xlabel="GPU (lines: nodes)",
        ylabel="layer",
        title=f"{plan.method}: busiest GPU {loads.max():.3f} times the mean",
    )
    figure.colorbar(image, label="expected load over the mean")
    figure.savefig(path)
