"""Which runs a sweep makes.

A *trunk* is one training run at constant learning rate, for a shape, a granularity and a seed. Its *branches* leave it at several
points and decay the learning rate to zero: each is a run in its own right, of `tokens` tokens in all, at the price of the decay
only (a trapezoidal schedule; the last `decay` share of a branch's steps). So one trunk gives several D.

    Grid(shapes=((64, 2), (96, 3)), granularities=(1, 2, 4), tokens=(1_000_000, 4_000_000), seeds=2)

makes 2 * 3 * 2 trunks and twice as many runs. A run with the same seed sees the same batches whatever its shape and G, so that
granularities are compared on the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moec.scaling import costs as cost
from moec.scaling.costs import FF_RATIO, Costs
from moec.scaling.errors import ScalingError

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Grid:
    """A sweep. `shapes` are (d_model, n_blocks); a batch has `batch` sequences of `context` bytes; `decay` is a share of steps.

    `balance_loss` and `z_loss` are the coefficients of `moec.nn.MoE` (expert choice has no balance loss). `validation`: bytes
    that the reported loss is a mean over, or all there are.
    """

    shapes: tuple[tuple[int, int], ...]
    granularities: tuple[int, ...]
    tokens: tuple[int, ...]
    seeds: int = 1
    expansion: int = 8
    batch: int = 16
    context: int = 128
    learning_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.2
    router: str = "softmax"
    balance_loss: float = 0.01
    z_loss: float = 0.001
    backend: str = "moec"
    save_every: int = 200
    validation: int = 2**17


@dataclass(frozen=True)
class Trunk:
    """One run at constant learning rate."""

    d_model: int
    n_blocks: int
    granularity: int
    seed: int

    @property
    def name(self) -> str:
        return f"d{self.d_model}-n{self.n_blocks}-g{self.granularity}-s{self.seed}"


@dataclass(frozen=True)
class Branch:
    """A run: the trunk up to step `fork`, then a decay to the step `steps`."""

    trunk: Trunk
    fork: int
    steps: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.trunk.name}-t{self.steps}"


# small: 72 runs on 24 trunks, 67e6 tokens, under half an hour on two idle cores. tiny: seconds, to see that everything works.
GRIDS = {
    "small": Grid(
        shapes=((32, 2), (48, 2), (64, 2)),
        granularities=(1, 2, 4, 8),
        tokens=(400_000, 1_000_000, 2_500_000),
        seeds=2,
    ),
    "tiny": Grid(
        shapes=((8, 1), (16, 1)),
        granularities=(1, 2),
        tokens=(1_280, 2_560),
        expansion=2,
        batch=4,
        context=16,
        warmup=4,
        save_every=7,
        validation=2048,
    ),
}


def tokens_per_step(grid: Grid) -> int:
    return grid.batch * grid.context


def check(grid: Grid) -> None:
    """Raises ScalingError for a grid that cannot be trained, saying what to change."""
    whole = {"seeds": grid.seeds, "expansion": grid.expansion, "batch": grid.batch, "context": grid.context}
    whole |= {"save-every": grid.save_every, "validation": grid.validation, "warmup": grid.warmup + 1}
    for name, value in whole.items():
        if value < 1:
            raise ScalingError(f"--{name} is {value}; give a whole number of at least 1")
    for name, values in {"shape": grid.shapes, "granularity": grid.granularities, "tokens": grid.tokens}.items():
        if not values or len(set(values)) < len(values):
            raise ScalingError(f"--{name} {values} is empty or repeats itself; give each value once")
    for d, n in grid.shapes:
        if d < 1 or n < 1:
            raise ScalingError(f"--shape {d}x{n}: width and blocks are whole numbers of at least 1")
        heads = max(d // 64, 1)
        if d % heads:
            raise ScalingError(f"--shape {d}x{n}: {heads} heads do not divide d_model; take a multiple of 64 above 64")
        for g in grid.granularities:
            if g < 1 or FF_RATIO * d % g:
                raise ScalingError(
                    f"--granularity {g} does not divide 4 * d_model = {FF_RATIO * d}; take a divisor of it"
                )
    if not (grid.z_loss > 0 and grid.balance_loss >= 0):
        raise ScalingError(
            f"--z-loss {grid.z_loss:g} has to be above zero, and --balance-loss {grid.balance_loss:g} not below"
        )
    if not 0 < grid.learning_rate < 1:
        raise ScalingError(
            f"--learning-rate is {grid.learning_rate:g}; give a number between 0 and 1, 3e-3 is the default"
        )
    if not 0 < grid.decay < 1:
        raise ScalingError(f"--decay is {grid.decay:g}; give the share of a run that decays, between 0 and 1")
    least = tokens_per_step(grid) * max(grid.warmup + 2, 10)
    if min(grid.tokens) < least:
        raise ScalingError(
            f"--tokens {min(grid.tokens)} is less than {least}: warm-up and a decay of steps of {tokens_per_step(grid)} tokens; "
            "train for more tokens, or lower --warmup or --batch"
        )


def trunks(grid: Grid) -> tuple[Trunk, ...]:
    """All of them, seeds last: runs of one shape follow each other and share what was compiled."""
    return tuple(Trunk(d, n, g, seed) for d, n in grid.shapes for g in grid.granularities for seed in range(grid.seeds))


def branches(grid: Grid, trunk: Trunk) -> tuple[Branch, ...]:
    """Of one trunk, shortest first. Tokens are rounded down to whole steps."""
    made = []
    for tokens in sorted(grid.tokens):
        steps = tokens // tokens_per_step(grid)
        made.append(Branch(trunk, steps - max(round(grid.decay * steps), 1), steps, steps * tokens_per_step(grid)))
    return tuple(made)


def all_branches(grid: Grid) -> Iterator[Branch]:
    """Every run of the grid, in the order of its rows."""
    for trunk in trunks(grid):
        yield from branches(grid, trunk)


def flops_per_step(grid: Grid, trunk: Trunk) -> float:
    """Those of the law; what a step weighs in the progress bar."""
    per_token = cost.flops_per_token(trunk.d_model, trunk.n_blocks, grid.expansion, trunk.granularity, Costs())
    return tokens_per_step(grid) * float(per_token)


def steps_of(grid: Grid, trunk: Trunk) -> int:
    """Steps trained for a trunk and all its branches."""
    made = branches(grid, trunk)
    return made[-1].fork + sum(b.steps - b.fork for b in made)
