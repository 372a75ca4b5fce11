"""The way from a captured graph to a rewritten one, as one visible list of steps.

    detect -> schedule -> cut out "before" -> lower -> cut out "after" -> verify

`rewrite_graph` works on a copy, so that a mismatch or a fault leaves the original as it was. Graphs called by higher-order ops
(checkpoint bodies) are walked too.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from moec import schedule
from moec.config import Options, split
from moec.errors import OptionError, StrictError
from moec.fx import extract, graph_module, value
from moec.ir import GroupedLinear, MoERegion, Outer, Problem, Refusal, Separate, Site, expressions
from moec.passes import facts
from moec.passes.detect import Detection, detect, outer_nodes
from moec.passes.lower import Lowered, LoweringFault, lower
from moec.passes.verify import Mismatch, verify

log = logging.getLogger("moec")


@dataclass(eq=False)
class Result:
    """A rewritten graph and what happened to each site."""

    gm: fx.GraphModule
    sites: list[Site] = field(default_factory=list)
    superseded: bool = False  # Dynamo traces the frame again, and another result takes this one's place


def rewrite_graph(gm: fx.GraphModule, options: Options, verified: dict[str, str] | None = None) -> Result:
    """Rewrites all regions of a graph and of the graphs it calls. The given module is not changed."""
    verified = {} if verified is None else verified
    result = _rewrite_one(gm, options, verified)
    for name, child in list(result.gm.named_children()):
        if isinstance(child, fx.GraphModule):
            inner = rewrite_graph(child, options, verified)
            setattr(result.gm, name, inner.gm)
            result.sites += inner.sites
    return result


def _rewrite_one(gm: fx.GraphModule, options: Options, verified: dict[str, str]) -> Result:
    skip: set[str] = set()
    failed: list[Site] = []
    if options.disable is True:
        return Result(gm)
    while True:  # again from the start, without the regions that turned out wrong
        work = _copy(gm)
        detection = detect(work.graph, options.strict)
        off = [r for r in detection.regions if options.disabled(r.location)]
        left = off + [r for r in detection.regions if r.root.name in skip]
        if left:
            detection = detect(work.graph, options.strict, leave=frozenset(r.root.name for r in left))
        sites = [_refused(idiom, r) for idiom, r in detection.refusals]
        sites += [
            _refused("switched off", Refusal("moec.disable names this site", str(r.root), r.location)) for r in off
        ]
        befores = [_before(work, detection, r) for r in detection.regions]
        derived = [_derived(detection, r) for r in detection.regions]
        problems = [_problem(r) for r in detection.regions]
        try:
            lowered = lower(work.graph, detection)
        except LoweringFault as fault:
            if options.strict:
                raise (fault.__cause__ or fault) from None
            log.warning(
                "moec: internal fault while rewriting %s; the site is left alone. Please report it.",
                fault.region.location,
                exc_info=True,
            )
            failed.append(
                _refused(
                    fault.region.idiom,
                    Refusal(f"internal fault: {fault}", str(fault.region.root), fault.region.location),
                )
            )
            skip.add(fault.region.root.name)
            continue
        except Exception as fault:
            if options.strict:
                raise
            log.error("moec: internal fault; the graph is left alone. Please report this.", exc_info=True)
            sites += [
                _refused(r.idiom, Refusal(f"internal fault: {fault!r}", str(r.root), r.location))
                for r in detection.regions
            ]
            return Result(gm, failed + sites)
        work.graph.lint()
        work.recompile()
        for before, first, problem, done in zip(befores, derived, problems, lowered):
            sites.append(_rewritten(work, before, first, problem, done))
        wrong = _verify(detection, sites, options, verified) if options.verify != "off" else []
        if not wrong:
            return Result(work, failed + sites)
        for name, site in wrong:
            skip.add(name)
            failed.append(site)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapped)
    last = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(last.meta)
    graph._codegen = copy.deepcopy(gm.graph._codegen)
    made = graph_module(gm, graph, type(gm).__name__)
    made.meta = dict(gm.meta)
    return made


def _refused(idiom: str, refusal: Refusal) -> Site:
    return Site(status="refused", idiom=idiom, location=refusal.location, reason=str(refusal))


def _problem(region: MoERegion) -> Problem | None:
    products = [e for e in expressions(region.body) if isinstance(e, GroupedLinear)]
    inner, outer = _weight_shape(products[-1]), _weight_shape(products[0])
    x = value(region.x) if region.x is not None else None
    if inner is None or outer is None:
        return None
    tokens = x.shape[0] if isinstance(x, torch.Tensor) and isinstance(x.shape[0], int) else None
    return Problem(
        num_tokens=tokens,
        top_k=region.top_k,
        num_experts=region.num_experts,
        d_model=inner[1],
        d_expert=outer[1] if len(products) > 1 else inner[0],
        dtype=inner[2],
        device=inner[3],
        training=torch.is_grad_enabled(),
        stacked=not isinstance(products[0].weight, Separate),
        bias=any(p.bias is not None for p in products),
    )


def _weight_shape(product: GroupedLinear) -> tuple[int, int, torch.dtype, str] | None:
    """(out features, in features, dtype, device) of one expert's weight."""
    if isinstance(product.weight, Separate):
        val = value(product.weight.values[0])
    else:
        outers = [e for e in expressions(product.weight.value) if isinstance(e, Outer)]
        val = value(outers[0].node) if outers else None
    if not isinstance(val, torch.Tensor):
        return None
    out, inside = val.shape[-2:] if not product.transposed else (val.shape[-1], val.shape[-2])
    return int(out), int(inside), val.dtype, val.device.type


