"""detect: terms become regions, or refusals with a reason. Pure: the graph is only read.

Every idiom proposes candidates; `passes.body` proves or refuses each. What is proven is then held against the graph around it:
nothing inside the region may be read outside, its state (grad mode, autocast) must be the same throughout, and its assumptions
(the markers that capture left) are those that a routed sum discharges. All is decided here; lowering only writes it down.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import fx

from moec.fx import Ambient, Buffers, ambient_states, ancestors, is_assert, live_nodes, target_name, value
from moec.ir import Expr, GroupedLinear, MoERegion, Outer, Refusal, Separate, expressions
from moec.passes import facts
from moec.passes.body import Body
from moec.passes.idioms import IDIOMS, Candidate
from moec.passes.normalise import Values
from moec.passes.orders import Refused
from moec.passes.roll import Roller
from moec.passes.terms import Arg, Term, dtype, location, shape

log = logging.getLogger("moec")


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in one graph. `markers` are the capture markers that the regions discharge."""

    regions: tuple[MoERegion, ...]
    refusals: tuple[tuple[str, Refusal], ...]
    markers: frozenset[fx.Node]
    values: Values
    dead: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class _Proven:
    region: MoERegion
    body: Body
    root: Term


def detect(graph: fx.Graph, strict: bool = False, leave: frozenset[str] = frozenset()) -> Detection:
    """Finds all routed sums of a graph, except those whose root is named in `leave`.

    `strict` lets internal faults out instead of turning them into refusals.
    """
    values = Values(graph)
    states = ambient_states(graph)
    proven: list[_Proven] = []
    doubts: list[tuple[Term, str, Refusal]] = []
    for idiom in IDIOMS:
        for candidate in idiom.candidates(values):
            result = _try(candidate, values, states, strict)
            if isinstance(result, _Proven):
                proven.append(result)
            elif result is not None:
                doubts.append((candidate.root, idiom.__name__.rsplit(".", 1)[-1], result))
    explained = {id(p.root) for p in proven}  # by another idiom
    refusals = [(idiom, doubt) for root, idiom, doubt in doubts if id(root) not in explained]
    known = [p.body.ids for p in proven]
    proven = [p for p in proven if p.region.root.name not in leave]
    proven.sort(key=lambda p: values.position[p.region.root])
    proven, escaped, dead, markers = _isolated(graph, values, proven)
    refusals += escaped
    refusals += _unseen_routers(values, known, refusals)
    return Detection(tuple(p.region for p in proven), tuple(refusals), markers, values, dead)


def _try(
    candidate: Candidate, values: Values, states: dict[fx.Node, Ambient], strict: bool
) -> _Proven | Refusal | None:
    body = Body(values, Roller(), candidate.at)
    try:
        found = candidate.prove(body)
        if found is None:
            return None
        if not any(isinstance(e, GroupedLinear) for e in expressions(found.expr)):
            return None
        body.check_sizes()
        _one_state(body, states, candidate.at)
        return _Proven(_region(candidate, found.idiom, found.expr, body, states), body, candidate.root)
    except Refused as refused:
        return refusal(refused)
    except Exception as fault:  # a fault of ours must not reach the user's run
        if strict:
            raise
        log.warning(
            "moec: internal fault while looking at %s; the site is left alone. Please report it.",
            candidate.at,
            exc_info=True,
        )
        return Refusal(f"internal fault: {type(fault).__name__}: {fault}", str(candidate.at), location(candidate.at))


def refusal(refused: Refused) -> Refusal:
    """The refusal as data: the node and line of the term where the fact is missing."""
    node = refused.term.node if isinstance(refused.term, Term) else None
    shown = (
        str(node)
        if node is not None
        else refused.term.show(2)
        if isinstance(refused.term, Term)
        else repr(refused.term)
    )
    return Refusal(refused.missing, shown, location(node))


def outer_nodes(region: MoERegion) -> list[fx.Node]:
    """The nodes a region reads, each once."""
    nodes: dict[fx.Node, None] = {}
    for expr in (*expressions(region.topk_ids), *expressions(region.body)):
        if isinstance(expr, Outer):
            nodes[expr.node] = None
        for theta in (getattr(expr, "weight", None), getattr(expr, "bias", None), getattr(expr, "theta", None)):
            if isinstance(theta, Separate):
                nodes.update(dict.fromkeys(theta.values))
    return list(nodes)


