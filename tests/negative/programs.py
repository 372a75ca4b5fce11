"""Near-misses: small MoE layers that look like an idiom of moec.models and lack exactly one fact.

Each runs in eager with finite values and gradients, and each computes something else than the idiom it resembles, so a pass
that takes it for the idiom changes the user's results. A near-miss is written in full, since what matters is how little
differs: the line that does ends in `# <-`.

    for miss in NEAR_MISSES:
        module, inputs = miss.build()
        module(*inputs)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.models.experts import BODIES, StackedExperts
from moec.models.routers import SoftmaxTopK

T, D, WIDTH, E, K = 13, 16, 24, 4, 2


@dataclass(frozen=True)
class NearMiss:
    """`missing` is the fact that does not hold, in words; `build` gives the layer and its inputs, always the same ones."""

    name: str
    idiom: str
    missing: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    # Still a routed sum, though of other slots, index maps or body classes than the idiom's: refuse it, or get it right.
    other_sum: bool = False


class Layer(nn.Module):
    """Router and experts as modules; a near-miss says how tokens get to them. Maps x [T, D] to [T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = SoftmaxTopK(D, E, K)
        self.experts = nn.ModuleList(self.expert() for _ in range(E))

    def expert(self) -> nn.Module:
        return BODIES["swiglu"](D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        topk_ids, topk_weights = self.router(x)
        return self.routed(x, topk_ids, topk_weights)

    def routed(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        raise NotImplementedError


class StackedLayer(Layer):
    """The same with all experts in one parameter."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.router = SoftmaxTopK(D, E, K)
        self.experts = StackedExperts("swiglu", D, WIDTH, E)

    def run_expert(self, e: Tensor, x: Tensor) -> Tensor:
        h = self.experts.activate(F.linear(x, self.experts.up_proj[e]))
        return F.linear(h, self.experts.down_proj[e])


_found: list[NearMiss] = []


def near_miss(
    idiom: str, missing: str, tokens: int = T, seed: int = 0, other_sum: bool = False
) -> Callable[[type[Layer]], type[Layer]]:
    """Lists the class below it; its name becomes the name of the near-miss. Few tokens leave some experts without any."""

    def register(layer: type[Layer]) -> type[Layer]:
        def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return layer(), (torch.randn(tokens, D, requires_grad=True),)

        _found.append(NearMiss(layer.__name__, idiom, missing, build, other_sum))
        return layer

    return register


# static_where


@near_miss("static_where", "rows are added: a plain assignment keeps only the last expert of each token")
class WhereLastWriterWins(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            out[token] = self.experts[e](x[token]) * topk_weights[token, slot, None]  # <-
        return out


@near_miss("static_where", "one body for all experts: the activation of expert 2 is another function", other_sum=True)
class WhereOneActivationDiffers(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            expert, rows = self.experts[e], x[token]
            gate = expert.gate_proj(rows)
            gate = F.relu(gate) if e == 2 else F.silu(gate)  # <-
            rows = expert.down_proj(gate * expert.up_proj(rows))
            out.index_add_(0, token, rows * topk_weights[token, slot, None])
        return out


@near_miss(
    "static_where", "every expert handles the slots of its own id exactly once: ids 0, 1, 2, 2 are read and 3 is not"
)
class WhereOneExpertTwiceOneNever(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == min(e, 2))  # <-
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("static_where", "rows are independent: the body subtracts the mean over the tokens of its expert")
class WhereBatchStatistics(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            rows = x[token]
            rows = rows - rows.mean(dim=0)  # <-
            out.index_add_(0, token, self.experts[e](rows) * topk_weights[token, slot, None])
        return out


@near_miss(
    "static_where", "the body is a function of its rows: dropout draws random numbers in the order of the experts"
)
class WhereDropoutInside(Layer):
    def expert(self):
        return nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, D))  # <-

    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("static_where", "only the sum leaves the region: the norm of each expert's rows is part of the result too")
class WhereIntermediateEscapes(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out, penalty = torch.zeros_like(x), x.new_zeros(())
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            rows = self.experts[e](x[token])
            penalty = penalty + rows.square().sum()  # <-
            out.index_add_(0, token, rows * topk_weights[token, slot, None])
        return out + penalty * 1e-3


@near_miss("static_where", "experts read the same x: each one reads what the experts before it have written")
class WhereReadsWhatItWrites(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = x.clone()
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            rows = self.experts[e](out[token])  # <-
            out = out.index_add(0, token, rows * topk_weights[token, slot, None])
        return out


@near_miss("static_where", "a row and its weight belong to the same slot: the weights are those of the row above")
class WhereWeightsOfTheRowAbove(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(topk_ids == e)
            weight = topk_weights[token.roll(1), slot.roll(1), None]  # <-
            out.index_add_(0, token, self.experts[e](x[token]) * weight)
        return out


# static_mask


@near_miss("static_mask", "rows are added: `out[mask] =` forgets the experts before")
class MaskLastWriterWins(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = topk_ids == e
            mask = chosen.any(dim=-1)
            weight = (topk_weights * chosen).sum(dim=-1)
            out[mask] = weight[mask, None] * expert(x[mask])  # <-
        return out


@near_miss(
    "static_mask", "the mask selects the tokens that chose expert e: it selects those that chose e or one before it"
)
class MaskComparesOrder(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = topk_ids <= e  # <-
            mask = chosen.any(dim=-1)
            weight = (topk_weights * chosen).sum(dim=-1)
            out[mask] += weight[mask, None] * expert(x[mask])
        return out


@near_miss(
    "static_mask", "experts that were not chosen have weight zero: here they have a small one, and every token is run"
)
class MaskNonSelectedWeighted(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = topk_ids == e
            weight = (topk_weights * chosen).sum(dim=-1)
            weight = torch.where(chosen.any(dim=-1), weight, torch.full_like(weight, 1e-2))  # <-
            out += weight[:, None] * expert(x)
        return out


@near_miss("static_mask", "rows are independent: a running sum over the rows of the expert mixes tokens")
class MaskCumsumOverRows(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = topk_ids == e
            mask = chosen.any(dim=-1)
            weight = (topk_weights * chosen).sum(dim=-1)
            out[mask] += weight[mask, None] * expert(x[mask]).cumsum(dim=0)  # <-
        return out


@near_miss(
    "static_mask", "values go back to the rows they came from: the mask is rolled by one token when the result is added"
)
class MaskRolledOnTheWayBack(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = topk_ids == e
            mask = chosen.any(dim=-1)
            weight = (topk_weights * chosen).sum(dim=-1)
            out[mask.roll(1)] += weight[mask, None] * expert(x[mask])  # <-
        return out


# one_hot


@near_miss("one_hot", "a slot goes to one expert: those of expert 0 go to every expert")
class OneHotSharedSlots(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e] + mask[0])  # <-
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss(
    "one_hot", "token and slot come out of the mask in the order it has: tokens come before slots", other_sum=True
)
class OneHotAxesSwapped(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 0, 1)  # <-
        for e in range(E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[slot, token, None])
        return out


@near_miss("one_hot", "rows come back in the order they left: the result is added to the tokens in reverse")
class OneHotAddedInReverse(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            rows = self.experts[e](x[token]) * topk_weights[token, slot, None]
            out.index_add_(0, token.flip(0), rows)  # <-
        return out


@near_miss("one_hot", "experts read the same x: each one leaves the rows it has read decayed, for those after it")
class OneHotDecaysItsInput(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out, seen = torch.zeros_like(x), x * 1.0
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            rows = seen[token]
            out.index_add_(0, token, self.experts[e](rows) * topk_weights[token, slot, None])
            seen[token] = rows * 0.9  # <-
        return out


@near_miss(
    "one_hot", "the weights used are those of the router: they are rescaled by the expert's load", other_sum=True
)
class OneHotScaledByLoad(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            rows = self.experts[e](x[token]) * topk_weights[token, slot, None]
            out.index_add_(0, token, rows / (1 + token.shape[0]))  # <-
        return out


# zip_masks


@near_miss("zip_masks", "a token names an expert once: a hash may name one twice, and `+=` drops the second naming")
class ZipDuplicateIds(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        hashed = torch.stack([topk_ids[:, 0], topk_ids[:, 1] // 2 * 2 % E], dim=-1)  # <- may repeat
        masks = (hashed.unsqueeze(-1) == torch.arange(E)).permute(2, 0, 1)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out[token] += topk_weights[token, slot, None] * expert(x[token])
        return out


@near_miss(
    "zip_masks", "every mask compares with a number of its own: each number serves two experts, and half of them none"
)
class ZipNumbersRepeat(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        masks = (topk_ids.unsqueeze(-1) == torch.arange(E) // 2).permute(2, 0, 1)  # <-
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out[token] += topk_weights[token, slot, None] * expert(x[token])
        return out


@near_miss("zip_masks", "a mask says `id == e`: this one says `id <= e`, so a slot is served by several experts")
class ZipComparesOrder(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        masks = (topk_ids.unsqueeze(-1) <= torch.arange(E)).permute(2, 0, 1)  # <-
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out.index_add_(0, token, topk_weights[token, slot, None] * expert(x[token]))
        return out


@near_miss("zip_masks", "only the sum leaves the region: the tokens of the last expert are used once more afterwards")
class ZipTokensEscape(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        masks = (topk_ids.unsqueeze(-1) == torch.arange(E)).permute(2, 0, 1)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            rows = topk_weights[token, slot, None] * expert(x[token])
            out[token] += rows
        out[token] -= 0.5 * rows  # <-
        return out


# skip_empty; a trace that assumes "not empty" sees nothing of what happens when an expert is empty


@near_miss(
    "skip_empty", "an expert without tokens leaves no trace: here a vector of its own goes to every token", tokens=2
)
class SkipDoesSomethingElse(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                out = out + self.experts[e].down_proj.weight.sum(dim=1)  # <-
                continue
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("skip_empty", "the loop goes on after an empty expert: it ends there", tokens=2, seed=3)
class SkipBreaks(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                break  # <-
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("skip_empty", "the branch skips empty experts only: it also skips those with a single token", tokens=3)
class SkipsSingleTokens(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] <= 1:  # <-
                continue
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("skip_empty", "the count that decides is the expert's own: it is that of the next expert", tokens=2)
class SkipsByNeighborsCount(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        counts = mask.sum(dim=(1, 2))
        for e in range(E):
            if counts[(e + 1) % E] == 0:  # <-
                continue
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("skip_empty", "the number of experts that ran does not matter: the result is divided by it", tokens=2)
class SkipCountsTheHit(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out, ran = torch.zeros_like(x), 0
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            ran += 1
            out.index_add_(0, token, self.experts[e](x[token]) * topk_weights[token, slot, None])
        return out / ran  # <-


# hit_stacked; a trace over all experts, hit or not, has fixed positions and a fixed number of them


@near_miss(
    "hit_stacked", "the experts hit come from the same ids as the mask: they come from the first choice", tokens=3
)
class HitFromOtherTensor(StackedLayer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        first = F.one_hot(topk_ids[:, :1], num_classes=E).permute(2, 1, 0)
        hit = torch.greater(first.sum(dim=(-1, -2)), 0).nonzero()  # <-
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.run_expert(e, x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("hit_stacked", "experts with any token are run: only those with more than two are", tokens=5)
class HitNeedsThreeTokens(StackedLayer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 2).nonzero()  # <-
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.run_expert(e, x[token]) * topk_weights[token, slot, None])
        return out


@near_miss("hit_stacked", "rows are independent: a softmax over the rows of the expert mixes tokens")
class HitSoftmaxOverRows(StackedLayer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            rows = self.run_expert(e, x[token]).softmax(dim=0)  # <-
            out.index_add_(0, token, rows * topk_weights[token, slot, None])
        return out


@near_miss("hit_stacked", "an expert's place among those hit does not matter: its rows are divided by it", tokens=2)
class HitPositionMatters(StackedLayer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for position, e in enumerate(hit):
            e = e[0]
            slot, token = torch.where(mask[e])
            rows = self.run_expert(e, x[token]) * topk_weights[token, slot, None]
            out.index_add_(0, token, rows / (position + 1))  # <-
        return out


@near_miss("hit_stacked", "the number of experts hit does not matter: the result is divided by it", tokens=2)
class HitDividesByNumberHit(StackedLayer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.run_expert(e, x[token]) * topk_weights[token, slot, None])
        return out / len(hit)  # <-


# hit_modules


@near_miss("hit_modules", "rows are added: `index_copy_` keeps the last expert of each token")
class HitModulesCopy(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[None, token].reshape(-1, D)) * topk_weights[token, slot, None]
            out.index_copy_(0, token, rows)  # <-
        return out


@near_miss("hit_modules", "one body for all experts: expert 0 is a two-matrix GELU among SwiGLUs", other_sum=True)
class HitModulesMixedBodies(Layer):
    def __init__(self):
        super().__init__()
        self.experts[0] = BODIES["gelu"](D, WIDTH)  # <-

    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[None, token].reshape(-1, D)) * topk_weights[token, slot, None]
            out.index_add_(0, token, rows)
        return out


@near_miss("hit_modules", "experts read the same x: each one also reads what those before it have added")
class HitModulesReadsTheSum(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[token] + out[token]) * topk_weights[token, slot, None]  # <-
            out = out.index_add(0, token, rows)
        return out


@near_miss(
    "hit_modules", "only the sum leaves the region: the mean output of each expert that was hit is returned as well"
)
class HitModulesMeansEscape(Layer):
    def routed(self, x, topk_ids, topk_weights):
        out, means = torch.zeros_like(x), []
        mask = F.one_hot(topk_ids, num_classes=E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[None, token].reshape(-1, D)) * topk_weights[token, slot, None]
            means.append(rows.mean())  # <-
            out.index_add_(0, token, rows)
        return out * torch.stack(means).sum()


# sort_tolist


@near_miss("sort_tolist", "rows go back by the inverse of the sort: they are gathered by the sort itself")
class SortWrongInverse(Layer):
    def routed(self, x, topk_ids, topk_weights):
        counts = topk_ids.new_zeros((T, E)).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_ids.view(-1).argsort()
        sorted_x, outputs, start = x[order // K], [], 0
        for e, n in enumerate(counts.tolist()):
            outputs.append(self.experts[e](sorted_x[start : start + n]))
            start += n
        new_x = torch.cat(outputs)[order]  # <- new_x[order] = ...
        return (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(dim=1)


@near_miss("sort_tolist", "the sizes are the histogram of the sorted ids: they are that of the ids shifted by one")
class SortSizesOfShiftedIds(Layer):
    def routed(self, x, topk_ids, topk_weights):
        counts = topk_ids.new_zeros((T, E)).scatter_(1, (topk_ids + 1) % E, 1).sum(dim=0)  # <-
        order = topk_ids.view(-1).argsort()
        sorted_x, outputs, start = x[order // K], [], 0
        for e, n in enumerate(counts.tolist()):
            outputs.append(self.experts[e](sorted_x[start : start + n]))
            start += n
        outs = torch.cat(outputs)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(dim=1)


@near_miss("sort_tolist", "the order sorts the same ids: it sorts the weights")
class SortsTheWeights(Layer):
    def routed(self, x, topk_ids, topk_weights):
        counts = topk_ids.new_zeros((T, E)).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_weights.view(-1).argsort()  # <-
        sorted_x, outputs, start = x[order // K], [], 0
        for e, n in enumerate(counts.tolist()):
            outputs.append(self.experts[e](sorted_x[start : start + n]))
            start += n
        outs = torch.cat(outputs)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(dim=1)


@near_miss("sort_tolist", "slices touch and do not overlap: each begins one row early where it can")
class SortOverlappingSlices(Layer):
    def routed(self, x, topk_ids, topk_weights):
        counts = topk_ids.new_zeros((T, E)).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_ids.view(-1).argsort()
        sorted_x, outputs, start = x[order // K], [], 0
        for e, n in enumerate(counts.tolist()):
            early = max(start - 1, 0)  # <-
            outputs.append(self.experts[e](sorted_x[early : early + n]))
            start += n
        outs = torch.cat(outputs)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(dim=1)


@near_miss(
    "sort_tolist", "slot s belongs to token s // K: the slots of a transposed table are divided as if it were not"
)
class SortSlotMajorReadAsTokenMajor(Layer):
    def routed(self, x, topk_ids, topk_weights):
        counts = topk_ids.new_zeros((T, E)).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_ids.t().reshape(-1).argsort()  # <-
        sorted_x, outputs, start = x[order // K], [], 0
        for e, n in enumerate(counts.tolist()):
            outputs.append(self.experts[e](sorted_x[start : start + n]))
            start += n
        outs = torch.cat(outputs)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(T, K, D) * topk_weights.unsqueeze(-1)).sum(dim=1)


# bincount_split


@near_miss("bincount_split", "parts meet the expert whose ids they hold: the sizes are rolled by one expert")
class SplitRolledSizes(Layer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.flatten()
        sizes = torch.bincount(ids, minlength=E).roll(1).tolist()  # <-
        order = ids.argsort(stable=True)
        token = order // K
        rows = torch.cat([f(part) for f, part in zip(self.experts, torch.split(x[token], sizes))])
        rows = rows * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, rows)


@near_miss("bincount_split", "weights follow their slots: they are gathered by another permutation than the rows")
class SplitWeightsOfOtherPermutation(Layer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.flatten()
        sizes = torch.bincount(ids, minlength=E).tolist()
        order = ids.argsort(stable=True)
        token = order // K
        rows = torch.cat([f(part) for f, part in zip(self.experts, torch.split(x[token], sizes))])
        rows = rows * topk_weights.flatten()[order.argsort()].unsqueeze(-1)  # <-
        return torch.zeros_like(x).index_add(0, token, rows)


@near_miss("bincount_split", "the order is ascending, like the sizes: it is descending")
class SplitDescendingOrder(Layer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.flatten()
        sizes = torch.bincount(ids, minlength=E).tolist()
        order = ids.argsort(stable=True, descending=True)  # <-
        token = order // K
        rows = torch.cat([f(part) for f, part in zip(self.experts, torch.split(x[token], sizes))])
        rows = rows * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, rows)


@near_miss("bincount_split", "rows are added to the tokens they were read from: they go to slot % T", other_sum=True)
class SplitAddedByWrongDivision(Layer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.flatten()
        sizes = torch.bincount(ids, minlength=E).tolist()
        order = ids.argsort(stable=True)
        rows = torch.cat([f(part) for f, part in zip(self.experts, torch.split(x[order // K], sizes))])
        rows = rows * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order % T, rows)  # <-


# grouped_mm; in bfloat16 these call the library's op, here a loop over slices stands in for it


class GroupedLayer(StackedLayer):
    def grouped_mm(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return F.grouped_mm(x, weight, offs=offsets)
        outputs, start = [], 0
        for e, end in enumerate(offsets.tolist()):
            outputs.append(x[start:end] @ weight[e])
            start = end
        outputs.append(x.new_zeros(x.shape[0] - start, weight.shape[-1]))
        return torch.cat(outputs)

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        h = self.experts.activate(self.grouped_mm(rows, self.experts.up_proj.transpose(1, 2), offsets))
        return self.grouped_mm(h, self.experts.down_proj.transpose(1, 2), offsets)


@near_miss("grouped_mm", "offsets end where the expert's rows end: they are rolled by one expert")
class GroupedRolledOffsets(GroupedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids, order = torch.sort(topk_ids.reshape(-1))
        counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
        offsets = counts.roll(1).cumsum(0, dtype=torch.int32)  # <-
        rows = self.body(x[order // K], offsets) * topk_weights.reshape(-1)[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return rows[inverse].view(T, K, D).sum(dim=1)


@near_miss("grouped_mm", "rows go back by the inverse of the sort: they are gathered by the sort itself")
class GroupedWrongInverse(GroupedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids, order = torch.sort(topk_ids.reshape(-1))
        counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = self.body(x[order // K], offsets) * topk_weights.reshape(-1)[order, None]
        return rows[order].view(T, K, D).sum(dim=1)  # <-


@near_miss(
    "grouped_mm", "the histogram has one bin for each expert: its range is one too long, so that bins and ids disagree"
)
class GroupedHistogramRange(GroupedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids, order = torch.sort(topk_ids.reshape(-1))
        counts = torch.histc(ids.float(), bins=E, min=0, max=2 * E)  # <-
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = self.body(x[order // K], offsets) * topk_weights.reshape(-1)[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return rows[inverse].view(T, K, D).sum(dim=1)


@near_miss("grouped_mm", "both projections use the same offsets: the second uses those of other ids")
class GroupedTwoOffsets(GroupedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids, order = torch.sort(topk_ids.reshape(-1))
        offsets = torch.histc(ids.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
        others = torch.histc((E - 1 - ids).float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
        h = self.experts.activate(self.grouped_mm(x[order // K], self.experts.up_proj.transpose(1, 2), offsets))
        rows = self.grouped_mm(h, self.experts.down_proj.transpose(1, 2), others)  # <-
        rows = rows * topk_weights.reshape(-1)[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return rows[inverse].view(T, K, D).sum(dim=1)


# batched_mm


class BatchedLayer(StackedLayer):
    def body(self, rows: Tensor, up_ids: Tensor, down_ids: Tensor) -> Tensor:
        h = self.experts.activate(torch.bmm(self.experts.up_proj[up_ids], rows.unsqueeze(-1)).squeeze(-1))
        return torch.bmm(self.experts.down_proj[down_ids], h.unsqueeze(-1)).squeeze(-1)


@near_miss(
    "batched_mm", "both projections belong to the slot's expert: the second reads the ids of the slots in reverse"
)
class BatchedTwoIds(BatchedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.reshape(-1)
        rows = self.body(x.repeat_interleave(K, dim=0), ids, ids.flip(0))  # <-
        return (rows * topk_weights.reshape(-1, 1)).view(T, K, D).sum(dim=1)


@near_miss("batched_mm", "row s is token s // K: `repeat` makes it token s % T", other_sum=True)
class BatchedRepeatInsteadOfInterleave(BatchedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.reshape(-1)
        rows = self.body(x.repeat(K, 1), ids, ids)  # <-
        return (rows * topk_weights.reshape(-1, 1)).view(T, K, D).sum(dim=1)


@near_miss("batched_mm", "the K slots of a token are summed: the slots are cut the other way", other_sum=True)
class BatchedSumOverWrongAxis(BatchedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.reshape(-1)
        rows = self.body(x.repeat_interleave(K, dim=0), ids, ids)
        return (rows * topk_weights.reshape(-1, 1)).view(K, T, D).sum(dim=0)  # <-


@near_miss("batched_mm", "rows are independent: they are normalized over the slots")
class BatchedSoftmaxOverSlots(BatchedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.reshape(-1)
        rows = self.body(x.repeat_interleave(K, dim=0), ids, ids).softmax(dim=0)  # <-
        return (rows * topk_weights.reshape(-1, 1)).view(T, K, D).sum(dim=1)


@near_miss("batched_mm", "only the sum leaves the region: the weights gathered for each slot are penalized")
class BatchedWeightsEscape(BatchedLayer):
    def routed(self, x, topk_ids, topk_weights):
        ids = topk_ids.reshape(-1)
        up, down = self.experts.up_proj[ids], self.experts.down_proj[ids]
        h = self.experts.activate(torch.bmm(up, x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
        rows = torch.bmm(down, h.unsqueeze(-1)).squeeze(-1)
        penalty = up.square().sum() * 1e-3  # <-
        return (rows * topk_weights.reshape(-1, 1)).view(T, K, D).sum(dim=1) + penalty


# dense_loop


class DenseLoopLayer(Layer):
    def weights(self, x, topk_ids, topk_weights):
        return topk_weights.new_zeros(x.shape[0], E).scatter(1, topk_ids, topk_weights)

    def routed(self, x, topk_ids, topk_weights):
        out, weights = torch.zeros_like(x), self.weights(x, topk_ids, topk_weights)
        for e in range(E):
            out = out + self.experts[e](x) * weights[:, e, None]
        return out


@near_miss("dense_loop", "weights are zero for experts not chosen: a tenth of the softmax over all is added (soft MoE)")
class DenseLoopSoft(DenseLoopLayer):
    def weights(self, x, topk_ids, topk_weights):
        soft = F.linear(x, self.router.weight).softmax(-1)
        return super().weights(x, topk_ids, topk_weights) + 0.1 * soft  # <-


@near_miss(
    "dense_loop", "weights are zero for experts not chosen: the buffer they are scattered to starts at a hundredth"
)
class DenseLoopStartsHigh(DenseLoopLayer):
    def weights(self, x, topk_ids, topk_weights):
        return topk_weights.new_full((x.shape[0], E), 0.01).scatter(1, topk_ids, topk_weights)  # <-


@near_miss(
    "dense_loop", "each expert is weighed with its own weight: expert e gets that of expert e - 1", other_sum=True
)
class DenseLoopNeighborsWeight(DenseLoopLayer):
    def routed(self, x, topk_ids, topk_weights):
        out, weights = torch.zeros_like(x), self.weights(x, topk_ids, topk_weights)
        for e in range(E):
            out = out + self.experts[(e + 1) % E](x) * weights[:, e, None]  # <-
        return out


@near_miss("dense_loop", "what an expert adds is zero where it was not chosen: the weight goes to a sigmoid first")
class DenseLoopSigmoidOfZero(DenseLoopLayer):
    def weights(self, x, topk_ids, topk_weights):
        return super().weights(x, topk_ids, topk_weights).sigmoid()  # <-


@near_miss("dense_loop", "f(0) = 0 for weights on the input side: these experts have biases")
class DenseLoopInputSideBias(DenseLoopLayer):
    def expert(self):
        return BODIES["gelu"](D, WIDTH)

    def routed(self, x, topk_ids, topk_weights):
        out, weights = torch.zeros_like(x), self.weights(x, topk_ids, topk_weights)
        for e in range(E):
            out = out + self.experts[e](x * weights[:, e, None])  # <-
        return out


@near_miss("dense_loop", "each expert sees the same tokens: expert e sees what expert e - 1 left")
class DenseLoopSequential(DenseLoopLayer):
    def routed(self, x, topk_ids, topk_weights):
        out, weights = x * 0, self.weights(x, topk_ids, topk_weights)
        for e in range(E):
            out = out + self.experts[e](x + out) * weights[:, e, None]  # <-
        return out


@near_miss("dense_loop", "every expert is in the sum: the last is left out")
class DenseLoopLeavesOneOut(DenseLoopLayer):
    def routed(self, x, topk_ids, topk_weights):
        out, weights = torch.zeros_like(x), self.weights(x, topk_ids, topk_weights)
        for e in range(E - 1):  # <-
            out = out + self.experts[e](x) * weights[:, e, None]
        return out


# dense_stacked


class DenseStackedLayer(StackedLayer):
    """Maps y [T, E, D] and weights [T, E] to [T, D]."""

    def routed(self, x, topk_ids, topk_weights):
        weights = topk_weights.new_zeros(x.shape[0], E).scatter(1, topk_ids, topk_weights)
        h = self.experts.activate(torch.einsum("td,efd->tef", x, self.experts.up_proj))
        y = torch.einsum("tef,edf->ted", h, self.experts.down_proj)
        return self.combined(y, weights, topk_ids)

    def combined(self, y, weights, topk_ids):
        raise NotImplementedError


@near_miss("dense_stacked", "every expert is weighed with its own weight: they are in reverse")
class DenseStackedReversed(DenseStackedLayer):
    def combined(self, y, weights, topk_ids):
        return torch.einsum("ted,te->td", y, weights.flip(1))  # <-


@near_miss("dense_stacked", "all but the chosen pairs are zero: the mask is that of the experts not chosen")
class DenseStackedComplement(DenseStackedLayer):
    def combined(self, y, weights, topk_ids):
        chosen = F.one_hot(topk_ids, E).sum(1).bool()
        return y.masked_fill(chosen[..., None], 0.0).mean(1)  # <-


@near_miss("dense_stacked", "the sum is over experts: this one is over tokens")
class DenseStackedSumsTokens(DenseStackedLayer):
    def combined(self, y, weights, topk_ids):
        return torch.einsum("ted,te->ed", y, weights)[topk_ids[:, 0]]  # <-


@near_miss("dense_stacked", "an expert's rows are independent: each is divided by the largest of its expert")
class DenseStackedNormalizesOverTokens(DenseStackedLayer):
    def combined(self, y, weights, topk_ids):
        return ((y / y.abs().amax(0)) * weights[..., None]).sum(1)  # <-


@near_miss("dense_stacked", "nothing reads what the experts computed for other tokens: their mean is added")
class DenseStackedMeanEscapes(DenseStackedLayer):
    def combined(self, y, weights, topk_ids):
        return (y * weights[..., None]).sum(1) + y.mean()  # <-


NEAR_MISSES = tuple(_found)
