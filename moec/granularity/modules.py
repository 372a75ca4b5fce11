"""Sizes of experts from modules: layers of moec.nn, modules given to `moec.declare`, and weights that look like experts.

    gate.weight [E, D];  experts.gate_up_proj [E, 2F, D], experts.down_proj [E, D, F]      ->      D, F, E, gated

Two or three stacks with the same first dimension, or a list of equal modules with two or three matrices each, are experts if
something near them has a matrix [E, D]: the router, without which nothing tells D from F (unless d_model is given).

Not handled: experts in one flat matrix [E*F, D], with low-rank factors, in quantized storage, or of several widths in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from .configs import TOP_K, shapes_in_config
from .shape import ExpertShape

Matrices = list[tuple[int, int]]


def declared_shapes(model: nn.Module, given: Mapping[str, int]) -> list[ExpertShape]:
    """The shapes of all layers of moec.nn and of all declared modules, with the declared d_ff; empty if there is none."""
    found = []
    for module in model.modules():
        if (promise := getattr(module, "_moec_declaration", None)) is not None:
            for shape in _inside(module, model, given):
                width = promise.d_ff or (
                    round(promise.granularity * shape.d_expert) if promise.granularity else shape.d_ff
                )
                found.append(replace(shape, d_ff=given.get("d_ff", width)))
        elif _is_layer(module):
            found.append(_of_layer(module))
    return found


def _inside(module: nn.Module, model: nn.Module, given: Mapping[str, int]) -> list[ExpertShape]:
    if layers := [_of_layer(m) for m in module.modules() if _is_layer(m)]:
        return layers
    if found := shapes_in_weights(module, given, around=model):
        return found
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return shapes_in_config(config, given) if config is not None else []


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of moec.nn, or speaks as one does."""
    sizes = ("d_model", "d_ff", "d_expert", "num_experts", "granularity", "top_k")
    return all(isinstance(getattr(module, name, None), int) for name in sizes)


def _of_layer(layer: nn.Module) -> ExpertShape:
    e, f, d = (int(getattr(layer, name)) for name in ("num_experts", "d_expert", "d_model"))
    return ExpertShape(
        d_model=d,
        d_expert=f,
        num_experts=e,
        top_k=int(layer.top_k),  # type: ignore[arg-type]
        shared=int(getattr(layer, "shared_experts", 0)) * f,
        gated=any(tuple(p.shape) == (e, 2 * f, d) for p in layer.parameters()),
        d_ff=int(layer.d_ff),  # type: ignore[arg-type]
    )


def shapes_in_weights(model: nn.Module, given: Mapping[str, int], around: nn.Module | None = None) -> list[ExpertShape]:
    """The shapes of what looks like experts inside `model`; routers are looked for in `around` as well."""
    parents = {child: parent for parent in (around or model).modules() for child in parent.children()}
    found = []
    for owner in model.modules():
        for count, matrices in (*_stacks(owner), *_lists(owner)):
            near = [owner, *_ancestors(owner, parents, 2)]
            shape = _shape(count, matrices, near, given)
            if shape is not None:
                found.append(shape)
    return found


def looks_like_experts(module: nn.Module) -> bool:
    """Whether any weights inside are stacked or come in a list of equals, or an attribute counts experts."""
    for owner in module.modules():
        if any(
            isinstance(getattr(owner, name, None), int)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ):
            return True
        if any(p.ndim >= 3 and p.shape[0] > 1 for p in owner.parameters(recurse=False)) or any(
            True for _ in _lists(owner)
        ):
            return True
        if isinstance(owner, nn.ParameterList) and len(owner) > 1:
            return True
    return False


def _stacks(owner: nn.Module) -> Iterator[tuple[int, Matrices]]:
    """Weights [E, *, *] that a module (or its direct children, a stack each) holds."""
    own = [p for p in owner.parameters(recurse=False) if p.ndim == 3]
    if not own:
        own = [p for child in owner.children() for p in child.parameters(recurse=False) if p.ndim == 3]
    if len(own) > 1 and len({p.shape[0] for p in own}) == 1 and own[0].shape[0] > 1:
        yield own[0].shape[0], [(p.shape[1], p.shape[2]) for p in own]


def _lists(owner: nn.Module) -> Iterator[tuple[int, Matrices]]:
    """Lists of modules with equal parameters."""
    if not isinstance(owner, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or len(owner) < 2:
        return
    shapes = [[tuple(p.shape) for p in child.parameters()] for child in owner.children()]
    matrices = [(s[0], s[1]) for s in shapes[0] if len(s) == 2]
    if matrices and all(s == shapes[0] for s in shapes):
        yield len(shapes), matrices


def _ancestors(module: nn.Module, parents: Mapping[nn.Module, nn.Module], most: int) -> Iterator[nn.Module]:
    for _ in range(most):
        if (up := parents.get(module)) is None:
            return
        module = up
        yield module


def _shape(count: int, matrices: Matrices, near: list[nn.Module], given: Mapping[str, int]) -> ExpertShape | None:
    widths = [given["d_model"]] if "d_model" in given else _router_widths(count, near)
    for d_model in widths:
        width = _width(matrices, d_model)
        if width is not None:
            sizes: dict[str, int | None] = {
                "d_model": d_model,
                "d_expert": width,
                "num_experts": count,
                "top_k": _top_k(count, near),
                "shared": _shared(d_model, near),
            }
            gated = len(matrices) == 3 or any(sorted(m) == sorted((d_model, 2 * width)) for m in matrices)
            return ExpertShape(**{"gated": gated, **sizes, **given})  # type: ignore[arg-type]
    return None


def _width(matrices: Matrices, d_model: int) -> int | None:
    """F, if the matrices are those of one expert: two or three between D and F, or between D and 2F and back."""
    if len(matrices) not in (2, 3) or any(d_model not in m for m in matrices):
        return None
    others = {m[1] if m[0] == d_model else m[0] for m in matrices}
    least = min(others)
    return least if others <= {least, 2 * least} and (len(matrices) == 2 or len(others) == 1) else None


def _router_widths(count: int, near: list[nn.Module]) -> list[int]:
    """D, by every matrix [E, D] or [D, E] next to the experts."""
    found = []
    for module in near:
        beside = [module, *module.children(), *(c for child in module.children() for c in child.children())]
        for p in (p for m in beside for p in m.parameters(recurse=False)):
            if p.ndim == 2 and count in p.shape:
                found.append(p.shape[1] if p.shape[0] == count else p.shape[0])
    return list(dict.fromkeys(found))


def _top_k(count: int, near: list[nn.Module]) -> int | None:
    for module in (m for scope in near for m in (scope, *scope.children())):
        for name in (*TOP_K, "top_k", "k"):
            k = getattr(module, name, None)
            if isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= count:
                return k
    return None


def _shared(d_model: int, near: list[nn.Module]) -> int:
    for name, child in (pair for scope in near for pair in scope.named_children()):
        matrices = [(p.shape[0], p.shape[1]) for p in child.parameters() if p.ndim == 2]
        if "shared" in name and (width := _width(matrices, d_model)) is not None:
            return width
    return 0
