"""The experts of a layer on CPU, whole: gather, products, activation, products, sum over a token's slots; and the way back.

    if available() is None and refuses(x.dtype, D, F, body) is None:
        out, pre = forward(x, layer, keep=True)

The plain ops make one GEMM call per expert and pass several times over [S, D] tensors; here one parallel region does
everything, and no [S, D] tensor exists. The sources are compiled by g++ (which Inductor needs anyway) the first time they
are needed, in ten seconds, and cached beside Inductor's code.

| file | says |
|---|---|
| `bindings`, `build` | tensors to pointers; sources to a loaded library |
| `experts.cpp`, `call.h` | the way in; how work is divided, and how rows are added to tokens |
| `forward.h`, `backward.h` | the phases of either direction |
| `product.h` | rows times columns: packing, prefetching, the inner loops |
| `simd.h`, `activation.h` | 16 numbers of a dtype at a time; activations and derivatives |

Not here: other machines than x86-64 with AVX-512 BF16, on Linux; float64; weights with several dtypes.
"""

from .bindings import backward, forward, refuses
from .build import available

__all__ = ["available", "backward", "forward", "refuses"]
