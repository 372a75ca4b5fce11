"""Guards: one tiny program for each fact that detection must not take for granted.

Each program is refused, for the reason given, or comes out equal to eager in value and every gradient. Verification is off
here, so that it is detection that has to notice. `None` as the reason: the program is a routed sum all the same and must be
right.

T, K, E, D, H: tokens, top-k, experts, model width, expert width. `up` and `down` are lists of E parameters, `UP` and `DOWN`
stacks of them.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import moec
from moec.ir import Site

T, K, E, D, H = 9, 2, 4, 8, 16


@dataclass(frozen=True)
class Guard:
    name: str
    call: Callable[..., object]
    reason: str | None  # a regular expression; None: must be right
    grad: bool = True
    dtype: torch.dtype = torch.float64
    runs: bool = True  # False: torch has no kernel for it on this device, only the graph is looked at


GUARDS: list[Guard] = []


def guard(reason: str | None, **changes: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(call: Callable[..., object]) -> Callable[..., object]:
        GUARDS.append(Guard(call.__name__, call, reason, **changes))
        return call

    return register


def inputs(of: Guard) -> dict[str, object]:
    g = torch.Generator().manual_seed(0)

    def make(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=g) / sizes[-1] ** 0.5).to(of.dtype).requires_grad_(of.grad)

    found: dict[str, object] = {"x": make(T, D), "gate": make(E, D)}
    found["up"], found["down"] = [make(H, D) for _ in range(E)], [make(D, H) for _ in range(E)]
    found["UP"], found["DOWN"] = make(E, H, D), make(E, D, H)
    found["ids"] = torch.randint(E, (T, K), generator=g)
    return found


def route(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    topk_weights, topk_ids = F.linear(x, gate).softmax(-1).topk(K, -1)
    return topk_ids, topk_weights


def mlp(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(rows, up)), down)


def loop(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, up: list[Tensor], down: list[Tensor], out: Tensor
) -> Tensor:
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out


# -- running one -------------------------------------------------------------------------------------------------------------


def captured(call: Callable[..., object], args: dict[str, object]) -> tuple[fx.GraphModule, list[Tensor]]:
    """What Dynamo hands to a backend that is not moec's."""
    found: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Tensor]) -> object:
        found.append((copy.deepcopy(gm), example_inputs))
        return gm.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        torch.compile(call, backend=keep, fullgraph=True)(**args)
    ((gm, example_inputs),) = found
    return gm, example_inputs


def run(call: Callable[..., object], given: list[Tensor]) -> list[Tensor | None]:
    """Values, inputs afterwards, and gradients. The call works on copies, which it may write to."""
    leaves = [v.detach().clone().requires_grad_(v.requires_grad) for v in given]
    used = [v * 1 if v.is_floating_point() else v.clone() for v in leaves]
    torch.manual_seed(0)
    outs = call(*used)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    total = sum(
        (o * torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view_as(o)).sum() for o in outs if o.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    return [*(v.detach() for v in (*outs, *used)), *(v.grad for v in leaves)]


def look(of: Guard) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor], list[Site]]:
    args = inputs(of)
    names = of.call.__code__.co_varnames[: of.call.__code__.co_argcount]
    args = {name: args[name] for name in names}
    if of.runs:
        # Dynamo runs what it traces; the originals stay as they are
        gm, given = captured(of.call, tree_map(lambda v: v.detach().clone().requires_grad_(v.requires_grad), args))
        fresh = [v.detach().clone().requires_grad_(v.requires_grad) for v in given]
    else:
        graph: list[fx.GraphModule] = []
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = tree_map(lambda v: mode.from_tensor(v), args)
            flat = list(fakes.values())
            graph.append(make_fx(of.call)(*flat))
        gm, fresh = graph[0], []
    new, sites = moec.rewrite(gm, None, {"moec.verify": "off"})
    return gm, new, fresh, sites


