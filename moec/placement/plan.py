"""The plan: which expert lies in which slot, and what was expected of it when it was made.

    plan = solve(stats, topology("h100", nodes=4), slots_per_gpu=5)
    plan.physical_to_logical          # [L, S]; slot s lies on GPU s // slots_per_gpu; -1 is an empty slot
    plan.save("plan.npz"); Plan.load("plan.npz").diff(plan).slots      # 0

Files carry a format name and a version, never a pickle, and are checked as a plan made by hand would be. With
num_experts= and num_layers= loading also checks that the plan is for the model at hand.

Shape letters: L layers, E experts, S slots, C copies at most, G GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch

from . import files
from .batch import Tables
from .errors import PlacementError

if TYPE_CHECKING:
    from .metrics import Evaluation

FORMAT, VERSION = "moec.placement_plan", 1
_FIELDS: dict[str, files.Field] = {
    "physical_to_logical": ("iu", 2),
    "node_of_gpu": ("iu", 1),
    "fractions": ("f", 2),
    "predicted": ("f", 2),
    "num_experts": ("iu", 0),
    "slack": ("f", 0),
    "split": ("U", 0),
    "method": ("U", 0),
    "note": ("U", 0),
    "window": ("U", 0),
    "model": ("U", 0),
}
Split = Literal["even", "flow"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the statistics that a plan was made from say of it; every array is [L] float64.

    imbalance  load of the busiest GPU over the mean, at most
    bound      proven: no plan with so many slots has less (see `bounds.lower_bound`)
    kept       share of the co-activated pairs of experts that some node holds both of; 0 where nothing was recorded
    """

    imbalance: np.ndarray
    bound: np.ndarray
    kept: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """[L] how far the imbalance is above its bound: 0.005 is half a percent."""
        return self.imbalance / self.bound - 1


