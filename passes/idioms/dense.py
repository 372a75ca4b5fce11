"""Every expert is given every token, and zeros pick out the pairs that count.

    for e in range(E):                                          # a chain of additions
        out = out + experts[e](x) * weights[:, e, None]         # weights = zeros.scatter(1, topk_ids, topk_weights)

    y = torch.stack([expert(x) for expert in experts], dim=1)   # or bmm, or einsum, on stacked weights
    out = (y * weights[..., None]).sum(1)                       # or einsum("te,ted->td", weights, y)

becomes a routed sum over the slots (t, k): what was added for all other pairs is proven to be zero (`passes.support`), and need
not be computed. Weights on the input side count too, where the experts have no bias and f(0) = 0 (Llama 4).

Not handled: weights that are not known to be zero for an expert that a token did not choose (soft MoE), a token's ids that may
repeat, experts left out of the sum.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

from torch import fx

from moec.ir import Apply, Expr, with_features
from moec.passes import dense, facts
from moec.passes.body import Body
from moec.passes.idioms.common import Candidate, Found
from moec.passes.normalise import Values
from moec.passes.orders import EveryToken, Pairs, Refused
from moec.passes.roll import first_difference, hole_values
from moec.passes.support import Support, Supports, parse
from moec.passes.terms import Arg, Term, children, rank, same_shape, shape

NAME = "every expert on every token"
NOT_ZERO = "what the experts that a token did not choose add is not known to be zero"


@dataclass(frozen=True, eq=False)
class Link:
    """One addition to the sum so far."""

    base: Arg
    source: Arg
    term: Term


def candidates(values: Values) -> list[Candidate]:
    """Sums over a dim of experts, and longest chains of additions of one expert each."""
    known = Supports()
    found: list[Candidate] = []
    links: dict[int, Link] = {}
    for node, term in values.of.items():
        if not isinstance(term, Term) or (term.node is not node and values.written_at.get(term) is not node):
            continue
        if term.op == "sum" and (dim := _sums_experts(term)) is not None:
            found.append(Candidate(term, node, functools.partial(prove_sum, dim=dim, term=term)))
        elif term.op in ("einsum", "bmm", "matmul") and _weighs_experts(term):
            found.append(Candidate(term, node, functools.partial(prove_product, term=term)))
        elif term.op == "add" and term.args[2:] in ((), (1,)) and (link := _link(known, term)):
            links[id(term)] = link
    inner = {id(link.base) for link in links.values()}
    for key, link in links.items():
        chain = [link]
        while id(chain[-1].base) in links:
            chain.append(links[id(chain[-1].base)])
        at = values.written_at.get(link.term) or link.term.node
        if key not in inner and isinstance(at, fx.Node):
            found.append(Candidate(link.term, at, functools.partial(prove_chain, chain=tuple(chain[::-1]))))
    return found


def _sums_experts(term: Term) -> int | None:
    dims, keep, sizes = term.args[1], term.args[2], shape(term.args[0])
    if not isinstance(dims, tuple) or len(dims) != 1 or keep or sizes is None or len(sizes) < 3:
        return None
    return dims[0] if isinstance(sizes[dims[0]], int) and sizes[dims[0]] > 1 else None


def _weighs_experts(term: Term) -> bool:
    """A contraction of two values that the graph computes, neither of them a parameter."""
    operands = term.args[1] if term.op == "einsum" else term.args[:2]
    return len(operands) == 2 and not any(map(_is_parameter, operands))


def _link(known: Supports, term: Term) -> Link | None:
    for base, source in (term.args[:2], term.args[1::-1]):
        one = _expert(known, source)
        if one is None or not isinstance(base, (Term, int)):
            continue
        first = _expert(known, base)
        if first is None or isinstance(base, Term) and (base.op == "add" or first != one):
            return Link(base, source, term)
    return None


def _expert(known: Supports, source: Arg) -> int | None:
    """The one expert that a term is about: by what is known to be zero, or else by the weight it is multiplied with."""
    found = known.zero(source)
    if found is not None:
        return found.expert if isinstance(found.expert, int) else None
    for weight in source.args[:2] if isinstance(source, Term) and source.op == "mul" else ():
        while isinstance(weight, Term) and weight.op in ("reshape", "cast"):
            weight = weight.args[0]
        sizes = shape(weight.args[0]) if isinstance(weight, Term) and weight.op == "select" else None
        if sizes is not None and weight.args[1] == len(sizes) - 1 and isinstance(weight.args[2], int):
            return weight.args[2]
    return None


def prove_chain(body: Body, chain: tuple[Link, ...]) -> Found | None:
    """Rolls the additions and proves that each is one expert on all tokens, times zero where it was not chosen."""
    base, terms = chain[0].base, [link.source for link in chain]
    if _expert(body.supports, base) is not None:
        terms, base = [base, *terms], 0  # y_0 + y_1 + ...
    if len(terms) < 2 or not any(map(_computes, terms)):
        return None
    experts = [e for t in terms if (e := _expert(body.supports, t)) is not None]
    if not (base == 0 and not isinstance(base, Term)) and not (isinstance(base, Term) and base.op == "zeros"):
        raise Refused("the buffer that the experts add to does not start at zero", base)
    order = sorted(range(len(terms)), key=experts.__getitem__)
    if [experts[i] for i in order] != list(range(len(terms))):
        raise Refused(f"the sum does not have each expert exactly once, but {sorted(experts)}", chain[0].term)
    terms = [terms[i] for i in order]
    source = body.roller.roll(tuple(terms))
    if not isinstance(source, Term) or source.op == "hole":
        differs = first_difference(tuple(t for t in terms if isinstance(t, Term)))
        raise Refused(
            f"expert {differs[0]} is computed differently from expert 0" if differs else "experts differ",
            differs[1] if differs else chain[0].term,
        )
    found = body.supports.zero(source)
    if found is None or hole_values(found.expert) != tuple(range(len(terms))):
        raise Refused(NOT_ZERO, source)
    if found.num_experts not in (None, len(terms)):
        raise Refused(f"{len(terms)} of {found.num_experts} experts are in the sum", chain[0].term)
    for link in chain:
        body.same_state_as_root(body.values.written_at.get(link.term) or link.term.node, link.term)
    if not same_shape(shape(chain[-1].term), shape(source)):
        raise Refused("rows of another shape than the sum's are added (broadcast)", source)
    _claim(body, found, len(terms), chain[0].term)
    lead = len(found.tokens)
    if found.axes[:lead] != found.tokens:
        raise Refused("the rows of the experts are not those of the tokens", source)
    return Found(NAME, body.rows(source, EveryToken(), lead))


def prove_sum(body: Body, dim: int, term: Term) -> Found | None:
    """[T, E, D].sum(1) or [E, T, D].sum(0)"""
    source = term.args[0]
    found = body.supports.zero(source)
    if found is None or found.axes[dim] != "E":
        _refuse_if_in_sight(source)
        return None
    return _prove(body, found, found.axes, source, None, term)


def prove_product(body: Body, term: Term) -> Found | None:
    """einsum("te,ted->td", weights, y), or weights[:, None] @ y"""
    if not any(body.supports.zero(o) for o in (term.args[1] if term.op == "einsum" else term.args[:2])):
        _refuse_if_in_sight(term)
    if term.op == "einsum":
        equation = parse(term)
        if equation is None:
            return None
        (a, b), out = equation
        operands = list(zip(term.args[1], (a, b)))
    else:
        if rank(term.args[0]) != 3 or rank(term.args[1]) != 3:
            return None
        operands, out = [(term.args[0], "tue"), (term.args[1], "ted")], "tud"
    for (weights, ws), (rows, ys) in (operands, operands[::-1]):
        found = body.supports.zero(weights)
        if found is None or "E" not in found.axes or (term.op != "einsum" and weights is term.args[1]):
            continue
        axis = dict(zip(ws, found.axes))
        expert = next(c for c in ws if axis[c] == "E")
        tokens = [c for name in found.tokens for c in ys if axis.get(c) == name]
        feature = [c for c in ys if c not in (*tokens, expert)]
        units = [c for c in out if axis.get(c) == "1"]
        if expert in out or expert not in ys or any(c in ws for c in feature) or len(units) > 1:
            continue
        if [c for c in out if c not in units] != [*tokens, *feature] or len(tokens) != len(found.tokens):
            continue
        if ys not in ("".join([*tokens, expert, *feature]), "".join([expert, *tokens, *feature])):
            continue
        axes = tuple("E" if c == expert else axis.get(c, "*") if c in tokens else "*" for c in ys)
        return _prove(body, found, axes, rows, weights, term, len(units))
    return None


def _prove(
    body: Body, found: Support, axes: tuple[str, ...], rows: Arg, weights: Arg, term: Term, units: int = 0
) -> Found | None:
    """`rows` have those axes; `weights`, if there are any, are another factor."""
    lead = axes.index("*") if "*" in axes else len(axes)
    front = axes[:lead]
    token_first = front[-1] == "E"
    wanted = found.pairs if token_first else ("E", *found.tokens)
    if tuple(a for a in front if a != "1") != wanted or not (token_first or front[0] == "E"):
        raise Refused("pairs of tokens and experts in dims of another order", term)
    sizes = shape(rows)
    count = sizes[axes.index("E")] if sizes is not None else None
    if not isinstance(count, int):
        raise Refused("an unknown number of experts", term)
    _claim(body, found, count, term)
    body.token_dims = lead - 1 + units
    expr = body.rows(rows, Pairs(token_first), lead)
    if weights is not None:
        body.inner.append(term)
        expr = Apply(operator.mul, (expr, _column(body, weights, len(axes) - lead, term)))
    if not body.heavy:
        return None
    return Found(NAME, expr)


def _column(body: Body, weights: Arg, features: int, term: Term) -> Expr:
    """The weights of the slots, to be multiplied with rows of that many feature dims."""
    while (
        isinstance(weights, Term) and (found := body.supports.zero(weights)) is not None and found.axes != found.pairs
    ):
        if weights.op not in ("reshape", "permute"):
            break
        body.inner.append(weights)
        weights = weights.args[0]
    known = body.supports.zero(weights)
    if not isinstance(weights, Term) or known is None or known.axes != known.pairs:
        raise Refused("weights of pairs that are not [tokens, experts]", term)
    return with_features(dense.pair_values(body, weights, term), (1,) * features)


def _claim(body: Body, found: Support, count: int, term: Term) -> None:
    """The ids, their number and that of the experts."""
    if not facts.ids_distinct(found.root, found.ids) and (rank(found.ids) or 0) > 1:
        raise Refused("a token may hold the same expert twice: its ids are not known to be indices of one topk", term)
    own, root = shape(found.ids), shape(found.root)
    if own is None or root is None or (len(own) == 1 and len(root) > 1 and root[-1] != 1):
        raise Refused("slots are weighed as if they were tokens", term)
    top_k = own[-1] if len(own) > 1 else 1
    if not isinstance(top_k, int):
        raise Refused("an unknown number of choices for each token", term)
    body.claim_ids(found.root, term)
    body.claim_experts(count, term)
    body.claim_top_k(top_k, term)
    body.token_dims = len(found.tokens)
    bound = facts.ids_bound(found.root)
    body.check_ids = found.one_hot and (bound is None or bound > count)
    body.fact("zero for every expert that a token did not choose", term)


def _refuse_if_in_sight(source: Arg) -> None:
    """Is this a sum over experts all the same? Then say what is missing."""
    stack: list[tuple[Arg, int]] = [(source, 0)]
    while stack:
        term, depth = stack.pop()
        if not isinstance(term, Term) or depth > 6 or term.op in ("softmax", "topk"):
            continue
        factors = term.args[1] if term.op == "einsum" else term.args[:2] if term.op in ("bmm", "matmul") else ()
        stacked = any(_is_parameter(f) and rank(f) == 3 for f in factors)
        if stacked or (term.op == "stack" and isinstance(term.args[0], tuple) and _are_products(term.args[0])):
            raise Refused(NOT_ZERO, source)
        stack.extend((c, depth + 1) for c in children(term))


def _computes(term: Arg) -> bool:
    """Whether a product with a parameter is near."""
    stack: list[tuple[Arg, int]] = [(term, 0)]
    while stack:
        t, depth = stack.pop()
        if isinstance(t, Term) and depth < 8 and t.op not in ("softmax", "topk", "select"):
            if t.op in ("linear", "matmul") and _is_parameter(t.args[1]):
                return True
            stack.extend((c, depth + 1) for c in children(t))
    return False


def _is_parameter(term: Arg) -> bool:
    while isinstance(term, Term) and term.op in ("permute", "cast", "reshape", "select"):
        term = term.args[0]
    return isinstance(term, Term) and term.op in ("placeholder", "get_attr")


def _are_products(parts: tuple[Arg, ...]) -> bool:
    """Whether all parts are products with weights of their own."""
    weights = {id(p.args[1]) for p in parts if isinstance(p, Term) and p.op in ("linear", "matmul")}
    return len(weights) == len(parts) > 1
