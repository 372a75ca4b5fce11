"""What the passes say to each other: regions, body expressions, sites, problems, refusals. All frozen, all data.

A `MoERegion` is the routed sum

    out[row(s)] += f( x[row(s)], a(s) ; theta[e(s)] )        over slots s = (token, choice)

with the body f written as a small expression tree over *slot rows*: every node of the tree stands for a tensor [S, ...] with one
row per slot, in whatever order the lowering likes, because every operation in it works row by row.

Shape letters: T tokens, K top-k, S = T*K slots, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx


@dataclass(frozen=True, eq=False)
class Stacked:
    """Expert parameters in one tensor [E, ...], indexed by expert on dim 0."""

    value: Expr

    def __str__(self) -> str:
        return f"stack({self.value})"


@dataclass(frozen=True, eq=False)
class Separate:
    """Expert parameters as E tensors; entry e belongs to expert e."""

    values: tuple[fx.Node, ...]

    def __str__(self) -> str:
        return f"{len(self.values)} x {self.values[0]}"


Theta = Stacked | Separate


@dataclass(frozen=True, eq=False)
class Outer:
    """A value computed outside the region, read as it is. `row_dims` > 0 says it has one row per slot (see SlotValue)."""

    node: fx.Node

    def __str__(self) -> str:
        return str(self.node)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """`x[row(s)]`: the row of `value` [T, ...] that belongs to the slot's token."""

    value: Expr

    def __str__(self) -> str:
        return f"rows({self.value})"


@dataclass(frozen=True, eq=False)
class SlotValue:
    """`a(s)`: a value [T, K, *feature] (row-major in any shape with T*K leading rows); `feature` is the rest of its shape."""

    value: Expr
    feature: tuple[int, ...]

    def __str__(self) -> str:
        return f"slots({self.value})"


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """`theta[e(s)]` as a row value, e.g. a bias that is added after the matrix product."""

    theta: Theta

    def __str__(self) -> str:
        return f"expert_rows({self.theta})"


@dataclass(frozen=True, eq=False)
class GroupedLinear:
    """`x @ W[e(s)].T + b[e(s)]`; `transposed` when the weight is stored [D, F] per expert."""

    x: Expr
    weight: Theta
    bias: Theta | None
    transposed: bool

    def __str__(self) -> str:
        bias = f", {self.bias}" if self.bias else ""
        return f"grouped_linear({self.x}, {self.weight}{bias}{', transposed' if self.transposed else ''})"


@dataclass(frozen=True, eq=False)
class Apply:
    """Any other operation, applied to expressions and constants. Inside a body it works row by row."""

    target: Callable[..., object] | str
    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        name = self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))
        shown = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs]
        return f"{name}({', '.join(shown)})"


Expr = Outer | TokenRows | SlotValue | ExpertRows | GroupedLinear | Apply


def expressions(expr: object) -> Iterator[Expr]:
    """All expressions of a body, parents first."""
    if isinstance(expr, tuple):
        for e in expr:
            yield from expressions(e)
        return
    if isinstance(expr, Stacked):
        yield from expressions(expr.value)
        return
    if not isinstance(expr, (Apply, ExpertRows, GroupedLinear, Outer, SlotValue, TokenRows)):
        return
    yield expr
    if isinstance(expr, Apply):
        yield from expressions(expr.args)
        yield from expressions(tuple(v for _, v in expr.kwargs))
    elif isinstance(expr, (TokenRows, SlotValue)):
        yield from expressions(expr.value)
    elif isinstance(expr, ExpertRows):
        yield from expressions(expr.theta)
    elif isinstance(expr, GroupedLinear):
        yield from expressions((expr.x, expr.weight, *((expr.bias,) if expr.bias else ())))


def with_features(rows: Expr, feature: tuple[int, ...]) -> Expr:
    """The rows with another feature shape; of two reshapes the last one counts."""
    if isinstance(rows, Apply) and rows.target is reshape_features:
        rows = rows.args[0]  # type: ignore[assignment]
    return Apply(reshape_features, (rows, feature))


def reshape_features(rows: torch.Tensor, feature: tuple[int, ...]) -> torch.Tensor:
    """[S, ...] to [S, *feature]. Lowering writes it as a plain reshape."""
    return rows.reshape(rows.shape[0], *feature)