@dataclass(frozen=True)
class Moves:
    """From one plan to another: slots filled from the same node, from another node, and the bytes of both."""

    intra: int
    inter: int
    bytes: int

    @property
    def slots(self) -> int:
        return self.intra + self.inter


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement of experts.

    physical_to_logical  [L, S] int64, the expert in each slot; -1 is an empty slot; S = G * slots_per_gpu
    num_experts          E
    node_of_gpu          [G] int64, the node of each GPU, 0..N-1
    fractions            [L, S] float64, the share of its expert's tokens that each slot is expected to get; if left
                         out, equal ones
    split                "flow": per batch, as moec.placement.split says; "even": in turn, as EPLB assumes
    slack                share by which the flow lets a GPU exceed the mean load, to save traffic
    method, note         how the plan was made, and why so
    window, model        the statistics it was made from
    predicted            what these say of the plan; None for a plan made by hand

    Raises PlacementError where an expert is missing, lies twice on a GPU (EPLB's own plans may; they are a baseline,
    not for use), or where shapes do not fit.
    """

    physical_to_logical: np.ndarray
    num_experts: int
    node_of_gpu: np.ndarray
    fractions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    split: Split = "flow"
    slack: float = 0.0
    method: str = "given"
    note: str = ""
    window: str = ""
    model: str = ""
    predicted: Prediction | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        slots, gpus = self.physical_to_logical, len(self.node_of_gpu)
        if slots.ndim != 2 or not slots.size or not gpus or slots.shape[1] % gpus:
            raise PlacementError(
                f"{slots.shape} slots on {gpus} GPUs; physical_to_logical is [layers, GPUs * slots per GPU]"
            )
        if slots.min() < -1 or slots.max() >= self.num_experts:
            raise PlacementError(
                f"slots hold experts {slots.min()}..{slots.max()}; with {self.num_experts} experts they are "
                f"-1..{self.num_experts - 1}"
            )
        if not np.array_equal(np.unique(self.node_of_gpu), np.arange(self.node_of_gpu.max() + 1)):
            raise PlacementError(
                f"node_of_gpu is {self.node_of_gpu.tolist()}; nodes are numbered 0, 1, ... without holes"
            )
        if self.split not in ("even", "flow") or not 0 <= self.slack <= 1:
            raise PlacementError(f"split is 'even' or 'flow' and slack 0..1, not {self.split!r} and {self.slack}")
        missing = np.argwhere(self.replica_count == 0)
        if len(missing):
            layer, expert = missing[0]
            raise PlacementError(f"layer {layer} has no slot for expert {expert}; every expert needs one")
        if self.method != "eplb" and len(self.duplicates):
            layer, gpu = self.duplicates[0]
            raise PlacementError(
                f"layer {layer} has two copies of an expert on GPU {gpu}; one of them would get no tokens"
            )
        if not self.fractions.size:
            object.__setattr__(self, "fractions", even_fractions(slots, self.num_experts))
        if self.fractions.shape != slots.shape or not np.allclose(self._per_expert(self.fractions), 1, atol=1e-6):
            raise PlacementError("the fractions of an expert's copies do not sum to 1; leave them out for equal ones")
        arrays = () if self.predicted is None else (self.predicted.imbalance, self.predicted.bound, self.predicted.kept)
        if any(array.shape != slots.shape[:1] for array in arrays):
            raise PlacementError(f"predictions are one number per layer, {slots.shape[0]} of them")

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical.shape[0])

    @property
    def num_gpus(self) -> int:
        return len(self.node_of_gpu)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_gpu.max()) + 1

    @property
    def slots_per_gpu(self) -> int:
        return int(self.physical_to_logical.shape[1]) // self.num_gpus

    @cached_property
    def replica_count(self) -> np.ndarray:
        """[L, E] int64: slots that hold each expert."""
        return self._per_expert(np.ones_like(self.physical_to_logical)).astype(np.int64)

    @cached_property
    def logical_to_physical(self) -> np.ndarray:
        """[L, E, C] int64: the slots of each expert in order, padded with -1; C is the largest replica_count."""
        return logical_to_physical(self.physical_to_logical, self.num_experts)

    @cached_property
    def duplicates(self) -> np.ndarray:
        """[n, 2] int64: (layer, GPU) of every copy of an expert beside another one on the same GPU."""
        held = np.sort(self.physical_to_logical.reshape(self.num_layers, self.num_gpus, -1), axis=-1)
        return np.argwhere((held[..., 1:] == held[..., :-1]) & (held[..., 1:] >= 0))[:, :2]

    def tables(self, layer: int, max_copies: int | None = None) -> Tables:
        """What the split needs of one layer; padded to `max_copies`, the next plan has tables of the same shapes."""
        copies = self.logical_to_physical[layer]
        width = copies.shape[1] if max_copies is None else max_copies
        if (copies[:, width:] >= 0).any():
            raise PlacementError(f"an expert of layer {layer} has more than max_copies={width} copies; raise it")
        copies = np.pad(copies[:, :width], ((0, 0), (0, max(0, width - copies.shape[1]))), constant_values=-1)
        return Tables(
            expert_of=torch.from_numpy(self.physical_to_logical[layer]),
            copies_of=torch.from_numpy(copies),
            gpu_of=torch.arange(self.physical_to_logical.shape[1]) // self.slots_per_gpu,
            node_of_gpu=torch.from_numpy(self.node_of_gpu),
            num_nodes=self.num_nodes,
        )

    def evaluate(self, topk_LTK: np.ndarray, **how: object) -> Evaluation:
        """What recorded routings would meet under this plan; see `moec.placement.metrics.evaluate`."""
        from .metrics import evaluate

        return evaluate(self, topk_LTK, **how)  # type: ignore[arg-type]

    def diff(self, other: Plan, bytes_per_expert: int = 0) -> Moves:
        """What moves from this plan to `other`. Raises PlacementError unless both are for one model on one cluster."""
        check_comparable(self, other)
        gpus_old, gpus_new = on_gpu(self), on_gpu(other)
        at_node = np.zeros((self.num_layers, self.num_nodes, self.num_experts), dtype=bool)
        for gpu, node in enumerate(self.node_of_gpu):
            at_node[:, node] |= gpus_old[:, gpu]
        new = gpus_new & ~gpus_old
        intra = int((new & at_node[:, self.node_of_gpu]).sum())
        inter = int(new.sum()) - intra
        return Moves(intra, inter, (intra + inter) * bytes_per_expert)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .npz or .json, by the suffix. Raises PlacementError for another one, OSError if it cannot write."""
        p = self.predicted
        predicted = np.zeros((3, 0)) if p is None else np.stack([p.imbalance, p.bound, p.kept])
        arrays = {name: np.asarray(getattr(self, name)) for name in _FIELDS if name != "predicted"}
        files.write(path, FORMAT, VERSION, arrays | {"predicted": predicted})

    @staticmethod
    def load(path: str | os.PathLike[str], *, num_experts: int | None = None, num_layers: int | None = None) -> Plan:
        """Reads what `save` wrote. Raises OSError without a file, PlacementError if it is not sound or not for this model."""
        found = files.read(path, FORMAT, VERSION, _FIELDS)
        name = os.fspath(path)
        if len(found["predicted"]) != 3:
            raise PlacementError(f"{name}: predicted has {len(found['predicted'])} rows, not 3; write the plan again")
        try:
            plan = Plan(
                physical_to_logical=found["physical_to_logical"].astype(np.int64),
                num_experts=int(found["num_experts"]),
                node_of_gpu=found["node_of_gpu"].astype(np.int64),
                fractions=found["fractions"].astype(np.float64),
                split=cast(Split, str(found["split"])),
                slack=float(found["slack"]),
                predicted=Prediction(*found["predicted"].astype(np.float64)) if found["predicted"].size else None,
                **{key: str(found[key]) for key in ("method", "note", "window", "model")},
            )
        except PlacementError as error:
            raise PlacementError(f"{name}: {error}") from error
        for what, wanted, has in (("experts", num_experts, plan.num_experts), ("layers", num_layers, plan.num_layers)):
            if wanted is not None and wanted != has:
                raise PlacementError(f"{name} is a plan for {has} {what}; the model has {wanted}. Solve for this model")
        return plan

    def _per_expert(self, values_LS: np.ndarray) -> np.ndarray:
        """[L, E]: sums over the slots of each expert."""
        sums = np.zeros((self.num_layers, self.num_experts + 1))
        np.add.at(sums, (np.arange(self.num_layers)[:, None], self.physical_to_logical), values_LS)
        return sums[:, : self.num_experts]  # empty slots, -1, are counted in the last column


