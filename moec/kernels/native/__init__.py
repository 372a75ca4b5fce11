"""The experts of a layer on CPU, whole: gather, products, activation, products, sum over a token's slots; and the way back.

    if available() is None and refuses(x.dtype, D, F, body) is None:
        out, pre = forward(x, order, inverse, offsets, scale, [], [gate_up], [down], ...)

`experts.cpp` says how. The plain ops make one GEMM call per expert and pass several times over [S, D] tensors; here one parallel
region does everything, and no [S, D] tensor exists. The sources are compiled by g++ (which Inductor needs anyway) the first time they
are needed, in some seconds, and cached beside Inductor's code.

Not here: other machines than x86-64 with AVX-512 BF16, on Linux; float64; weights with several dtypes.
"""

from .bindings import backward, forward, refuses
from .build import available

__all__ = ["available", "backward", "forward", "refuses"]
