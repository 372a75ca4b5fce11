"""bundle: what enters the inner compiler as one tensor for each group of separate experts' parameters.

    experts(x, ..., up=[w_0, ..., w_127], ...)        384 inputs of the graph
    experts(x, ..., up=[up], ..., key)                3 inputs and a key; `moec.ops.bundles` says what they are

The last step before the inner compiler: the graphs of reports are those before it. A group is bundled only if the graph does
nothing else with its parameters and with the memory they lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._subclasses import FakeTensor

from moec import ops as _ops  # noqa: F401  (defines torch.ops.moec)
from moec.fx import copied, value
from moec.ops.bundles import Bundle, stand_in
from moec.ops.experts import PARAMETERS, POSITION

EXPERTS = torch.ops.moec.experts.default
FEWEST = 32  # parameters of one layer; below that there is little to gain
_GROUPS = [POSITION[name] for name in PARAMETERS]

Compiled = Callable[..., object]


@dataclass(frozen=True)
class Bundled:
    """A graph with fewer inputs, an example for each, and which of the original inputs it takes: `kept` as they are, then for
    each layer its `groups` as a bundle."""

    gm: fx.GraphModule
    example_inputs: list[object]
    kept: tuple[int, ...]
    layers: tuple[tuple[tuple[int, ...], ...], ...]
    differentiable: tuple[bool, ...]

    def call(self, compiled: Compiled) -> Compiled:
        """A function of the original inputs."""
        bundles = [Bundle() for _ in self.layers]

        def run(*inputs: object) -> object:
            extra: list[object] = []
            grad = torch.is_grad_enabled()
            for bundle, groups, differentiable in zip(bundles, self.layers, self.differentiable):
                tensors = [[inputs[i] for i in group] for group in groups]
                key, stand_ins = bundle.tie(tensors, grad and differentiable)  # type: ignore[arg-type]
                extra += [key, *stand_ins]
            return compiled(*[inputs[i] for i in self.kept], *extra)

        return run


def bundle(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Bundled | None:
    """The graph with its separate parameters in bundles; None where there are none. `gm` is not changed."""
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    alone = _only_experts(gm, position)
    layers = [node for node in gm.graph.nodes if node.target is EXPERTS]
    while layers != (fit := [node for node in layers if _fit(node, alone)]):
        layers = fit
        # a layer that stays reads its parameters as they are
        alone = {p for p in alone if all(user in layers for user in p.users)}
    if not layers or len(position) != len(example_inputs):
        return None
    groups = {node: [list(node.args[i]) for i in _GROUPS if node.args[i]] for node in layers}
    hidden = {p for found in groups.values() for group in found for p in group}
    kept = [i for node, i in position.items() if node not in hidden]
    examples = [example_inputs[i] for i in kept]
    made = copied(gm)
    copy_of = dict(zip(gm.graph.nodes, made.graph.nodes))
    last = list(made.graph.find_nodes(op="placeholder"))[-1]

    def add(name: str, example: torch.Tensor) -> fx.Node:
        nonlocal last
        with made.graph.inserting_after(last):
            last = made.graph.placeholder(name)
        last.meta["example_value"] = example
        examples.append(example)
        return last

    for node in layers:
        key = add(f"{node.name}_key", _fake_key(node))
        stand_ins = (add(f"{node.name}_group_{n}", _fake_group(group)) for n, group in enumerate(groups[node]))
        copy = copy_of[node]
        copy.args = (*(([next(stand_ins)] if a else []) if i in _GROUPS else a for i, a in enumerate(copy.args)), key)
    for p in hidden:
        made.graph.erase_node(copy_of[p])
    made.recompile()
    places = tuple(tuple(tuple(position[p] for p in group) for group in groups[node]) for node in layers)
    return Bundled(made, examples, tuple(kept), places, tuple(_grad(groups[node]) for node in layers))


def _only_experts(gm: fx.GraphModule, placeholders: dict[fx.Node, int]) -> set[fx.Node]:
    """Inputs that nothing but `moec::experts` reads, whose memory no other input shares: they cannot be written in the graph."""
    seen: dict[int, int] = {}
    storage = {p: v.untyped_storage()._cdata for p in placeholders if isinstance(v := value(p), torch.Tensor)}
    for where in storage.values():
        seen[where] = seen.get(where, 0) + 1
    return {
        p
        for p, where in storage.items()
        if seen[where] == 1 and all(user.target is EXPERTS and p not in user.args for user in p.users)
    }


def _fit(node: fx.Node, alone: set[fx.Node]) -> bool:
    """Separate parameters throughout, alike in each group, on CPU, all or none of which wants a gradient."""
    lists = [list(node.args[i]) for i in _GROUPS if node.args[i]]  # type: ignore[arg-type]
    if len(node.args) > POSITION["key"] or sum(map(len, lists)) < FEWEST or any(len(group) < 2 for group in lists):
        return False
    flat = [p for group in lists for p in group]
    if len(set(flat)) != len(flat) or any(p not in alone for p in flat):
        return False
    values = [value(p) for p in flat]
    if not all(type(v) is FakeTensor and v.device.type == "cpu" for v in values):
        return False
    alike = all(len({(value(p).shape, value(p).dtype) for p in group}) == 1 for group in lists)  # type: ignore[attr-defined]
    return alike and len({v.requires_grad for v in values}) == 1  # type: ignore[attr-defined]


def _grad(groups: list[list[fx.Node]]) -> bool:
    return bool(value(groups[0][0]).requires_grad)  # type: ignore[attr-defined]


def _fake_key(node: fx.Node) -> torch.Tensor:
    x = value(node.args[0])  # type: ignore[arg-type]
    assert isinstance(x, FakeTensor)
    return x.fake_mode.from_tensor(torch.zeros(1, dtype=torch.int64), static_shapes=True)


def _fake_group(group: list[fx.Node]) -> torch.Tensor:
    like = value(group[0])
    assert isinstance(like, FakeTensor)
    with torch.no_grad():
        real = stand_in(torch.empty(tuple(like.shape), dtype=like.dtype, device="meta"), len(group))
        fake = like.fake_mode.from_tensor(torch.empty((), dtype=like.dtype).expand(real.shape), static_shapes=True)
    return fake.requires_grad_(like.requires_grad and torch.is_grad_enabled())