def _region(candidate: Candidate, idiom: str, expr: Expr, body: Body, states: dict[fx.Node, Ambient]) -> MoERegion:
    if body.ids is None or body.num_experts is None or body.top_k is None:
        raise Refused("the expert ids of these rows are not known", candidate.root)
    readers = tuple(edge for edge, read in body.values.reads.items() if read is candidate.root)
    out_dtype = dtype(candidate.root)
    if out_dtype is None:
        raise Refused("a sum of unknown dtype", candidate.root)
    return MoERegion(
        idiom=idiom,
        topk_ids=body.outer(body.ids),
        num_experts=body.num_experts,
        top_k=body.top_k,
        body=expr,
        root=candidate.at,
        root_readers=readers,
        clamp_ids=body.clamp_ids,
        check_ids=body.check_ids,
        out_dtype=out_dtype,
        out_shape=_out_shape(candidate.root, body),
        autocast=states[candidate.at].autocast,
        facts=tuple(dict.fromkeys(body.facts)),
        location=location(candidate.at),
        x=body.values.holds(body.x, candidate.at) if body.x is not None else None,
        derived=tuple(node for t in body.weighed if (node := body.values.holds(t, candidate.at)) is not None),
    )


def _out_shape(root: Term, body: Body) -> tuple[int, ...] | None:
    sizes = shape(root) or ()
    if body.token_dims == 1:
        return None
    wanted = tuple(s if isinstance(s, int) else -1 for s in sizes)
    if wanted.count(-1) > 1:
        raise Refused("several token dims of symbolic size", root)
    return wanted


def _one_state(body: Body, states: dict[fx.Node, Ambient], at: fx.Node) -> None:
    """What the body computes anew is computed at the end of the region: the state there must be the state it had."""
    for node, term in body.placed:
        if states[node] != states[at]:
            raise Refused("part of the expert runs under another autocast or grad mode than the sum", term)
    for term in body.inner:
        for instance in term.instances or (term,):
            computed = instance.node
            if (
                computed is not None
                and dtype(instance) is not None
                and instance.val.is_floating_point()
                and states[computed] != states[at]
            ):
                raise Refused("part of the expert runs under another autocast or grad mode than the sum", instance)


# -- the region and the graph around it ----------------------------------------------------------------------------------


def _isolated(
    graph: fx.Graph, values: Values, proven: list[_Proven]
) -> tuple[list[_Proven], list[tuple[str, Refusal]], frozenset[fx.Node], frozenset[fx.Node]]:
    """Keeps the regions that nothing reads from inside, and says what dies with them."""
    refused: list[tuple[str, Refusal]] = []
    buffers = Buffers(values.view_of, values.writes)
    for p in list(proven):
        if (aliased := _read_while_written(values, p)) is not None:
            proven = [q for q in proven if q is not p]
            refused.append((p.region.idiom, aliased))
    assumed = [m for m in graph.nodes if is_marker(m)]
    discharged = {id(p): frozenset(m for m in assumed if _discharges(values, m, p)) for p in proven}
    while True:
        markers = frozenset().union(*(discharged[id(p)] for p in proven))
        dead = _dead(graph, buffers, proven, markers)
        for p in proven:
            escape = _escape(values, p, dead) or _other_effect(graph, values, p, discharged[id(p)], dead)
            if escape is not None:
                refused.append((p.region.idiom, escape))
                proven = [q for q in proven if q is not p]
                break
        else:
            return proven, refused, dead, markers


