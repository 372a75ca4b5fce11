"""The seconds a product takes when bytes or FLOPs are all that counts, and the constants of the machines.

All formulas are for one product [S, D] x [D, F] with E experts. A gated body has three of them, all alike, so that the choice
for one is the choice for the layer; they depend on S = T*K only, so that the op, which knows S, chooses as the report does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir import Problem

NOMINAL_TOKENS = 2048  # stands for "as many as in training or prefill" while the number of tokens is symbolic


@dataclass(frozen=True)
class Machine:
    """bandwidth in B/s, flops in FLOP/s by width of the element in bytes; seconds per launched kernel and per synchronization."""

    bandwidth: float
    flops: dict[int, float]
    launch: float
    sync: float

    def seconds(self, num_bytes: float, flops: float, element_size: int) -> float:
        return max(num_bytes / self.bandwidth, flops / self.flops[element_size])


# Read off `F.linear` per expert on two cores of an EPYC 9004 (bf16 0.4, fp32 0.13 TFLOP/s, weights streamed at 13-16 GB/s; a
# product called from Python 4 us). Other machines differ by a factor; on CPU the choice hangs on the 4 us alone.
CPU = Machine(bandwidth=15e9, flops={1: 0.4e12, 2: 0.4e12, 4: 0.13e12, 8: 0.06e12}, launch=4e-6, sync=0.0)

# H100/H200 class: data sheets, derated to what is seen (bf16 8192^3 0.77-0.80 PFLOP/s, copy 4.3 TB/s on an H200). Not measured
# by this project.
CUDA = Machine(bandwidth=3.3e12, flops={1: 0.7e15, 2: 0.7e15, 4: 0.05e15, 8: 0.05e15}, launch=5e-6, sync=20e-6)


def machine(problem: Problem) -> Machine:
    return CPU if problem.device.startswith("cpu") else CUDA


def slots(problem: Problem) -> int:
    tokens = NOMINAL_TOKENS if problem.num_tokens is None else problem.num_tokens
    return tokens * (problem.top_k or 1)


def hit_experts(problem: Problem) -> float:
    """Expected number of experts with rows, if slots fell evenly: E * (1 - (1 - 1/E)^S)."""
    experts = problem.num_experts
    return experts * (1 - (1 - 1 / experts) ** slots(problem))


def element_size(problem: Problem) -> int:
    return torch.empty((), dtype=problem.dtype).element_size()


def weight_bytes(problem: Problem) -> int:
    """Of one expert's weight."""
    return problem.d_model * problem.d_expert * element_size(problem)


def row_bytes(problem: Problem) -> int:
    """What a product reads and writes for all rows, once."""
    return slots(problem) * (problem.d_model + problem.d_expert) * element_size(problem)


def flops(problem: Problem, rows: float) -> float:
    return 2.0 * rows * problem.d_model * problem.d_expert
