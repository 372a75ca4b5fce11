"""One model of a sweep: how it is built, trained and judged.

`moec.models.fine_grained` around `moec.nn.MoE`, with a LayerNorm on the output of every MoE layer, for G = 1 as well: the paper
calls it crucial for G > 1, and granularities should differ in nothing else. AdamW (weight decay 0.1, betas 0.9 and 0.95),
gradients clipped to norm 1, learning rate constant after a linear warm-up, then linear to zero. The loss reported is on
validation text, in nats per byte, without balancing terms.

Everything that happens in a step follows from (state, seed, step): no other random number is drawn after the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.models.fine_grained import FineGrainedDecoder
from moec.nn import ROUTERS, ExpertChoice, MoE, aux_loss, update_biases
from moec.scaling.errors import ScalingError
from moec.scaling.sweep.grid import VOCABULARY, Branch, Grid, Trunk
from moec.scaling.sweep.text import Text, batch, windows

BACKENDS = ("moec", "inductor", "eager")

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """What a checkpoint holds: `step` steps were done, in `seconds`; `state_dict`s of model and optimizer."""

    step: int
    seconds: float
    model: dict[str, Tensor]
    optimizer: dict[str, object]


@dataclass(frozen=True, eq=False)
class Trainer:
    """A model with what it needs to train. Its parameters change; which objects it holds does not."""

    grid: Grid
    model: nn.Module
    optimizer: torch.optim.AdamW
    loss: Loss  # (inputs, targets) -> scalar with balancing terms, compiled
    device: str


def trainer(grid: Grid, trunk: Trunk, device: str) -> Trainer:
    """For all trunks of this shape and G, whatever their seed. Raises ScalingError for names that do not exist."""
    if grid.backend not in BACKENDS:
        raise ScalingError(f"--backend {grid.backend!r} is not known; take one of {', '.join(BACKENDS)}")
    torch._dynamo.reset()
    model = build(grid, trunk).to(device)
    optimizer = adamw(grid, model)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) + aux_loss(model)

    compiled: Loss = loss if grid.backend == "eager" else torch.compile(loss, backend=grid.backend)
    made = Trainer(grid, model, optimizer, compiled, device)
    nothing = torch.zeros(grid.batch, grid.context, dtype=torch.int64)
    train_step(
        made, nothing, nothing, 0.0
    )  # compiles, so that no step that is timed does; what it changes is loaded over
    return made


def build(grid: Grid, trunk: Trunk) -> nn.Module:
    """A model of the trunk's shape, with parameters drawn from its seed."""
    if grid.router not in ROUTERS:
        raise ScalingError(f"--router {grid.router!r} is not known; take one of {', '.join(ROUTERS)}")
    balanced = isinstance(ROUTERS[grid.router], ExpertChoice)

    def make_moe(d_model: int, d_ff: int) -> nn.Module:
        return MoE(
            d_model,
            d_ff,
            grid.expansion,
            trunk.granularity,
            router=grid.router,
            output_norm=True,
            balance_loss=0.0 if balanced else grid.balance_loss,
            z_loss=grid.z_loss,
        )

    torch.manual_seed(1 + trunk.seed)
    return FineGrainedDecoder(VOCABULARY, trunk.d_model, trunk.n_blocks, make_moe, max_length=grid.context)


def adamw(grid: Grid, model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=grid.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def start(grid: Grid, trunk: Trunk) -> State:
    """A trunk before its first step: parameters drawn from the seed, nothing trained."""
    model = build(grid, trunk)
    return State(0, 0.0, model.state_dict(), adamw(grid, model).state_dict())


def load(made: Trainer, state: State) -> None:
    """Makes the trainer stand where `state` stood, bit by bit."""
    made.model.load_state_dict(state.model)
    made.optimizer.load_state_dict(state.optimizer)


def saved(made: Trainer, step: int, seconds: float) -> State:
    """Where the trainer stands. The tensors are its own: write them before it goes on."""
    return State(step, seconds, made.model.state_dict(), made.optimizer.state_dict())


def learning_rate(grid: Grid, step: int, branch: Branch | None) -> float:
    """Of the step with this number, from 0: warm-up, constant, and in a branch a line to zero from its fork on."""
    if branch is not None and step >= branch.fork:
        return grid.learning_rate * (branch.steps - step) / (branch.steps - branch.fork + 1)
    return grid.learning_rate * min((step + 1) / grid.warmup, 1.0) if grid.warmup else grid.learning_rate


def train_step(made: Trainer, inputs: Tensor, targets: Tensor, rate: float) -> None:
    """One step of AdamW at this learning rate."""
    for group in made.optimizer.param_groups:
        group["lr"] = rate
    made.optimizer.zero_grad(set_to_none=True)
    made.loss(inputs.to(made.device), targets.to(made.device)).backward()
    nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
    made.optimizer.step()
    if getattr(ROUTERS[made.grid.router], "bias", False):
        update_biases(made.model)


@torch.no_grad()
def validation_loss(made: Trainer, text: Text) -> float:
    """Mean cross-entropy over validation text, nats per byte, in eager: the same sequences for every run."""
    grid = made.grid
    whole = min(windows(text.valid, grid.context), max(grid.validation // grid.context, 1))
    made.model.eval()
    total, count = 0.0, 0
    for first in range(0, whole, grid.batch):
        inputs, targets = batch(text.valid, grid.context, torch.arange(first, min(first + grid.batch, whole)))
        logits = made.model(inputs.to(made.device)).flatten(0, 1)
        total += float(F.cross_entropy(logits, targets.flatten().to(made.device), reduction="sum"))
        count += targets.numel()
    made.model.train()
    return total / count