def check(of: Guard) -> list[Site]:
    gm, new, given, sites = look(of)
    if of.runs:
        tight = of.dtype == torch.float64
        got, want = run(new, given), run(gm, given)
        assert len(got) == len(want)
        for n, (ours, theirs) in enumerate(zip(got, want)):
            ours = torch.zeros_like(theirs) if ours is None and theirs is not None else ours
            theirs = torch.zeros_like(ours) if theirs is None and ours is not None else theirs
            if ours is not None:
                rtol, atol = (1e-9, 1e-10) if tight else (3e-2, 3e-2)
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m, n=n: f"{n}: {m}\n{sites}")
    return sites


# -- sorted rows -------------------------------------------------------------------------------------------------------------


def grouped(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    UP: Tensor,
    DOWN: Tensor,
    token: Callable[[Tensor], Tensor] = lambda order: order // K,
    counted: Callable[[Tensor], Tensor] = lambda ids: ids,
    back: Callable[[Tensor], Tensor] = lambda order: order.argsort(),
    bins: Callable[[Tensor], Tensor] = lambda ids: torch.histc(ids.float(), bins=E, min=0, max=E - 1),
    choices: int = K,
) -> Tensor:
    """transformers' grouped path in bfloat16, with a place to go wrong at each step."""
    ids = topk_ids.reshape(-1)
    order = ids.argsort()
    offsets = bins(counted(ids)).cumsum(0, dtype=torch.int32)
    h = F.gelu(F.grouped_mm(x[token(order)], UP.transpose(1, 2), offs=offsets))
    rows = F.grouped_mm(h, DOWN.transpose(1, 2), offs=offsets) * topk_weights.reshape(-1)[order, None]
    return rows[back(order)].view(-1, choices, D).sum(dim=1)


LOW = {"dtype": torch.bfloat16}


@guard(None, **LOW)
def grouped_as_it_should_be(x, gate, UP, DOWN):
    return grouped(x, *route(x, gate), UP, DOWN)


