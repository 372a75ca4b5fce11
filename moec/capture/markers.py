"""Assumptions made while tracing, written into the graph.

    if idx.numel() == 0: continue          ->   n = idx.numel(); c = n == 0; assume(c, False, "model.py:31"); ...
    for e in hit.nonzero(): body(e)        ->   assume_every(hit, "model.py:30"); body(0); body(1); ... body(E-1)

A marker is a `call_function` node without users. It computes nothing and returns None, at run time and under AOTAutograd's
tracing alike; it only keeps the sentence "this graph is right if ..." next to the values it speaks about. Dead-code
elimination must not drop that sentence, so both functions are registered as impure.

Only a region that proves the assumption harmless may remove its marker. A graph that still holds one is not the user's
program: give its places to `capture.retrace_without`.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import has_side_effect


@has_side_effect
def assume(cond: bool | int | torch.Tensor | torch.SymBool | torch.SymInt, value: bool, where: str) -> None:
    """`bool(cond)` was answered with `value` in the source line `where` ("file:line")."""


@has_side_effect
def assume_every(hit: torch.Tensor, where: str) -> None:
    """The loop over `hit.nonzero()` in line `where` was traced as a loop over all of `range(len(hit))`.

    `hit` is the bool or integer vector [E], not the result of nonzero().
    """


def is_marker(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (assume, assume_every)


def marker_places(gm: fx.GraphModule) -> set[str]:
    """Places ("file:line") of all markers in the graph and in the graphs it calls (checkpoint bodies and the like)."""
    places = set()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            places |= {node.args[-1] for node in module.graph.nodes if is_marker(node)}
    return places
