"""Small reference MoE layers in plain torch, one file per dispatch idiom. Imported as `moec.models`.

Each file holds one class `MoE(d_model, d_expert, num_experts, top_k, *, router, body, shared)`. They differ only in how
tokens reach their experts, so they agree in values and gradients. `routers.py` chooses the experts, `experts.py` holds
the bodies, `decoder.py` a decoder to put a layer in. Nothing here imports anything but torch.
"""

if __name__ == "models":
    raise ImportError("these are moec's reference models; say `from moec.models import ...`, not `import models`")

from . import (
    batched_mm,
    bincount_split,
    dense_loop,
    dense_stacked,
    grouped_mm,
    hit_modules,
    hit_stacked,
    one_hot,
    skip_empty,
    sort_tolist,
    static_mask,
    static_where,
    zip_masks,
)
from .decoder import Decoder
from .experts import BODIES, STACKED_BODIES
from .routers import ROUTERS

IDIOMS = {
    "static_where": static_where.MoE,
    "static_mask": static_mask.MoE,
    "one_hot": one_hot.MoE,
    "zip_masks": zip_masks.MoE,
    "skip_empty": skip_empty.MoE,
    "hit_stacked": hit_stacked.MoE,
    "hit_modules": hit_modules.MoE,
    "sort_tolist": sort_tolist.MoE,
    "bincount_split": bincount_split.MoE,
    "grouped_mm": grouped_mm.MoE,
    "batched_mm": batched_mm.MoE,
    "dense_loop": dense_loop.MoE,
    "dense_stacked": dense_stacked.MoE,
}

__all__ = ["BODIES", "IDIOMS", "ROUTERS", "STACKED_BODIES", "Decoder"]