def _before(gm: fx.GraphModule, detection: Detection, region: MoERegion) -> fx.GraphModule | None:
    """The original region, from the nodes it reads to its root."""
    inputs, same = _inputs(detection, region)
    output = region.root_readers[0][1] if region.root_readers else region.root
    behind = _cone(detection, {region.root, output}, set(same), region.root)
    inputs += [n for n in gm.graph.nodes if n in behind and n.op in ("placeholder", "get_attr") and n not in inputs]
    try:
        return extract(gm, [n for n in gm.graph.nodes if n in behind], inputs, output, "Before", same)
    except Exception:
        log.debug("moec: could not cut out %s", region.root, exc_info=True)
        return None


def _inputs(detection: Detection, region: MoERegion) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """What a region reads, and for every node that holds the same value (x viewed twice) the one that is the input."""
    inputs = [n for n in outer_nodes(region) if n not in region.derived]
    values = detection.values
    held = {id(values.of[n]): n for n in inputs}
    return inputs, {n: held[id(v)] for n, v in values.of.items() if id(v) in held}


def _derived(detection: Detection, region: MoERegion) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """How the region's derived values come from its other inputs, in graph order, and what else holds such an input."""
    if not region.derived:
        return [], {}
    _, same = _inputs(detection, region)
    found = _cone(detection, set(region.derived), set(same), region.root)
    position = detection.values.position
    return sorted((n for n in found if n.op not in ("placeholder", "get_attr")), key=position.__getitem__), same


def _cone(detection: Detection, wanted: set[fx.Node], stop: set[fx.Node], last: fx.Node) -> set[fx.Node]:
    """What `wanted` is computed from, writes to the buffers on the way included, up to the node `last`."""
    values = detection.values
    found: set[fx.Node] = set()
    work = list(wanted)
    while work:
        node = work.pop()
        if node in found or node in stop or values.position[node] > values.position[last]:
            continue
        found.add(node)
        work.extend(node.all_input_nodes)
        work.extend(w for w in values.writes.get(values.storage.get(node, node), ()))
    return found


