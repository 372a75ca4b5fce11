"""What capture writes into the graph besides the program: assumptions made while tracing, and experts that were declared.

    if idx.numel() == 0: continue          ->   n = idx.numel(); c = n == 0; assume(c, False, "model.py:31"); ...
    for e in hit.nonzero(): body(e)        ->   assume_every(hit, "model.py:30"); body(0); body(1); ... body(E-1)
    moec.nn.MoE(...)(x)                    ->   declared("model.py:12", "layers.0.mlp", 64, 8, ...); its moec:: ops
    a module given to moec.declare, called ->   its graph; returned("MyMoE@7f3a")

A marker is a `call_function` node without users. It computes nothing and returns None, at run time and under AOTAutograd's
tracing alike; it only keeps a sentence next to the values it speaks about. Dead-code elimination must not drop that
sentence, so all are registered as impure.

*Assumptions* say "this graph is right if ...": only a region that proves one harmless may remove it. A graph that still holds one
is not the user's program: give its places to `capture.retrace_without`. *Declarations* say what the user promised; the
pipeline takes them out first and reports them. They are in moec's graphs only: other backends trace the calls to nothing.
"""

from __future__ import annotations

import inspect

import torch
from torch import fx
from torch.fx.node import has_side_effect

from moec.ir import Site

BORROWED = "moec_borrowed"  # in a node's meta: its example value is that of another iteration (see `fakes`)


@has_side_effect
def assume(cond: bool | int | torch.Tensor | torch.SymBool | torch.SymInt, value: bool, where: str) -> None:
    """`bool(cond)` was answered with `value` in the source line `where` ("file:line")."""


@has_side_effect
def assume_every(hit: torch.Tensor, where: str) -> None:
    """The loop over `hit.nonzero()` in line `where` was traced as a loop over all of `range(len(hit))`.

    `hit` is the bool or integer vector [E], not the result of nonzero().
    """


@has_side_effect
def declared(
    where: str, name: str, num_experts: int, top_k: int | None, d_model: int, d_expert: int, granularity: float
) -> None:
    """The `moec::` ops that follow are the experts of a layer that is written in them (`moec.nn.MoE`), made in line `where`.

    Called by the layer's forward, before its ops. `name` tells people which layer; `top_k` is None where experts choose tokens.
    """


@has_side_effect
def returned(token: str) -> None:
    """The call of the declared module that `promises.module_of(token)` names ends here."""


ASSUMPTIONS = (assume, assume_every)
DECLARATIONS = (declared, returned)


def is_marker(node: fx.Node) -> bool:
    """Whether a node is an assumption."""
    return node.op == "call_function" and node.target in ASSUMPTIONS


def is_declaration(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in DECLARATIONS


def declared_site(marker: fx.Node) -> Site:
    """The site that a `declared` node speaks of."""
    given = inspect.signature(declared).bind(*marker.args, **marker.kwargs).arguments
    return Site(
        status="rewritten",
        idiom="moec.nn.MoE",
        location=given["where"],
        declared=given["name"],
        granularity_assumed=False,
        **{key: given[key] for key in ("num_experts", "top_k", "d_model", "d_expert", "granularity")},
    )


def marker_places(gm: fx.GraphModule) -> set[str]:
    """Places ("file:line") of all assumptions in the graph and in the graphs it calls (checkpoint bodies and the like)."""
    places = set()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            places |= {node.args[-1] for node in module.graph.nodes if is_marker(node)}
    return places


def borrowed(gm: fx.GraphModule) -> bool:
    """Whether a node is left whose example value is that of another iteration."""
    return any(BORROWED in node.meta for node in gm.graph.nodes)