@guard("two different numbers of choices per token", **LOW)
def wrong_k_in_the_division(x, gate, UP, DOWN):
    return grouped(x, *route(x, gate), UP, DOWN, token=lambda order: order // (K + 1))


@guard("chosen by two different id tensors", **LOW)
def offsets_of_other_ids(x, gate, UP, DOWN, ids):
    return grouped(x, *route(x, gate), UP, DOWN, counted=lambda _: ids.reshape(-1))


@guard("offsets are not known to be the running sum|no idiom explains", dtype=torch.bfloat16, runs=False)
def histogram_in_bfloat16(x, gate, UP, DOWN):
    return grouped(x, *route(x, gate), UP, DOWN, bins=lambda ids: torch.histc(ids.bfloat16(), bins=E, min=0, max=E - 1))


@guard("two different id tensors|no idiom explains|not known to sort|offsets are not known", **LOW)
def ids_cast_to_int8_before_the_sort(x, gate, UP, DOWN):
    topk_ids, topk_weights = route(x, gate)
    ids = topk_ids.reshape(-1)
    order = ids.to(torch.int8).argsort()
    offsets = torch.histc(ids.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    h = F.gelu(F.grouped_mm(x[order // K], UP.transpose(1, 2), offs=offsets))
    rows = F.grouped_mm(h, DOWN.transpose(1, 2), offs=offsets) * topk_weights.reshape(-1)[order, None]
    return rows[order.argsort()].view(T, K, D).sum(dim=1)


@guard("chosen by two different id tensors", **LOW)
def inverse_of_another_permutation(x, gate, UP, DOWN, ids):
    return grouped(x, *route(x, gate), UP, DOWN, back=lambda order: ids.reshape(-1).argsort().argsort())


# -- gathers by expert ---------------------------------------------------------------------------------------------------------


def batched(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, UP: Tensor, DOWN: Tensor, own: Tensor | None = None
) -> Tensor:
    ids = topk_ids.reshape(-1)
    h = F.gelu(torch.bmm(UP[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(DOWN[ids if own is None else own], h.unsqueeze(-1)).squeeze(-1)
    return (rows * topk_weights.reshape(-1, 1)).view(-1, K, D).sum(dim=1)


@guard("weights are not gathered by the expert id of each slot")
def weights_of_the_next_expert(x, gate, UP, DOWN):
    topk_ids, topk_weights = route(x, gate)
    return batched(x, topk_ids, topk_weights, UP, DOWN, own=(topk_ids.reshape(-1) + 1) % E)


@guard("under another autocast or grad mode")
def weights_gathered_without_gradient(x, gate, UP, DOWN):
    topk_ids, topk_weights = route(x, gate)
    ids = topk_ids.reshape(-1)
    with torch.no_grad():
        chosen = UP[ids]
    h = F.gelu(torch.bmm(chosen, x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(DOWN[ids], h.unsqueeze(-1)).squeeze(-1)
    return (rows * topk_weights.reshape(-1, 1)).view(T, K, D).sum(dim=1)


@guard(None)
def the_same_layer_twice(x, gate, UP, DOWN):
    return batched(x, *route(x, gate), UP, DOWN) + batched(x, *route(x, gate), UP, DOWN)


# -- loops over experts --------------------------------------------------------------------------------------------------------


@guard(None)
def loop_as_it_should_be(x, gate, up, down):
    return loop(x, *route(x, gate), up, down, torch.zeros_like(x))


@guard(r"rows are read where the ids have")
def more_rows_than_tokens(x, gate, up, down):
    return loop(torch.cat([x, x]), *route(x, gate), up, down, torch.zeros_like(x))


@guard("does not have one row for each token")
def more_rows_in_the_sum(x, gate, up, down):
    return loop(x, *route(x, gate), up, down, x.new_zeros(T + 3, D))


@guard("of another width than the buffer's")
def column_broadcast_into_the_sum(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        mask = (topk_ids == e).any(-1)
        out[mask] += mlp(x[mask], up[e], down[e][:1])
    return out


@guard("under another autocast or grad mode")
def rows_gathered_without_gradient(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        with torch.no_grad():
            rows = x[token]
        out.index_add_(0, token, mlp(rows, up[e], down[e]) * topk_weights[token, slot, None])
    return out


@guard("under another autocast or grad mode")
def weights_selected_without_gradient(x, gate, UP, DOWN):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        with torch.no_grad():
            up = UP[e]
        out.index_add_(0, token, mlp(x[token], up, DOWN[e]) * topk_weights[token, slot, None])
    return out


@guard("under another autocast or grad mode")
def routing_weights_taken_without_gradient(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        with torch.no_grad():
            weight = topk_weights[token, slot, None]
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * weight)
    return out


@guard("read before it is complete|is read outside")
def sum_read_before_the_end(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out, seen = torch.zeros_like(x), x.new_zeros(())
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        if e == 1:
            seen = out.sum()
    return out + seen


@guard("through another view")
def sum_read_through_an_older_view(x, gate, up, down):
    out = torch.zeros_like(x)
    flat = out.view(-1)
    loop(x, *route(x, gate), up, down, out)
    return flat * 2


@guard("through another view")
def sum_read_through_nested_views(x, gate, up, down):
    out = torch.zeros_like(x)
    part = out.view(T, 2, D // 2)[:, 0].transpose(0, 1)[1:]
    loop(x, *route(x, gate), up, down, out)
    return part * 2


@guard(None)
def sum_read_through_nested_views_made_later(x, gate, up, down):
    out = torch.zeros_like(x)
    loop(x, *route(x, gate), up, down, out)
    return out.view(T, 2, D // 2)[:, 0].transpose(0, 1)[1:] * 2


@guard("expert 1 computes `add` where expert 0 computes|overwritten before the region ends")
def input_written_between_the_experts(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out, x = torch.zeros_like(x), x * 1
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        x.add_(1)
    return out


@guard("overwritten before the region ends|is another value", grad=False)
def input_written_before_the_end(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    rows = []
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        rows.append((token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None]))
    with torch.no_grad():
        x.detach().mul_(2)
    for token, y in rows:
        out.index_add_(0, token, y)
    return out


@guard("overwritten", grad=False)
def parameter_overwritten_in_the_loop(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        up[e].mul_(0.5)
    return out


@guard("exactly once")
def the_first_expert_left_out(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(1, E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out


@guard("exactly once")
def an_expert_twice(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in (0, 1, 2, 2, 3):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out


@guard("one_hot over another number of experts than the loop visits")
def one_hot_with_more_classes(x, up, down, ids):
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, E + 2).permute(2, 1, 0)
    for e in range(E):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, mlp(x[token], up[e], down[e]))
    return out


@guard("exactly once")
def two_loops_into_one_sum(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = loop(x, topk_ids, topk_weights, up, down, torch.zeros_like(x))
    return loop(x, topk_ids, topk_weights, up, down, out)


@guard("does not start at zero")
def sum_is_an_input(x, gate, up, down, UP):
    return loop(x, *route(x, gate), up, down, UP[0, :T].contiguous() * 1)


@guard("does not start at zero", grad=False)
def sum_is_a_graph_input(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        x.index_add_(0, token, mlp(topk_weights.new_ones(T, D)[token], up[e], down[e]))
    return x * 1


@guard("at another index than the expert's own")
def stack_indexed_by_the_next_expert(x, gate, UP, DOWN):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        y = mlp(x[token], UP[(e + 1) % E], DOWN[e])
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@guard(None)
def list_indexed_by_the_next_expert(x, gate, up, down):
    return loop(x, *route(x, gate), up[1:] + up[:1], down, torch.zeros_like(x))


@guard("weights of another shape")
def experts_of_different_width(x, gate, up, down):
    up = [u[: H - 2 * e - 1] for e, u in enumerate(up)]
    down = [d[:, : H - 2 * e - 1] for e, d in enumerate(down)]
    return loop(x, *route(x, gate), up, down, torch.zeros_like(x))


@guard("draws random numbers")
def dropout_inside(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        y = F.dropout(mlp(x[token], up[e], down[e]), 0.5, True)
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@guard("over the row dim mixes the rows")
def softmax_over_rows(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        y = mlp(x[token], up[e], down[e]).softmax(0)
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@guard(None)
def softmax_over_features(x, gate, up, down):
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        y = mlp(x[token], up[e], down[e]).softmax(-1)
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@guard(None)
def tied_experts(x, gate, up, down):
    return loop(
        x, *route(x, gate), [up[0], up[1], up[0], up[1]], [down[0], down[0], down[0], down[3]], torch.zeros_like(x)
    )


@guard(None)
def one_matrix_for_all_experts(x, gate, up, down):
    return loop(x, *route(x, gate), up, [down[0]] * E, torch.zeros_like(x))


def halves(x: Tensor, gate: Tensor, up: list[Tensor], down: list[Tensor], swapped: bool) -> Tensor:
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        first, second = F.linear(x[token], up[e]).chunk(2, -1)
        h = F.silu(second) * first if swapped else F.silu(first) * second
        y = F.linear(h, down[e][:, : H // 2])
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@guard(None)
def chunk_halves(x, gate, up, down):
    return halves(x, gate, up, down, False)


@guard(None)
def chunk_halves_swapped(x, gate, up, down):
    return halves(x, gate, up, down, True)


@pytest.mark.parametrize("of", GUARDS, ids=lambda of: of.name)
def test_guard(of: Guard, poison: None) -> None:
    sites = check(of)
    assert sites, "nothing was seen"
    if of.reason is None:
        assert {s.status for s in sites} == {"rewritten"}, sites
        return
    assert "rewritten" not in {s.status for s in sites}
    assert [s for s in sites if re.search(of.reason, s.reason or "")], [s.reason for s in sites]
