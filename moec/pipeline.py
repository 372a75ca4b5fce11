"""The way from a captured graph to a rewritten one, as one visible list of steps.

    declarations -> detect -> schedule -> cut out "before" -> lower -> cut out "after" -> verify

`rewrite_graph` works on a copy, so that a mismatch or a fault leaves the original as it was. Graphs called by higher-order ops
(checkpoint bodies) are walked too. What was declared is taken out first: layers of `moec.nn` become sites as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import fx

from moec import schedule
from moec.capture import promises
from moec.capture.declared import take_declarations
from moec.config import Options, split
from moec.errors import OptionError, StrictError
from moec.fx import copied, value
from moec.ir import (
    Declaration,
    Feedforward,
    GroupedLinear,
    MoERegion,
    Outer,
    Problem,
    Refusal,
    Separate,
    Site,
    expressions,
)
from moec.passes import cutout, facts
from moec.passes.detect import Detection, detect
from moec.passes.lower import Lowered, LoweringFault, lower
from moec.passes.recognize import recognize
from moec.passes.verify import Mismatch, verify

log = logging.getLogger("moec")


@dataclass(eq=False)
class Result:
    """A rewritten graph, what happened to each site, and the declared modules whose whole call it holds (by token)."""

    gm: fx.GraphModule
    sites: list[Site] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
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
            result.returned += inner.returned
    return result


def _rewrite_one(gm: fx.GraphModule, options: Options, verified: dict[str, str]) -> Result:
    skip: set[str] = set()
    failed: list[Site] = []
    gm, declared, returned = take_declarations(gm, copied)
    if options.disable is True:
        return Result(gm)
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    while True:  # again from the start, without the regions that turned out wrong
        work = copied(gm)
        detection = detect(work.graph, options.strict)
        off = [r for r in detection.regions if options.disabled(r.location)]
        left = off + [r for r in detection.regions if r.root.name in skip]
        if left:
            detection = detect(work.graph, options.strict, leave=frozenset(r.root.name for r in left))
        nodes = {node.name: node for node in work.graph.nodes}
        sites = [_refused(idiom, r, promises.around(nodes.get(r.node))) for idiom, r in detection.refusals]
        sites += [_refused_region(detection, r, "moec.disable names this site", "switched off") for r in off]
        cuts = [cutout.cut(work, detection, r) for r in detection.regions]
        withins = [_within(detection, r) for r in detection.regions]
        bodies = {r: body for r in detection.regions if (body := recognize(r)) is not None}
        problems = {r: _problem(r, _promise(within), bodies.get(r)) for r, within in zip(detection.regions, withins)}
        whole = {r: body for r, body in bodies.items() if (p := problems[r]) is not None and schedule.in_one(p)}
        try:
            lowered = lower(work.graph, detection, whole)
        except LoweringFault as fault:
            if options.strict:
                raise (fault.__cause__ or fault) from None
            log.warning(
                "moec: internal fault while rewriting %s; the site is left alone. Please report it.",
                fault.region.location,
                exc_info=True,
            )
            failed.append(_refused_region(detection, fault.region, f"internal fault: {fault}"))
            skip.add(fault.region.root.name)
            continue
        except Exception as fault:
            if options.strict:
                raise
            log.error("moec: internal fault; the graph is left alone. Please report this.", exc_info=True)
            sites += [_refused_region(detection, r, f"internal fault: {fault!r}") for r in detection.regions]
            return Result(gm, failed + sites + [site for _, site in declared], returned)
        work.graph.lint()
        work.recompile()
        done = [
            _rewritten(work, piece, problems[low.region], within, low)
            for piece, within, low in zip(cuts, withins, lowered)
        ]
        wrong = _verify(detection, done, options, verified) if options.verify != "off" else []
        if not wrong:
            placed = [(position[r.root.name], site) for r, site in zip(detection.regions, done)]
            return Result(work, failed + sites + [s for _, s in sorted(placed + declared, key=itemgetter(0))], returned)
        for name, site in wrong:
            skip.add(name)
            failed.append(site)


def _refused(idiom: str, refusal: Refusal, within: tuple[str, ...]) -> Site:
    site = Site(status="refused", idiom=idiom, location=refusal.location, reason=str(refusal), within=within)
    if (promise := _promise(within)) is not None:
        site.declared = promise.name
        site.granularity, site.granularity_assumed = promise.granularity, False
    return site


def _refused_region(detection: Detection, region: MoERegion, missing: str, idiom: str | None = None) -> Site:
    refusal = Refusal(missing, str(region.root), region.location)
    return _refused(idiom or region.idiom, refusal, _within(detection, region))


def _within(detection: Detection, region: MoERegion) -> tuple[str, ...]:
    """The declared modules that compute any part of a region, those around its root first."""
    return promises.around(region.root, *cutout.inside(detection, region))


def _promise(within: tuple[str, ...]) -> Declaration | None:
    """The innermost declaration."""
    return next((d for token in reversed(within) if (d := promises.declaration_of(token)) is not None), None)


def _problem(region: MoERegion, promise: Declaration | None, body: Feedforward | None) -> Problem | None:
    products = [e for e in expressions(region.body) if isinstance(e, GroupedLinear)]
    inner, outer = _weight_shape(products[-1]), _weight_shape(products[0])
    x = value(region.x) if region.x is not None else None
    if inner is None or outer is None:
        return None
    tokens = x.shape[0] if isinstance(x, torch.Tensor) and isinstance(x.shape[0], int) else None
    d_expert = outer[1] if len(products) > 1 else inner[0]
    return Problem(
        num_tokens=tokens,
        top_k=region.top_k,
        num_experts=region.num_experts,
        d_model=inner[1],
        d_expert=d_expert,
        dtype=inner[2],
        device=inner[3],
        training=torch.is_grad_enabled(),
        stacked=not isinstance(products[0].weight, Separate),
        bias=any(p.bias is not None for p in products),
        granularity=promise.granularity_of(d_expert) if promise is not None else None,
        gating=body.gating if body is not None else None,
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


def _rewritten(
    gm: fx.GraphModule, piece: cutout.Cutout, problem: Problem | None, within: tuple[str, ...], done: Lowered
) -> Site:
    region = done.region
    site = Site(
        status="rewritten",
        idiom=region.idiom,
        location=region.location,
        num_experts=region.num_experts,
        top_k=region.top_k,
        before=piece.before,
        after=cutout.after(gm, piece, done),
        facts=region.facts,
        declared=promise.name if (promise := _promise(within)) is not None else None,
        within=within,
    )
    if problem is not None:
        site.d_model, site.d_expert = problem.d_model, problem.d_expert
        site.granularity_assumed = problem.granularity is None
        site.granularity = problem.granularity or 4 * problem.d_model / problem.d_expert
        site.strategy = schedule.describe(problem)
    return site


def _verify(
    detection: Detection, done: list[Site], options: Options, verified: dict[str, str]
) -> list[tuple[str, Site]]:
    """The regions that are wrong; their sites say so. Equal regions are checked once unless everything is asked for."""
    wrong = []
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
            wrong.append((region.root.name, _refused_region(detection, region, message)))
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

        gm = copied(gm)
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)
    result = rewrite_graph(gm, ours)
    refused = [s for s in result.sites if s.status == "refused" and s.idiom != "switched off"]
    if ours.strict and refused:
        raise StrictError(f"refused: {refused[0].reason}")
    return result.gm, result.sites
