"""Routing statistics: how often each expert was visited, and which experts by the same token.

    recorder = Recorder(num_layers=26, num_experts=64)      # on the device of the model
    recorder.accumulate(layer, topk_ids)                    # in every forward; no synchronization
    recorder.next_window()                                  # now and then; windows show drift
    stats = recorder.stats()                                # or: RoutingStats.from_topk(topk_LTK, num_experts=64)

Ids are logical: a placement never changes what is recorded. Counts are complete; co-activation may come from a sample
of the tokens, since it is a product of one-hot matrices. A negative id is no expert (a dropped slot).

Shape letters: W windows, L layers, T tokens, K top-k, E experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import files
from .errors import PlacementError

FORMAT, VERSION = "moec.routing_stats", 1
_FIELDS: dict[str, files.Field] = {
    "counts": ("iu", 3),
    "coactivation": ("iu", 3),
    "tokens": ("iu", 1),
    "windows": ("U", 1),
    "model": ("U", 0),
}


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """What routers chose.

    counts        [W, L, E] int64, slots (token, choice) that went to each expert
    coactivation  [L, E, E] int64, symmetric: sampled tokens that visited both experts; the diagonal: tokens that visited the one
    tokens        [L] int64, tokens that the co-activation was taken from
    windows       [W] a name for each window
    model         what was recorded, for instance a hash of the checkpoint; "" where nobody said

    Raises PlacementError where the shapes do not fit each other or a count is impossible.
    """

    counts: np.ndarray
    coactivation: np.ndarray
    tokens: np.ndarray
    windows: tuple[str, ...]
    model: str = ""

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or 0 in self.counts.shape:
            raise PlacementError(f"counts are [windows, layers, experts], none of them 0, not {self.counts.shape}")
        windows, layers, experts = self.counts.shape
        expected = {"coactivation": (layers, experts, experts), "tokens": (layers,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise PlacementError(
                    f"{name} has shape {getattr(self, name).shape}; counts {self.counts.shape} want {shape}"
                )
        if len(self.windows) != windows:
            raise PlacementError(f"{len(self.windows)} names for {windows} windows; name each one")
        if self.counts.min() < 0 or self.coactivation.min(initial=0) < 0 or self.tokens.min() < 0:
            raise PlacementError("counts are negative; record the statistics again")
        if not np.array_equal(self.coactivation, self.coactivation.transpose(0, 2, 1)):
            raise PlacementError("co-activation is not symmetric; record the statistics again")
        diagonal = np.diagonal(self.coactivation, axis1=1, axis2=2)
        if (self.coactivation > diagonal[:, None]).any() or (diagonal > self.tokens[:, None]).any():
            raise PlacementError(
                "two experts are visited together more often than one of them; record the statistics again"
            )

    @property
    def num_layers(self) -> int:
        return int(self.counts.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[2])

    def loads(self) -> np.ndarray:
        """[L, E] float64: slots per expert, over all windows."""
        return self.counts.sum(axis=0).astype(np.float64)

    @staticmethod
    def from_topk(
        topk_LTK: np.ndarray | Tensor,
        num_experts: int,
        *,
        windows: int = 1,
        sample: int | None = None,
        model: str = "",
        name: str = "window",
    ) -> RoutingStats:
        """Statistics of recorded routings.

        topk_LTK  [L, T, K] integers, the expert ids of every token; negative ones are no expert
        windows   cuts the tokens into so many equal windows
        sample    takes co-activation from so many evenly spaced tokens at most; None: from all

        Raises PlacementError for ids of num_experts and above, and for other shapes.
        """
        topk = torch.as_tensor(np.asarray(topk_LTK).astype(np.int64))
        if topk.ndim != 3 or 0 in topk.shape:
            raise PlacementError(f"topk_LTK is [layers, tokens, top-k], none of them 0, not {tuple(topk.shape)}")
        if int(topk.max()) >= num_experts:
            raise PlacementError(
                f"expert id {int(topk.max())} with num_experts={num_experts}; pass the model's number of experts"
            )
        recorder = Recorder(topk.shape[0], num_experts, model=model)
        step = max(1, -(-topk.shape[1] // sample)) if sample else 1
        for w, part in enumerate(topk.tensor_split(windows, dim=1)):
            for layer in range(topk.shape[0]):
                recorder.accumulate(layer, part[layer], every=step)
            recorder.next_window(f"{name}{w}")
        return recorder.stats()

    def merge(self, other: RoutingStats) -> RoutingStats:
        """Both, with the windows of `other` after ours. Raises PlacementError for other layers, experts or another model."""
        if self.counts.shape[1:] != other.counts.shape[1:] or self.model != other.model:
            raise PlacementError(
                f"statistics of {self.model or 'a model'} with layers, experts {self.counts.shape[1:]} and of "
                f"{other.model or 'a model'} with {other.counts.shape[1:]}; merge those of one model only"
            )
        return replace(
            self,
            counts=np.concatenate([self.counts, other.counts]),
            coactivation=self.coactivation + other.coactivation,
            tokens=self.tokens + other.tokens,
            windows=self.windows + other.windows,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .npz (or .json). Raises PlacementError for another suffix, OSError where the place cannot be written."""
        arrays = {name: getattr(self, name) for name in ("counts", "coactivation", "tokens")}
        files.write(path, FORMAT, VERSION, arrays | {"windows": np.array(self.windows), "model": np.array(self.model)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RoutingStats:
        """Reads what `save` wrote. Raises OSError where there is no file, PlacementError where it is not sound."""
        found = files.read(path, FORMAT, VERSION, _FIELDS)
        try:
            return RoutingStats(
                counts=found["counts"].astype(np.int64),
                coactivation=found["coactivation"].astype(np.int64),
                tokens=found["tokens"].astype(np.int64),
                windows=tuple(found["windows"].tolist()),
                model=str(found["model"]),
            )
        except PlacementError as error:
            raise PlacementError(f"{os.fspath(path)}: {error}") from error


class Recorder:
    """Counts in tensors on the model's device: one bincount and, for a sample, one E x E product per call, never a wait.

    sample  tokens per call that co-activation is taken from, evenly spaced; 0 records counts alone
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        device: torch.device | str = "cpu",
        sample: int | None = None,
        model: str = "",
    ) -> None:
        self.num_experts, self.sample, self.model = num_experts, sample, model
        # one expert more: where ids that are no expert are counted and forgotten
        self._window = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device)
        self._coactivation = torch.zeros(num_layers, num_experts + 1, num_experts + 1, dtype=torch.int64, device=device)
        self._tokens = [0] * num_layers
        self._closed: list[Tensor] = []
        self._names: list[str] = []

    def accumulate(self, layer: int, topk_ids: Tensor, every: int | None = None) -> None:
        """Adds the choices of one router: topk_ids [..., K] integers; ids outside 0..E-1 are no expert."""
        ids = topk_ids.detach().reshape(-1, topk_ids.shape[-1]).long()
        ids = torch.where((ids < 0) | (ids >= self.num_experts), self.num_experts, ids)
        self._window[layer].scatter_add_(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1))
        if self.sample == 0 or not len(ids):
            return
        step = every or (max(1, -(-len(ids) // self.sample)) if self.sample else 1)
        taken = ids[::step]
        visits = torch.zeros(len(taken), self.num_experts + 1, dtype=torch.float32, device=ids.device)
        visits.scatter_(1, taken, 1.0)
        self._coactivation[layer] += (visits.T @ visits).long()
        self._tokens[layer] += len(taken)

    def next_window(self, name: str | None = None) -> None:
        """Closes the window that is being counted."""
        self._names.append(name if name is not None else f"window{len(self._closed)}")
        self._closed.append(self._window.clone())
        self._window.zero_()

    def stats(self, group: torch.distributed.ProcessGroup | None = None, *, reduce: bool = False) -> RoutingStats:
        """What was recorded so far; an open window that counted something is closed first.

        reduce  sums over the ranks of `group` (the default group if None); every rank must call it after the same windows
        """
        if bool(self._window.any()) or not self._closed:
            self.next_window()
        counts, coactivation = torch.stack(self._closed), self._coactivation.clone()
        tokens = torch.tensor(self._tokens, device=counts.device)
        if reduce:
            for tensor in (counts, coactivation, tokens):
                torch.distributed.all_reduce(tensor, group=group)
        experts = self.num_experts
        return RoutingStats(
            counts=counts[:, :, :experts].cpu().numpy(),
            coactivation=coactivation[:, :experts, :experts].cpu().numpy(),
            tokens=tokens.cpu().numpy(),
            windows=tuple(self._names),
            model=self.model,
        )