def logical_to_physical(physical_to_logical_LS: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E, C] int64: the slots of each expert in order, padded with -1."""
    layers, slots = physical_to_logical_LS.shape
    order = np.argsort(physical_to_logical_LS, axis=1, kind="stable")
    expert = np.take_along_axis(physical_to_logical_LS, order, axis=1)
    start = np.stack([np.searchsorted(row, np.arange(num_experts)) for row in expert])
    place = np.arange(slots) - np.take_along_axis(start, np.maximum(expert, 0), axis=1)
    real = expert >= 0
    found = np.full((layers, num_experts, int(place[real].max(initial=0)) + 1), -1, dtype=np.int64)
    found[np.nonzero(real)[0], expert[real], place[real]] = order[real]
    return found


def even_fractions(physical_to_logical_LS: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, S] float64: one over the number of copies; 0 for an empty slot."""
    copies = (logical_to_physical(physical_to_logical_LS, num_experts) >= 0).sum(axis=2)
    count = np.take_along_axis(copies, np.maximum(physical_to_logical_LS, 0), axis=1)
    return np.where(physical_to_logical_LS >= 0, 1 / np.maximum(count, 1), 0.0)


def on_gpu(plan: Plan) -> np.ndarray:
    """[L, G, E] bool: whether a GPU holds an expert."""
    held = np.zeros((plan.num_layers, plan.num_gpus, plan.num_experts + 1), dtype=bool)
    slots = plan.physical_to_logical.reshape(plan.num_layers, plan.num_gpus, -1)
    np.put_along_axis(held, np.where(slots < 0, plan.num_experts, slots), True, axis=2)
    return held[..., : plan.num_experts]


def check_comparable(a: Plan, b: Plan) -> None:
    """Raises PlacementError unless both plans are for one model on one cluster; slots per GPU may differ."""
    for what, x, y in (
        ("layers", a.num_layers, b.num_layers),
        ("experts", a.num_experts, b.num_experts),
        ("GPUs by node", a.node_of_gpu.tolist(), b.node_of_gpu.tolist()),
    ):
        if x != y:
            raise PlacementError(f"the plans differ in {what}: {x} and {y}; compare plans of one model on one cluster")


def with_slots(plan: Plan, physical_to_logical_LS: np.ndarray, fractions_LS: np.ndarray) -> Plan:
    """The same plan with its slots in another order."""
    return replace(plan, physical_to_logical=physical_to_logical_LS, fractions=fractions_LS)
