"""Loops over experts that add into one buffer.

    out = torch.zeros_like(x)
    for e in range(E):                              # or over the experts that were hit, or over zip(masks, experts)
        token, choice = torch.where(ids == e)       # or one_hot(ids)[..., e], a boolean mask, ...
        y = experts[e](x[token]) * weights[token, choice, None]
        out.index_add_(0, token, y)                 # or out[token] += y, out[mask] += y

becomes a routed sum over slots (t, k): each link of the chain of additions is one expert, and the links roll into one.

Not handled: a buffer that does not start at zero; links that are not each expert exactly once from 0 to E-1; `out[token] = y`
(the last writer wins); dense forms (every expert on every token).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import fx

from moec.passes import facts
from moec.passes.body import Body
from moec.passes.idioms.common import Candidate, Found
from moec.passes.normalise import Values
from moec.passes.orders import LoopRows, Refused
from moec.passes.roll import first_difference, hole_values
from moec.passes.terms import Arg, Term, dtype, rank, same_size, shape


@dataclass(frozen=True, eq=False)
class Link:
    """One addition: `base` with `source` added to the rows `index`."""

    base: Arg
    index: Arg
    source: Arg
    term: Term
    unique: bool  # written as read-add-write: right only if no row comes twice
    steps: tuple[Term, ...] = ()  # between the write and what is added


def link_of(term: Arg) -> Link | None:
    """The addition to rows that a term is."""
    if not isinstance(term, Term):
        return None
    if term.op == "index_add" and term.args[1] == 0 and term.args[4] == 1:
        return Link(term.args[0], term.args[2], term.args[3], term, False)
    if term.op == "index_put" and len(term.args[1]) == 1:
        base, (index,), source, accumulate = term.args
        if accumulate is True:
            return Link(base, index, source, term, False)
        steps: list[Term] = []
        while isinstance(source, Term) and source.op == "cast" and _float(source) and _float(source.args[0]):
            steps.append(source)
            source = source.args[0]
        if isinstance(source, Term) and source.op == "add" and source.args[2:] in ((), (1,)):
            for read, added in (source.args[:2], source.args[1::-1]):
                if isinstance(read, Term) and read.op == "cast":
                    read = read.args[0]
                if isinstance(read, Term) and read.op == "index" and read.args == (base, (index,)):
                    return Link(base, index, added, term, True, (*steps, source))
    return None


def _float(term: Arg) -> bool:
    kind = dtype(term)
    return kind is not None and kind.is_floating_point


def candidates(values: Values) -> list[Candidate]:
    """Every longest chain of at least two additions to rows of one buffer."""
    links: dict[int, Link] = {}
    for term in [*values.written_at, *(t for t in values.of.values() if isinstance(t, Term))]:
        if id(term) not in links and (link := link_of(term)):
            links[id(term)] = link
    inner = {id(link.base) for link in links.values()}
    found = []
    for key, link in links.items():
        if key in inner:
            continue
        chain = [link]
        while id(chain[-1].base) in links:
            chain.append(links[id(chain[-1].base)])
        at = values.written_at.get(link.term) or link.term.node
        if len(chain) >= 2 and isinstance(at, fx.Node):
            found.append(Candidate(link.term, at, functools.partial(prove, chain=tuple(chain[::-1]))))
    return found


def prove(body: Body, chain: tuple[Link, ...]) -> Found | None:
    """Rolls the links and proves that each adds the rows of its own expert, all experts once."""
    base = chain[0].base
    experts = [_expert(link.index) for link in chain]
    if all(e is None for e in experts):
        raise Refused("rows are added at an index that is not known to be the rows of one expert", chain[0].index)
    for e, link in zip(experts, chain):
        if not isinstance(e, int):
            raise Refused("rows are added at an index that is not known to be the rows of one expert", link.index)
    order = sorted(range(len(chain)), key=lambda i: experts[i])
    if [experts[i] for i in order] != list(range(len(chain))):
        raise Refused(
            f"the loop does not visit each expert from 0 to {len(chain) - 1} exactly once, but {sorted(experts)}",
            chain[0].term,
        )
    chain = tuple(chain[i] for i in order)
    if not (isinstance(base, Term) and base.op == "zeros"):
        raise Refused("the buffer that the experts add to does not start at zero", base)
    index = body.roller.roll(tuple(link.index for link in chain))
    source = body.roller.roll(tuple(link.source for link in chain))
    mask = _mask(index)
    if mask is None or hole_values(mask.expert) != tuple(range(len(chain))):
        raise Refused("rows are added at an index that is not known to be the rows of one expert", index)
    if not isinstance(source, Term) or source.op == "hole":
        differs = first_difference(tuple(link.source for link in chain))
        which = (
            f"expert {differs[0]} is computed differently from expert 0"
            if differs
            else "the experts are computed differently"
        )
        raise Refused(which, differs[1] if differs else source)
    _same_everywhere(source, chain)
    dims = rank(mask.ids) or 0
    body.claim_ids(mask.root, index)
    body.claim_experts(len(chain), chain[0].term)
    bound = facts.ids_bound(mask.root)
    body.check_ids = mask.one_hot and (bound is None or bound > (mask.num_experts or 0))
    if bound is None and mask.one_hot and mask.num_experts != len(chain):
        raise Refused("a one_hot over another number of experts than the loop visits", index)
    if dims > 1 or mask.summed:
        repeats = mask.summed or any(link.unique for link in chain)
    else:
        repeats = False  # one id for each token
    if repeats and not facts.ids_distinct(mask.root, mask.ids):
        raise Refused("a token may hold the same expert twice: its ids are not known to be indices of one topk", index)
    sizes, out, root = shape(mask.ids), shape(base), shape(mask.root)
    if sizes is None or out is None or root is None:
        raise Refused("ids or buffer of unknown shape", index)
    added = shape(source)
    if added is None or len(added) != len(out) or added[1:] != out[1:]:
        raise Refused("rows of another width than the buffer's are added (broadcast)", source)
    coordinate = facts.coordinate_of(index)
    if dims > 2:
        raise Refused("ids with more than one token dim", index)
    if dims == 2 and coordinate is not None and coordinate.dim != 0:
        raise Refused("rows are added at the position of the choice, not of the token", index)
    flat = dims == 1 and len(root) > 1
    top_k = 1 if dims == 1 else sizes[1]
    if flat:
        raise Refused("slots are added to a buffer of slots", index)
    if not isinstance(top_k, int) or not same_size(out[0], sizes[0]):
        raise Refused("the buffer does not have one row for each token", base)
    body.claim_top_k(top_k, index)
    body.fact("each link adds the rows of its own expert, experts 0 to E-1 once each", chain[0].term)
    for link in chain:
        body.same_state_as_root(body.values.written_at.get(link.term) or link.term.node, link.term)
        body.inner += link.steps
    expr = body.rows(source, LoopRows(mask), 1)
    return Found("loop over experts", expr)


def _expert(index: Arg) -> Arg:
    mask = _mask(index)
    return mask.expert if mask else None


def _mask(index: Arg) -> facts.Mask | None:
    """The mask whose true rows the index lists."""
    coordinate = facts.coordinate_of(index)
    if coordinate is not None:
        return coordinate.mask
    mask = facts.mask_of(index)
    return mask if mask is not None and len(mask.axes) == 1 and isinstance(mask.axes[0], int) else None


def _same_everywhere(source: Term, chain: tuple[Link, ...]) -> None:
    """No hole in the operations: where two experts differ in more than weights and number, say which."""
    stack, seen = [source], set()
    while stack:
        term = stack.pop()
        if id(term) in seen or term.instances is None:
            continue
        seen.add(id(term))
        if term.op == "hole":
            instances = [i for i in term.instances if i.op not in ("placeholder", "get_attr", "opaque")]
            if len({i.op for i in term.instances}) > 1 or (instances and len({len(i.args) for i in instances}) > 1):
                differs = next(n for n, i in enumerate(term.instances) if i.op != term.instances[0].op)
                raise Refused(
                    f"expert {differs} computes `{term.instances[differs].op}` where expert 0 computes `{term.instances[0].op}`",
                    term.instances[differs],
                )
        stack.extend(c for c in _rolled_children(term))


def _rolled_children(term: Term) -> list[Term]:
    found: list[Term] = []
    for arg in (*term.args, *(v for _, v in term.kwargs)):
        for a in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(a, Term):
                found.append(a)
    return found
