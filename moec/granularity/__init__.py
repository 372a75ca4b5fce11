"""How finely a model's experts are cut: `moec.granularity_of(model)`, for any model or config.

    (shape,) = moec.granularity_of(transformers.AutoConfig.from_pretrained("allenai/OLMoE-1B-7B-0924"))
    shape.granularity        # 8.0, the paper's; .granularity_el, .granularity_sonic, .active_width: see ExpertShape

Read in this order: layers of `moec.nn` and modules given to `moec.declare`; else the model's config; else the weights of what
looks like experts. Layers that differ give one shape each.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from moec.errors import GranularityError

from .configs import shapes_in_config
from .modules import declared_shapes, shapes_in_weights
from .shape import ExpertShape

__all__ = ["ExpertShape", "granularity_of"]


def granularity_of(
    model_or_config: object,
    *,
    d_model: int | None = None,
    d_expert: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    shared: int | None = None,
    gated: bool | None = None,
    d_ff: int | None = None,
) -> tuple[ExpertShape, ...]:
    """The distinct shapes of MoE layers of a model, a module, a config or the dict of a config.json, in order.

    The keywords take precedence over what is read; `shared` is a width. Raises GranularityError where nothing looks like experts,
    or where a size is missing or ambiguous: it says which, and the keyword that gives it.
    """
    named = {
        "d_model": d_model,
        "d_expert": d_expert,
        "num_experts": num_experts,
        "top_k": top_k,
        "shared": shared,
        "gated": gated,
        "d_ff": d_ff,
    }
    given = {name: size for name, size in named.items() if size is not None}
    if isinstance(model_or_config, nn.Module):
        found = _in_model(model_or_config, given)
    else:
        found = shapes_in_config(model_or_config, given)
    if not found:
        raise GranularityError(
            f"{type(model_or_config).__name__} has no experts that could be read: no number of experts in its config, no layer "
            "of moec.nn, no stack [E, ...] or list of equal modules among its weights. Pass the module or the sub-config that "
            "has them, or build moec.granularity.ExpertShape by hand"
        )
    return tuple(dict.fromkeys(found))


def _in_model(model: nn.Module, given: Mapping[str, int]) -> list[ExpertShape]:
    if found := declared_shapes(model, given):
        return found
    config = getattr(model, "config", None)
    return (shapes_in_config(config, given) if config is not None else []) or shapes_in_weights(model, given)
