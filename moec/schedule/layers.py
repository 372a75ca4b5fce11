"""The strategies for a whole layer: what `moec::experts` runs, and whether a graph gets that op at all.

    composed    the other ops one after the other, each product by its own strategy: never refuses
    native      one parallel region over experts and columns, in C++ (moec/kernels/native); CPU

A site whose layer would be `composed` at any number of tokens is written in the smaller ops: then Inductor fuses what lies
between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moec.ir import Problem

from .roofline import CPU, element_size, flops, hit_experts, machine, slots, weight_bytes
from .strategies import Strategy, choose


def products(problem: Problem) -> int:
    """How many products [S, D] x [D, F] a layer is worth."""
    return 2 if problem.gating == "none" else 3


@dataclass(frozen=True)
class Composed(Strategy):
    name: str = "composed"

    def refuses(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        """The products, and what is read and written between them: rows of D three times, of F as often as there are products."""
        product = choose(problem).cost(problem)
        between = slots(problem) * (3 * problem.d_model + 2 * products(problem) * problem.d_expert)
        return products(problem) * product + between * element_size(problem) / machine(problem).bandwidth

    @property
    def describe(self) -> str:
        return "routing, gather, products and sum, one after the other"


@dataclass(frozen=True)
class Native(Strategy):
    """`efficiency`: of torch's rate in large products, which the micro-kernels reach. `call`: seconds for a call."""

    name: str = "native"
    efficiency: float = 1.0
    call: float = 40e-6

    def refuses(self, problem: Problem) -> str | None:
        if problem.gating is None:
            return "knows only feed-forward bodies"
        if not problem.device.startswith("cpu"):
            return f"is a kernel for CPU, not for {problem.device}"
        from moec.kernels import native

        reason = native.available()
        if reason is not None:
            return reason
        return native.refuses(problem.dtype, problem.d_model, problem.d_expert)

    def cost(self, problem: Problem) -> float:
        num_bytes = products(problem) * hit_experts(problem) * weight_bytes(problem)
        work = products(problem) * flops(problem, slots(problem)) / self.efficiency
        return self.call + CPU.seconds(num_bytes, work, element_size(problem))

    @property
    def describe(self) -> str:
        return "the whole layer in one parallel region, in C++"


LAYERS: tuple[Strategy, ...] = (Native(), Composed())


@lru_cache(maxsize=4096)
def choose_layer(problem: Problem) -> Strategy:
    """The cheapest strategy for a whole layer; `composed` never refuses."""
    return min((s for s in LAYERS if s.refuses(problem) is None), key=lambda s: s.cost(problem))
