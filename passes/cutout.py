"""cutout: a region cut out of its graph, as it was and as it became. For the report, and for verification.

Both take the same inputs: what the region reads from outside. Of these, values that may follow from the expert ids (the weights
of all pairs in a dense formulation) are no inputs; how they come about is in both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import fx

from moec.fx import extract
from moec.ir import MoERegion
from moec.passes.detect import Detection, outer_nodes
from moec.passes.lower import Lowered

log = logging.getLogger("moec")


@dataclass(frozen=True, eq=False)
class Cutout:
    """`before`: the original, None if it could not be cut out. `derived`: the nodes that make values out of the ids, in graph
    order. `same`: for every node that holds the value of an input (x viewed twice), that input."""

    before: fx.GraphModule | None
    derived: list[fx.Node]
    same: dict[fx.Node, fx.Node]


def cut(gm: fx.GraphModule, detection: Detection, region: MoERegion) -> Cutout:
    """The original region, before the graph is changed."""
    inputs = [n for n in outer_nodes(region) if n not in region.derived]
    position = detection.values.position
    derived, same = _cone(detection, set(region.derived), inputs, region.root)
    made = sorted((n for n in derived if n.op not in ("placeholder", "get_attr")), key=position.__getitem__)
    output = region.root_readers[0][1] if region.root_readers else region.root
    behind, met = _cone(detection, {region.root, output}, inputs, region.root)
    same |= met
    inputs += [n for n in gm.graph.nodes if n in behind and n.op in ("placeholder", "get_attr") and n not in inputs]
    try:
        before = extract(gm, [n for n in gm.graph.nodes if n in behind], inputs, output, "Before", same)
    except Exception:
        log.debug("moec: could not cut out %s", region.root, exc_info=True)
        before = None
    return Cutout(before, made, same)


def inside(detection: Detection, region: MoERegion) -> list[fx.Node]:
    """The nodes of the original region, in graph order."""
    found, _ = _cone(detection, {region.root}, outer_nodes(region), region.root)
    return sorted(found, key=detection.values.position.__getitem__)


def after(gm: fx.GraphModule, piece: Cutout, done: Lowered) -> fx.GraphModule:
    """The rewritten region, cut out of the rewritten graph."""
    nodes = (*piece.derived, *done.nodes)
    members = set(nodes)
    read = {n for node in nodes for n in node.all_input_nodes if n not in members}
    own = outer_nodes(done.region)
    same = {n: piece.same[n] for n in read if n in piece.same and n not in own}
    inputs = {same.get(n, n) for n in read}
    names = {node: name for node, name in done.names.items() if node in inputs}
    rank = {n.name: i for i, n in enumerate(own)}
    ordered = sorted(inputs, key=lambda n: (rank.get(names.get(n, n.name), len(rank)), n.name))
    return extract(gm, nodes, ordered, done.result, "After", same, done.names)


def _cone(
    detection: Detection, wanted: set[fx.Node], inputs: list[fx.Node], last: fx.Node
) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """What `wanted` is computed from, writes to the buffers on the way included, up to the node `last`; and for each node where
    that ends the input whose value it holds: two nodes may hold the same (x viewed twice), and then both are that input.
    """
    values = detection.values
    held = {id(values.of[n]): n for n in inputs}
    found: set[fx.Node] = set()
    same: dict[fx.Node, fx.Node] = {}
    work = list(wanted)
    while work:
        node = work.pop()
        if (source := held.get(id(values.of.get(node)))) is not None:
            same[node] = source
            continue
        if node in found or values.position[node] > values.position[last]:
            continue
        found.add(node)
        work.extend(node.all_input_nodes)
        work.extend(w for w in values.writes.get(values.storage.get(node, node), ()))
    return found, same