def _rewritten(
    gm: fx.GraphModule,
    before: fx.GraphModule | None,
    derived: tuple[list[fx.Node], dict[fx.Node, fx.Node]],
    problem: Problem | None,
    done: Lowered,
) -> Site:
    region, (first, same) = done.region, derived
    nodes = (*first, *done.nodes)
    read = {n for node in nodes for n in node.all_input_nodes if n not in nodes}
    same = {n: same[n] for n in read if same.get(n, n) is not n}
    inputs = {same.get(n, n) for n in read}
    names = {node: name for node, name in done.names.items() if node in inputs}
    rank = {n.name: i for i, n in enumerate(outer_nodes(region))}
    ordered = sorted(inputs, key=lambda n: (rank.get(names.get(n, n.name), len(rank)), n.name))
    after = extract(gm, nodes, ordered, done.result, "After", same, done.names)
    site = Site(
        status="rewritten",
        idiom=region.idiom,
        location=region.location,
        num_experts=region.num_experts,
        top_k=region.top_k,
        before=before,
        after=after,
        facts=region.facts,
    )
    if problem is not None:
        site.d_model, site.d_expert = problem.d_model, problem.d_expert
        site.granularity = 4 * problem.d_model / problem.d_expert
        site.strategy = schedule.describe(problem)
    return site


def _verify(
    detection: Detection, sites: list[Site], options: Options, verified: dict[str, str]
) -> list[tuple[str, Site]]:
    """The regions that are wrong; their sites say so. Equal regions are checked once unless everything is asked for."""
    wrong = []
    done = [s for s in sites if s.status == "rewritten"]
    for region, site in zip(detection.regions, done):
        if site.before is None or site.after is None:
            site.verified = "not verified: the region could not be cut out"
            continue
        key = _structure(site)
        if options.verify == "sample" and key in verified:
            site.verified = verified[key]
            continue
        ids = next(e.node.name for e in expressions(region.topk_ids) if isinstance(e, Outer))
        root = facts.ids_root(
            detection.values.of[next(e.node for e in expressions(region.topk_ids) if isinstance(e, Outer))]
        )
        try:
            distinct = root is not None and facts.ids_distinct(root)
            most = 2 if options.verify == "sample" else 6
            outcome = verify(site.before, site.after, ids, region.num_experts, distinct, region.autocast, most)
        except Exception as fault:
            if options.strict:
                raise
            outcome = f"not verified: {type(fault).__name__}: {fault}"
        if isinstance(outcome, Mismatch):
            message = f"the rewritten region does not agree with the original: {outcome}. Please report this."
            log.error("moec: %s (%s)", message, region.location)
            if options.strict:
                raise StrictError(message)
            wrong.append(
                (region.root.name, _refused(region.idiom, Refusal(message, str(region.root), region.location)))
            )
            continue
        site.verified = verified[key] = outcome
    return wrong


def _structure(site: Site) -> str:
    """A text that two regions share when they are the same computation on the same shapes."""
    assert site.before is not None
    assert site.after is not None
    shapes = [
        str(getattr(value(n), "shape", None)) + str(getattr(value(n), "dtype", None))
        for n in site.before.graph.nodes
        if n.op == "placeholder"
    ]
    names = {n: f"%{i}" for gm in (site.before, site.after) for i, n in enumerate(gm.graph.nodes)}
    body = [
        f"{n.op}:{n.target if n.op != 'placeholder' else ''}{torch.fx.node.map_arg((n.args, n.kwargs), names.get)}"
        for gm in (site.before, site.after)
        for n in gm.graph.nodes
    ]
    return "\n".join(shapes + body)


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[object] | None = None, options: Mapping[str, object] | None = None
) -> tuple[fx.GraphModule, list[Site]]:
    """The pass alone: rewrites a Dynamo graph, or the module of a `torch.export` program (`ep.module()` or `ep.graph_module`).

    `gm` is not changed. `example_inputs` are needed only when the graph has no fake values (a plain `symbolic_trace`); then they
    are propagated through a copy first. `options` are moec's own ("moec.verify", "moec.disable", "moec.strict").
    Returns the new module and one `Site` for each MoE layer found.
    """
    ours, rest = split(options)
    if rest:
        raise OptionError(f"moec.rewrite knows only moec's own options, not {', '.join(map(repr, rest))}")
    if example_inputs is not None and not any(value(n) is not None for n in gm.graph.nodes):
        from torch._subclasses import FakeTensorMode
        from torch.fx.passes.fake_tensor_prop import FakeTensorProp

        gm = _copy(gm)
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)
    result = rewrite_graph(gm, ours)
    refused = [s for s in result.sites if s.status == "refused" and s.idiom != "switched off"]
    if ours.strict and refused:
        raise StrictError(f"refused: {refused[0].reason}")
    return result.gm, result.sites
