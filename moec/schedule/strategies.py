"""The strategies for a product, in one tuple. A kernel of the same name in `moec.kernels` does what is described here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moec.ir import Problem

from .roofline import element_size, flops, hit_experts, machine, row_bytes, slots, weight_bytes


@dataclass(frozen=True)
class Strategy:
    """How a product is computed. Each strategy is a subclass whose fields are its settings."""

    name: str

    def refuses(self, problem: Problem) -> str | None:
        """Why this strategy cannot do `problem`; None when it can."""
        raise NotImplementedError

    def cost(self, problem: Problem) -> float:
        """Seconds for one product; see `roofline`."""
        raise NotImplementedError

    def synchronizes(self, problem: Problem) -> bool:
        """Whether the host waits for the device: then it loses its lead, and no CUDA graph can be captured."""
        return False

    @property
    def describe(self) -> str:
        """One line for reports."""
        raise NotImplementedError


@dataclass(frozen=True)
class Loop(Strategy):
    name: str = "loop"

    def refuses(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        hit, m = hit_experts(problem), machine(problem)
        num_bytes = hit * weight_bytes(problem) + row_bytes(problem)
        busy = m.seconds(num_bytes, flops(problem, slots(problem)), element_size(problem))
        return m.sync + hit * m.launch + busy

    def synchronizes(self, problem: Problem) -> bool:
        return not problem.device.startswith("cpu")

    @property
    def describe(self) -> str:
        return "one GEMM for each expert that has rows, into slices of one result; synchronizes once on CUDA"


@dataclass(frozen=True)
class NativeLoop(Strategy):
    """The loop of `F.grouped_mm` on CPU. `call`: seconds for each expert, rows or not; one of `Loop` takes `CPU.launch`."""

    name: str = "native_loop"
    call: float = 0.8e-6

    def refuses(self, problem: Problem) -> str | None:
        if not problem.device.startswith("cpu"):
            return f"is a loop on the host, not on {problem.device}"
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 and bfloat16, not {problem.dtype}"
        if not problem.stacked:
            return "takes stacked weights"
        if problem.bias:
            return "would round before it adds the bias"
        if problem.training:
            return "has no kernel for weight gradients"
        return _misaligned(problem)

    def cost(self, problem: Problem) -> float:
        m = machine(problem)
        return Loop().cost(problem) + problem.num_experts * self.call - (hit_experts(problem) - 3) * m.launch

    @property
    def describe(self) -> str:
        return "the loop over experts that torch has in C++"


@dataclass(frozen=True)
class GroupedMM(Strategy):
    """`min_capability`: what torch's kernel wants. `tile`: rows it computes at a time. `weight_bandwidth`: B/s at which it reads
    weights; 0.9e12 was seen on an H200 (pytorch#156203), 0.6e12 puts the change from gathered where transformers saw it, between
    16 and 128 tokens (their docs/source/en/experts_interface.md)."""

    name: str = "grouped_mm"
    min_capability: tuple[int, int] = (8, 0)
    tile: int = 128
    weight_bandwidth: float = 0.6e12

    def refuses(self, problem: Problem) -> str | None:
        if not problem.device.startswith("cuda"):
            return f"is a kernel for CUDA, not for {problem.device}"
        if problem.dtype != torch.bfloat16:
            return f"takes bfloat16, not {problem.dtype}"
        if not problem.stacked:
            return "takes stacked weights; stacking separate ones would move them all in every step"
        if misaligned := _misaligned(problem):
            return misaligned
        if (capability := _capability(problem.device)) < self.min_capability:
            return f"wants compute capability {self.min_capability}, not {capability}"
        return None

    def cost(self, problem: Problem) -> float:
        hit, m = hit_experts(problem), machine(problem)
        padded = self.tile * max(hit, slots(problem) / self.tile)
        rows = 2 * row_bytes(problem)  # once for the product, once for zeros in the tail
        weights = hit * weight_bytes(problem) / self.weight_bandwidth
        return 8 * m.launch + max(weights, m.seconds(rows, flops(problem, padded), element_size(problem)))

    @property
    def describe(self) -> str:
        return "torch's grouped GEMM over the stack"


@dataclass(frozen=True)
class Gathered(Strategy):
    """`max_bytes`: of gathered weights."""

    name: str = "gathered"
    max_bytes: int = 2**30

    def refuses(self, problem: Problem) -> str | None:
        if not problem.device.startswith("cuda"):
            return f"on {problem.device} copying weights costs more than the calls it saves"
        if not problem.stacked:
            return "gathers from stacked weights"
        if problem.training:
            return "has no kernel for weight gradients"
        if (gathered := slots(problem) * weight_bytes(problem)) > self.max_bytes:
            return f"would gather {gathered / 2**30:.1f} GiB of weights, more than {self.max_bytes / 2**30:.1f} GiB"
        return None

    def cost(self, problem: Problem) -> float:
        m = machine(problem)
        num_bytes = 3 * slots(problem) * weight_bytes(problem) + row_bytes(problem)  # read, written, read
        return 8 * m.launch + m.seconds(num_bytes, flops(problem, slots(problem)), element_size(problem))

    @property
    def describe(self) -> str:
        return "a batched matrix-vector product over weights gathered for each row"


@dataclass(frozen=True)
class Reference(Strategy):
    name: str = "reference"

    def refuses(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return 2 * Loop().cost(problem) + 1e-9  # a result for each expert, copied; never chosen, always there

    def synchronizes(self, problem: Problem) -> bool:
        return not problem.device.startswith("cpu")

    @property
    def describe(self) -> str:
        return "the definition: F.linear for each expert"


STRATEGIES: tuple[Strategy, ...] = (Loop(), NativeLoop(), GroupedMM(), Gathered(), Reference())


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Strategy:
    """The cheapest strategy that neither refuses nor synchronizes, else the cheapest that does not refuse: `loop` never does."""
    able = (s for s in STRATEGIES if s.refuses(problem) is None)
    return min(able, key=lambda s: (s.synchronizes(problem), s.cost(problem)))


def _misaligned(problem: Problem) -> str | None:
    if problem.d_model * element_size(problem) % 16 or problem.d_expert * element_size(problem) % 16:
        return f"wants strides of a multiple of 16 bytes, not rows of {problem.d_model} and {problem.d_expert} elements"
    return None


@lru_cache(maxsize=16)
def _capability(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)
