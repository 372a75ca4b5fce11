"""The layers that need no detection: a graph's `declared` markers become sites, and all declarations leave the graph.

declared("model.py:12", "MoE", 64, 8, ...);  moec.route(...);  moec.grouped_linear(...)      ->      Site("moec.nn.MoE", ...)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moec import schedule
from moec.fx import target_name, value
from moec.ir import Problem, Site
from moec.ops.experts import POSITION

from . import markers, promises


def take_declarations(
    gm: fx.GraphModule, copy: Callable[[fx.GraphModule], fx.GraphModule]
) -> tuple[fx.GraphModule, list[tuple[int, Site]], list[str]]:
    """The graph without its declarations (a copy, if there are any); the sites that are declared, by position; the modules whose
    call ends in the graph, by token.
    """
    if not any(map(markers.is_declaration, gm.graph.nodes)):
        return gm, [], []
    gm = copy(gm)
    sites: list[tuple[int, Site]] = []
    returned: list[str] = []
    nodes = list(gm.graph.nodes)
    for i, node in enumerate(nodes):
        if not markers.is_declaration(node):
            continue
        if node.target is markers.returned:
            returned.append(str(node.args[0]))
        else:
            sites.append((i - len(sites) - len(returned), _site(node, nodes[i:])))
        gm.graph.erase_node(node)
    gm.recompile()
    return gm, sites, returned


def _site(marker: fx.Node, after: list[fx.Node]) -> Site:
    site = markers.declared_site(marker)
    site.within = promises.around(marker)
    products = (n for n in after if n.op == "call_function" and target_name(n) in ("grouped_linear", "experts"))
    problem = _problem(site, next(products, None))
    site.strategy = schedule.describe(problem) if problem is not None else None
    return site


def _problem(site: Site, product: fx.Node | None) -> Problem | None:
    """The first product after the marker says on what kind of weights, and how many rows, the layer works."""
    if product is None or site.num_experts is None or site.d_model is None or site.d_expert is None:
        return None
    whole = target_name(product) == "experts"
    x, weights = product.args[0], product.args[POSITION["up"] if whole else 1]
    rows = value(x) if isinstance(x, fx.Node) else None
    first = weights[0] if isinstance(weights, (list, tuple)) else None
    weight = value(first) if isinstance(first, fx.Node) else None
    if not isinstance(rows, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return None
    per_token = 1 if whole else site.top_k
    return Problem(
        num_tokens=rows.shape[0] // per_token if per_token and isinstance(rows.shape[0], int) else None,
        top_k=site.top_k,
        num_experts=site.num_experts,
        d_model=site.d_model,
        d_expert=site.d_expert,
        dtype=weight.dtype,
        device=weight.device.type,
        training=torch.is_grad_enabled(),
        stacked=weight.ndim == 3,
        bias=bool(product.args[POSITION["up_bias"] if whole else 2]) if len(product.args) > 2 else False,
        granularity=site.granularity,
        gating=str(product.args[POSITION["gating"]]) if whole else None,
    )
