"""Programs that moec gets wrong, or got wrong once: what it computes differs from eager without a word.

Each is a function of `x` and of parameters that it names: `gate`, lists `up` and `down` of E parameters, stacks `UP` and `DOWN`.
The comment below the name says what goes wrong. `verify="off"` marks those that only verification notices: a region with more
than `passes.verify.LARGEST` elements is not verified, and real models are larger than that. `rows` is the number of tokens.

T, K, E, D, H: tokens, top-k, experts, model width, expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

T, K, E, D, H = 9, 2, 4, 8, 16


@dataclass(frozen=True)
class Attack:
    name: str
    call: Callable[..., object]
    verify: str = "sample"
    dtype: torch.dtype = torch.float64
    rows: int = T
    same: bool = False  # every token is the same one: most experts are empty
    rtol: float = 1e-9


ATTACKS: list[Attack] = []


def attack(**changes: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(call: Callable[..., object]) -> Callable[..., object]:
        ATTACKS.append(Attack(call.__name__, call, **changes))
        return call

    return register


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


def batched(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, UP: Tensor, DOWN: Tensor) -> Tensor:
    ids = topk_ids.reshape(-1)
    h = F.gelu(torch.bmm(UP[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(DOWN[ids], h.unsqueeze(-1)).squeeze(-1)
    return (rows * topk_weights.reshape(-1, 1)).view(-1, K, D).sum(dim=1)


# -- A. the graph of a refused site is cut to pieces -----------------------------------------------------------------------------


@attack()
def sum_written_through_data(x, gate, up, down):
    # refused, and yet the whole loop is deleted: `.data` is not known to be a view, so nothing seems to read the sum
    out = torch.zeros_like(x)
    loop(x, *route(x, gate), up, down, out.data)
    return out + x


@attack()
def sum_written_through_an_unknown_view(x, gate, up, down):
    # refused, and yet the whole loop is deleted: moveaxis (broadcast_to, adjoint, mH, +x, ..) is not known as a view
    out = x.new_zeros(D, T)
    loop(x, *route(x, gate), up, down, out.moveaxis(0, 1))
    return out.t() + x


# -- B. one term for two values: equal operations under different grad modes -----------------------------------------------------


@attack()
def teacher_without_gradient_first(x, gate, UP, DOWN):
    # the student reads the router and the weights that the teacher computed under no_grad: the router's gradient is lost
    with torch.no_grad():
        teacher = batched(x, *route(x, gate), UP, DOWN)
    return batched(x, *route(x, gate), UP, DOWN) - 0.5 * teacher


@attack()
def probe_without_gradient_first(x, gate, up, down):
    # the experts read tanh(x) of the no_grad block, the first node that holds that term: the gradient of x is lost
    with torch.no_grad():
        probe = torch.tanh(x)
    return loop(torch.tanh(x), *route(x, gate), up, down, torch.zeros_like(x)) + probe.mean()


@attack()
def twin_without_gradient_last(x, gate, up, down):
    # the same the other way: eager has no gradient through `frozen`, the rewritten graph has one
    seen = torch.tanh(x)
    with torch.no_grad():
        frozen = torch.tanh(x)
    return loop(frozen, *route(x, gate), up, down, torch.zeros_like(x)) + seen


@attack()
def routing_without_gradient_first(x, gate, up, down):
    # the gradient of the routing weights is lost: those of the no_grad block are the same term and come first
    with torch.no_grad():
        seen, _ = F.linear(x, gate).softmax(-1).topk(K, -1)
    return loop(x, *route(x, gate), up, down, torch.zeros_like(x)) + seen.sum()


@attack()
def weights_without_gradient_first(x, gate, UP, DOWN):
    # the gradient of UP is lost
    with torch.no_grad():
        norm = (UP * 2).mean()
    return batched(x, *route(x, gate), UP * 2, DOWN) + norm


@attack(dtype=torch.float32, rtol=1e-4)
def autocast_first(x, gate, up, down):
    # the experts read the bfloat16 result of the autocast block, cast up, instead of the float32 one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = F.linear(x, up[0][:D]).float()
    h = F.linear(x, up[0][:D]).float()
    return loop(h, *route(x, gate), up, down, torch.zeros_like(x)) + low.mean()


# -- C. steps whose grad mode nobody looks at ------------------------------------------------------------------------------------


@attack()
def masked_weights_without_gradient(x, gate, up, down):
    # leaves._masked_weights goes around the no_grad block: the router gets a gradient that eager does not have
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = topk_ids == e
        mask = chosen.any(-1)
        with torch.no_grad():
            weight = (topk_weights * chosen).sum(-1)
        out[mask] += weight[mask, None] * mlp(x[mask], up[e], down[e])
    return out


@attack()
def transpose_without_gradient(x, gate, up, down):
    # products._matrix takes the transpose off together with its no_grad: `down` gets a gradient that eager does not have
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        with torch.no_grad():
            frozen = down[e].t()
        out.index_add_(0, token, F.linear(x[token], up[e]) @ frozen * topk_weights[token, slot, None])
    return out


# -- D. writes that normalise does not see ---------------------------------------------------------------------------------------


@attack()
def positional_inplace(x, gate, up, down):
    # `inplace` given by position, as nn.LeakyReLU, nn.ELU, nn.ReLU6, nn.Hardtanh do: the activation is dropped
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        rows = x[token]
        F.leaky_relu(rows, 0.3, True)
        out.index_add_(0, token, mlp(rows, up[e], down[e]) * topk_weights[token, slot, None])
    return out


@attack()
def foreach_write(x, gate, up, down):
    # torch._foreach_mul_ writes a list of tensors: dropped
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        rows = x[token]
        torch._foreach_mul_([rows], 2.0)
        out.index_add_(0, token, mlp(rows, up[e], down[e]) * topk_weights[token, slot, None])
    return out


@attack()
def input_written_through_data(x, gate, up, down):
    # every expert reads x as it is after the last write
    topk_ids, topk_weights = route(x, gate)
    out, x = torch.zeros_like(x), x * 1
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        x.data.add_(1)
    return out


@attack()
def input_written_through_dropout_in_eval(x, gate, up, down):
    # dropout that does nothing returns its input, so the write is one to x: every expert reads the last x
    topk_ids, topk_weights = route(x, gate)
    out, x = torch.zeros_like(x), x * 1
    same = F.dropout(x, 0.5, False)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        same.detach().add_(1)
    return out


@attack()
def running_mean_moves_in_the_loop(x, gate, up, down):
    # batch_norm writes its running mean: every expert reads the last one
    topk_ids, topk_weights = route(x, gate)
    out, mean, var = torch.zeros_like(x), x.new_zeros(D), x.new_ones(D)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        y = mlp(x[token] - mean, up[e], down[e])
        out.index_add_(0, token, y * topk_weights[token, slot, None])
        F.batch_norm(x, mean, var, training=True)
    return out


@attack(verify="off")
def clone_written(x, gate, up, down):
    # a clone counts as a view of the same value: the write to `h` is taken for one to x, and the experts read h
    h = x.clone()
    h.mul_(2)
    return loop(x, *route(x, gate), up, down, torch.zeros_like(x)) + h


@attack(verify="off")
def input_written_after_a_clone(x, gate, up, down):
    # the same the other way: the experts read x after the write, not the clone from before it
    x = x * 1
    h = x.clone()
    x.mul_(2)
    return loop(h, *route(h, gate), up, down, torch.zeros_like(x)) + x


# -- E. shapes and counts --------------------------------------------------------------------------------------------------------


def split_rows(
    x: Tensor, order: Tensor, sizes: list[int], weights: Tensor, up: list[Tensor], down: list[Tensor]
) -> Tensor:
    parts = torch.split(x[order // K], sizes)
    return torch.cat([mlp(part, u, d) for part, u, d in zip(parts, up, down)]) * weights.view(-1)[order, None]


@attack()
def sum_with_more_rows(x, gate, up, down):
    # slots.prove_index_add never looks at the buffer: the result has T rows instead of T + 3, and "not verified" lets it pass
    topk_ids, topk_weights = route(x, gate)
    ids = topk_ids.view(-1)
    order = ids.argsort(stable=True)
    rows = split_rows(x, order, torch.bincount(ids, minlength=E).tolist(), topk_weights, up, down)
    return x.new_zeros(T + 3, D).index_add(0, order // K, rows)


@attack(rows=750, dtype=torch.float32, rtol=1e-4)
def counts_in_bfloat16(x, gate, up, down):
    # counts above 256 are rounded in bfloat16; facts.histogram_of ignores the dtype, so eager's cut is not moec's
    slot = torch.arange(x.shape[0] * K)
    topk_ids = ((slot >= 257).long() + (slot >= 516) + (slot >= 1008)).view(-1, K)  # 257, 259, 492 and 492 slots
    topk_weights = x[:, :K].contiguous()
    order = topk_ids.view(-1).argsort(stable=True)
    counts = F.one_hot(topk_ids.view(-1), E).to(torch.bfloat16).sum(0)
    rows = split_rows(x, order, counts.long().tolist(), topk_weights, up, down)
    return torch.zeros_like(x).index_add(0, order // K, rows)


# -- F. only verification notices ------------------------------------------------------------------------------------------------


@attack(verify="off")
def arange_from_one(x, gate, up, down):
    # torch.arange(1, end=..) and arange(start=1, end=..) are taken for arange(E): every expert gets the tokens of the one before
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    masks = (topk_ids.unsqueeze(-1) == torch.arange(start=1, end=E + 1)).permute(2, 0, 1)
    for mask, u, d in zip(masks, up, down):
        token, slot = torch.where(mask)
        out.index_add_(0, token, mlp(x[token], u, d) * topk_weights[token, slot, None])
    return out


@attack(verify="off")
def norm_by_position(x, gate, up, down):
    # in norm(2, -1) and normalize(y, 1, 1) the order of the norm is taken for the dim: the L2 norm of a head becomes the L-1 norm
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        heads = mlp(x[token], up[e], down[e]).view(-1, 2, D // 2)
        y = (heads / (1 + heads.norm(2, -1, keepdim=True))).view(-1, D)
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@attack(verify="off")
def truncated_sum(x, gate, up, down):
    # loop.link_of takes every cast off the sum, those to integers included: nothing is truncated
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        chosen = topk_ids == e
        mask = chosen.any(-1)
        y = 9 * (topk_weights * chosen).sum(-1)[mask, None] * mlp(x[mask], up[e], down[e])
        out[mask] = (out[mask] + y).long().to(x.dtype)
    return out


@attack(verify="off")
def rows_in_another_order_than_the_mask(x, gate, up, down):
    # leaves._must_be_distinct takes a mask over tokens for the order of where(mask.T), which lists all first choices first
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    mask = F.one_hot(topk_ids, E).permute(2, 1, 0)
    for e in range(E):
        slot, token = torch.where(mask[e])
        y = mlp(x[(topk_ids == e).any(-1)], up[e], down[e])
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


@attack(verify="off")
def choices_of_two_groups(x, gate, up, down):
    # facts.ids_distinct is asked about the ids before the reshape: two groups of one token may choose the same expert
    scores = F.linear(x, gate).softmax(-1)
    topk_weights, topk_ids = torch.stack([scores, scores * 0.5], 1).topk(1, -1)
    topk_weights, topk_ids = topk_weights.view(-1, 2), topk_ids.view(-1, 2)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        out[token] += mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None]
    return out


# -- G. capture: what the loop does for an expert without tokens is never seen ---------------------------------------------------


@attack(same=True)
def empty_expert_adds_something(x, gate, up, down):
    # the else branch is not traced
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        if token.numel():
            out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        else:
            out += 1.0
    return out


@attack(same=True)
def empty_expert_ends_the_loop(x, gate, up, down):
    # neither `break` nor the `else` of the loop is traced
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        if len(token) == 0:
            break
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    else:
        out = out * 2
    return out


@attack(same=True)
def empty_expert_raises(x, gate, up, down):
    # the exception is never raised, and the handler not traced
    topk_ids, topk_weights = route(x, gate)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        try:
            if token.numel() == 0:
                raise ValueError
            out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
        except ValueError:
            out = out + 1
    return out


@attack(same=True)
def hit_experts_in_a_list(x, gate, up, down):
    # all experts are appended, hit or not
    topk_ids, topk_weights = route(x, gate)
    out, hit = torch.zeros_like(x), []
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        if token.numel() == 0:
            continue
        hit.append(e)
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out * len(hit)


class Counter:
    hits = 0


@attack(same=True)
def hit_experts_in_an_attribute(x, gate, up, down):
    # the attribute counts all experts, hit or not
    topk_ids, topk_weights = route(x, gate)
    out, count = torch.zeros_like(x), Counter()
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        if token.numel() == 0:
            continue
        count.hits += 1
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out * count.hits


@attack(same=True)
def hit_experts_in_a_buffer(x, gate, up, down):
    # a tensor remembers which experts ran: under the assumption it would remember all of them
    topk_ids, topk_weights = route(x, gate)
    out, seen = torch.zeros_like(x), x.new_zeros(E)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        if token.numel() == 0:
            continue
        seen[e] = 1
        out.index_add_(0, token, mlp(x[token], up[e], down[e]) * topk_weights[token, slot, None])
    return out * seen.sum()