@dataclass(frozen=True, eq=False)
class Feedforward:
    """A body that `moec::experts` does in one go; see `moec.ops.experts` for what its fields mean. `x` [T, D], `scale` [T, K]."""

    x: Expr
    scale: Expr | None
    gate: Theta | None
    up: Theta
    down: Theta
    gate_bias: Theta | None
    up_bias: Theta | None
    down_bias: Theta | None
    activation: str
    gating: str
    up_transposed: bool
    down_transposed: bool

    @property
    def parameters(self) -> tuple[Theta | None, ...]:
        return (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)


@dataclass(frozen=True)
class Fact:
    """Something detection proved, in words, with the node and source line it was proven at."""

    text: str
    node: str
    location: str


@dataclass(frozen=True)
class Refusal:
    """Why a candidate was left alone: the node, the missing fact, the source line."""

    missing: str
    node: str
    location: str

    def __str__(self) -> str:
        where = f" ({self.location})" if self.location else ""
        return f"{self.missing}; at {self.node}{where}"


@dataclass(frozen=True, eq=False)
class MoERegion:
    """One routed sum, proven. `root` computes [T, *out_feature]; replacing it is all that lowering has to do."""

    idiom: str
    topk_ids: Expr  # [T, K] or any shape with S = T*K elements, row-major
    num_experts: int
    top_k: int
    body: Expr
    root: fx.Node
    root_readers: tuple[tuple[fx.Node, fx.Node], ...]  # (user, argument): every read of the routed sum
    clamp_ids: bool  # out-of-range ids read the nearest expert (batched_mm) instead of contributing nothing
    check_ids: bool  # the original raises on ids that are out of range, and so must the rewrite
    out_dtype: torch.dtype
    out_shape: (
        tuple[int, ...] | None
    )  # for a reshape of [T, ...] to the root's shape, -1 for one symbolic dim; None: as it is
    autocast: tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) in force at the site
    facts: tuple[Fact, ...]
    location: str
    x: fx.Node | None = None
    derived: tuple[fx.Node, ...] = ()  # inputs that may follow from the ids: verification computes them anew


@dataclass(frozen=True)
class Problem:
    """What a strategy needs to know about a site. `num_tokens` is None while it is symbolic."""

    num_tokens: int | None
    top_k: int | None
    num_experts: int
    d_model: int
    d_expert: int
    dtype: torch.dtype
    device: str
    training: bool
    stacked: bool
    bias: bool = False
    granularity: float | None = None  # as declared; None: nobody said
    gating: str | None = (
        None  # of a body that `moec::experts` knows, one of its GATINGS; None: any other body, or one product
    )


@dataclass(frozen=True)
class Declaration:
    """What a user promised about a module with `moec.declare`: it holds experts, of this granularity G = d_ff / d_expert."""

    name: str
    location: str  # "file:line" of the promise
    granularity: float | None
    d_ff: int | None
    on_refusal: str  # "error" | "warn"

    def granularity_of(self, d_expert: int | None) -> float | None:
        """The declared G, or what follows from the declared d_ff; None where neither is known."""
        if self.granularity is not None or self.d_ff is None or d_expert is None:
            return self.granularity
        return self.d_ff / d_expert


@dataclass(eq=False)
class Site:
    """What happened to one MoE layer, for `moec.explain`. `granularity` assumes d_ff = 4 * d_model unless declared.

    `declared` names the module whose user promised that it holds experts, the innermost if there are several; `within` are all
    such modules around the site, by token (see `moec.capture.promises`), outermost first.
    """

    status: str  # "rewritten" | "refused"
    idiom: str
    location: str
    num_experts: int | None = None
    top_k: int | None = None
    d_model: int | None = None
    d_expert: int | None = None
    granularity: float | None = None
    granularity_assumed: bool = True
    strategy: str | None = None
    reason: str | None = None
    before: fx.GraphModule | None = field(default=None, repr=False)
    after: fx.GraphModule | None = field(default=None, repr=False)
    facts: tuple[Fact, ...] = field(default=(), repr=False)
    verified: str | None = None
    declared: str | None = None
    within: tuple[str, ...] = field(default=(), repr=False)