def _dead(graph: fx.Graph, buffers: Buffers, proven: list[_Proven], markers: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The nodes that are needed now and not once the regions are replaced."""
    if not proven:
        return frozenset()
    cut = frozenset(edge for p in proven for edge in p.region.root_readers)
    inputs = [n for p in proven for n in outer_nodes(p.region)]
    # a root that another region reads as its input is replaced, not kept
    roots = {p.region.root for p in proven}
    inputs = [n for n in inputs if n not in roots]
    before = live_nodes(graph, buffers, ())
    unchecked = live_nodes(graph, buffers, inputs, cut, lambda n: n in markers or is_assert(n))
    gone = before - unchecked
    # a check of something that dies dies with it; every other check is kept, with what it needs
    touched: set[fx.Node] = set()
    for node in graph.nodes:
        if (node in gone and _is_tensor(node)) or any(
            a in touched and (node, a) not in cut for a in node.all_input_nodes
        ):
            touched.add(node)
    dying = frozenset(n for n in gone if is_assert(n) and n in touched)
    after = live_nodes(graph, buffers, inputs, cut, lambda n: n in markers or n in dying)
    dead: set[fx.Node] = set()
    for node in graph.nodes:  # code that was dead before goes too where it reads what dies
        if node not in after and (node in before or any(arg in dead for arg in node.all_input_nodes)):
            dead.add(node)
    return frozenset(dead)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), (torch.Tensor, tuple, list))


def _escape(values: Values, p: _Proven, dead: frozenset[fx.Node]) -> Refusal | None:
    for term in p.body.heavy:
        for instance in term.instances or (term,):
            for node in instance.nodes:
                if node not in dead:
                    user = next((u for u in node.users if u not in dead), node)
                    return Refusal(
                        "a value computed inside an expert is read outside the region", str(user), location(user)
                    )
    return None


def _other_effect(
    graph: fx.Graph, values: Values, p: _Proven, markers: frozenset[fx.Node], dead: frozenset[fx.Node]
) -> Refusal | None:
    """Under an assumption, the loop may do nothing but add to the sum: what else it did was done for every expert."""
    if not markers:
        return None
    first, last = min(values.position[m] for m in markers), values.position[p.region.root]
    inputs = outer_nodes(p.region)
    allowed = set(inputs).union(*(ancestors(n) for n in inputs))
    writers = {w for group in values.writes.values() for w in group}
    for node in graph.nodes:
        if not first < values.position[node] < last or node in dead or node in markers or node in allowed:
            continue
        if (
            node.op in ("call_function", "call_method")
            and target_name(node) not in STATE
            and (node.users or node in writers)
        ):
            return Refusal("the loop does something else for each expert that has tokens", str(node), location(node))
    return None


STATE = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def _read_while_written(values: Values, p: _Proven) -> Refusal | None:
    """A buffer built in place must not be seen half built, nor through another view."""
    writer = values.written_at.get(p.root)
    if writer is None:
        return None
    target = writer.args[0] if writer.args else None
    if not isinstance(target, fx.Node):
        return None
    buffer = values.storage[target]
    if buffer.op in ("placeholder", "get_attr"):
        return Refusal("the experts add to an input of the graph", str(buffer), location(writer))
    done = values.position[writer]
    first = min(values.position[w] for w in values.writes[buffer])
    writers = {w for w in values.writes[buffer] if values.position[w] <= done}
    cut = set(p.region.root_readers)
    for member in values.members[buffer]:
        if values.position[member] > done:
            continue  # a view of the finished sum
        for user in member.users:
            if (user, member) in cut or user in writers or values.position[user] < first:
                continue
            read = values.reads.get((user, member))
            if user in values.members[buffer] and not user.users:
                continue
            if values.position[user] <= done and _feeds_only(user, writers):
                continue
            return Refusal(
                "the buffer that the experts add to is read before it is complete, or through another view",
                str(user),
                location(user) + (f" reads {read!r}" if read is None else ""),
            )
    return None


def _feeds_only(node: fx.Node, writers: set[fx.Node]) -> bool:
    """Whether a read of the unfinished buffer only serves the next write (`out[rows] += y` reads before it writes)."""
    work, seen = [node], set()
    while work:
        n = work.pop()
        if n in writers or n in seen:
            continue
        seen.add(n)
        if (not n.users and not is_assert(n)) or n.op == "output" or len(seen) > 64:
            return False
        work.extend(n.users)
    return True


# -- markers and near misses ---------------------------------------------------------------------------------------------


def is_marker(node: fx.Node) -> bool:
    """Whether a node is an assumption that capture made."""
    return node.op == "call_function" and (getattr(node.target, "__module__", "") or "") == "moec.capture.markers"


def _discharges(values: Values, marker: fx.Node, p: _Proven) -> bool:
    """Whether the assumption holds for a routed sum over these ids: an expert without slots adds nothing."""
    subject = values.reads.get((marker, marker.args[0])) if isinstance(marker.args[0], fx.Node) else None
    if target_name(marker) == "assume_every":
        mask = facts.is_hit(subject)
        return mask is not None and mask.root is p.body.ids and mask.num_experts == p.region.num_experts
    if marker.args[1] is True and (root := facts.in_range(subject, p.region.num_experts)) is not None:
        return root is p.body.ids and p.region.check_ids  # the rewritten graph checks it
    answered = _says_not_empty(subject, marker.args[1])
    return answered is not None and answered[0] is p.body.ids and answered[1] == _expert_after(values, marker, p)


def _expert_after(values: Values, marker: fx.Node, p: _Proven) -> int | None:
    """The expert whose products come next after the marker: the one that the branch would have skipped."""
    at = values.position[marker]
    later = [
        (values.position[instance.node], expert)
        for term in p.body.heavy
        for expert, instance in enumerate(term.instances or ())
        if instance.node is not None and values.position[instance.node] > at
    ]
    return min(later, default=(0, None))[1]


def _says_not_empty(condition: Arg, value: object) -> tuple[Term, Arg] | None:
    """(ids, expert) when answering `condition` with `value` says that the expert has slots."""
    if not isinstance(condition, Term):
        return None
    if condition.op in ("not", "not_", "logical_not", "bitwise_not", "sym_not"):
        return _says_not_empty(condition.args[0], not value)
    if condition.op in ("cast", "item", "bool"):
        return _says_not_empty(condition.args[0], value)
    compared = {"eq": (0, False), "ne": (0, True), "gt": (0, True), "ge": (1, True), "lt": (1, False), "le": (0, False)}
    if condition.op in compared and len(condition.args) >= 2:
        bound, answer = compared[condition.op]
        left, right = condition.args[:2]
        if right == bound and not isinstance(right, Term) and value is answer:
            return facts.row_count_of(left)
        if condition.op in ("eq", "ne") and left == 0 and not isinstance(left, Term) and value is answer:
            return facts.row_count_of(right)
        mask = facts.mask_of(condition)
        return (mask.root, mask.expert) if mask is not None and mask.axes == () and value is True else None
    return facts.row_count_of(condition) if value is True else None


def _unseen_routers(
    values: Values, known: list[Term | None], refusals: list[tuple[str, Refusal]]
) -> list[tuple[str, Refusal]]:
    """A topk whose indices choose rows, and no idiom that knows why: said aloud, once, when nothing else was said."""
    if refusals:
        return []
    found: list[tuple[str, Refusal]] = []
    for node, term in values.of.items():
        if not (
            isinstance(term, Term)
            and term.op == "item_of"
            and term.args[1] == 1
            and term.node is node
            and term not in known
        ):
            continue
        source = term.args[0]
        if not (isinstance(source, Term) and source.op == "topk"):
            continue
        if any(k is not None and _depends_on(k, term) for k in known):
            continue
        if any(u.op == "output" for u in node.users):
            found.append(
                (
                    "unknown",
                    Refusal(
                        "expert ids leave the graph: a graph break lies between the router and its experts",
                        str(node),
                        location(node),
                    ),
                )
            )
            continue
        near = _near_users(node)
        users = {target_name(u) for u in near}
        if any(_reads_weights(u) for u in near) or users & {
            "one_hot",
            "eq",
            "argsort",
            "sort",
            "bincount",
            "histc",
            "scatter_",
            "scatter",
            "nonzero",
        }:
            found.append(
                (
                    "unknown",
                    Refusal(
                        "expert ids are chosen here, but no idiom explains how the tokens are dispatched",
                        str(node),
                        location(node),
                    ),
                )
            )
    return found


def _reads_weights(user: fx.Node) -> bool:
    """Whether a node gathers matrices of a parameter stack by a computed index."""
    if target_name(user) not in ("getitem", "index", "index_select", "embedding") or not isinstance(
        user.args[0], fx.Node
    ):
        return False
    source = value(user.args[0])
    return user.args[0].op in ("placeholder", "get_attr") and isinstance(source, torch.Tensor) and source.ndim >= 3


def _depends_on(term: Term, other: Term) -> bool:
    stack, seen = [term], set()
    while stack:
        t = stack.pop()
        if t is other:
            return True
        if id(t) in seen:
            continue
        seen.add(id(t))
        stack.extend(a for a in t.args if isinstance(a, Term))
    return False


def _near_users(node: fx.Node, depth: int = 3) -> set[fx.Node]:
    found: set[fx.Node] = set()
    layer = {node}
    for _ in range(depth):
        layer = {u for n in layer for u in n.users}
        found |= layer
    return found
