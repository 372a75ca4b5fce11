"""The `moec::` ops: what a routed sum means, once. The schemas are the contract of docs/design.md, "The ops".

An expert loop

    for e in range(E):
        token, choice = torch.where(topk_ids == e)
        out.index_add_(0, token, down[e](act(up[e](x[token]))) * topk_weights[token, choice, None])

becomes, over S = T*K slot rows sorted by expert,

    order, inverse, offsets = moec::route(topk_ids, E)
    rows = moec::dispatch(x, order, inverse, offsets, K)
    h    = act(moec::grouped_linear(rows, up, [], offsets))
    w    = moec::dispatch(topk_weights.reshape(-1), order, inverse, offsets, 1)
    y    = moec::grouped_linear(h, down, [], offsets) * w[:, None]
    out  = moec::combine(y, order, inverse, offsets, K)

| file | holds |
|---|---|
| `reference` | the meaning, in plain torch: what every kernel and every test points at |
| `schema` | the schemas, the checks, the fake kernels |
| `autograd` | the gradients, written with the same ops |
| `experts` | a whole layer in one op: its meaning in terms of the others, its gradient |

Importing this module defines the ops on the reference. `moec.kernels` registers faster kernels of the same meaning with the
dispatcher, by device; whoever lowers to these ops imports it too. (So imports go one way: kernels read ops, never the reverse.)

Not handled: a second derivative of an expert's weight (it raises), complex and quantized weights, weights of one list in
several shapes or dtypes (they raise).
"""

from __future__ import annotations

from . import autograd as _autograd
from . import experts as _experts
from .schema import LIBRARY, OPS, implement

_autograd.register()
_experts.define()

__all__ = ["LIBRARY", "OPS", "implement"]
