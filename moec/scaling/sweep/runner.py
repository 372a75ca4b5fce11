"""Trains the runs of a grid, one trunk after the other; may be killed at any moment and started again.

    trunk   --------fork 1--------fork 2--------...        constant learning rate
                      \\__ run 1     \\__ run 2              decay, validation, one row

The trunk does not go past a fork before the run that leaves it there has its row. So at any moment its checkpoint is at or before
the fork of the first run without a row, and starting again is: load it, or begin; go on. Checkpoints are taken every
`save_every` steps and at forks. Since a step follows from the state, the seed and its number alone, a sweep that was killed ends
with the rows of one that was not, bit by bit, as long as threads, torch and machine are the same; the manifest holds all three.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from moec.scaling.errors import extra
from moec.scaling.sweep import results, train
from moec.scaling.sweep.grid import Branch, Grid, Trunk, branches, check, flops_per_step, steps_of, trunks
from moec.scaling.sweep.text import Text, batch, check_enough, order
from moec.scaling.sweep.train import Trainer

Advance = Callable[[float, str], None]  # (TFLOPs done, what is being done)


def sweep(grid: Grid, text: Text, folder: Path, *, device: str = "cpu", bars: bool = True) -> int:
    """Makes all runs that are not there yet; returns how many rows there are in the end.

    Raises ScalingError for an impossible grid, too little text, a folder that holds another sweep or is in use.
    """
    check(grid)
    longest = max(b.steps for b in branches(grid, trunks(grid)[0]))
    check_enough(text, grid.context, longest * grid.batch)
    with closing(results.lock(folder)):
        results.begin(folder, results.manifest(grid, text, torch.get_num_threads(), device))
        advance = _bar(grid) if bars else _silent
        for _, group in itertools.groupby(trunks(grid), key=lambda t: (t.d_model, t.n_blocks, t.granularity)):
            made: Trainer | None = None
            for trunk in group:
                if all(results.is_finished(folder, b) for b in branches(grid, trunk)):
                    advance(steps_of(grid, trunk) * flops_per_step(grid, trunk) / 1e12, trunk.name)
                    continue
                made = made or train.trainer(grid, trunk, device)
                _trunk(made, trunk, text, folder, advance)
                results.write_tables(folder, grid)
        return results.write_tables(folder, grid)


def _trunk(made: Trainer, trunk: Trunk, text: Text, folder: Path, advance: Advance) -> None:
    """All runs of one trunk."""
    numbers, weight = order(text, made.grid.context, trunk.seed), flops_per_step(made.grid, trunk) / 1e12
    before = results.load_state(folder, trunk.name, made.device)
    advance((before.step if before else 0) * weight, trunk.name)
    for branch in branches(made.grid, trunk):
        if not results.is_finished(folder, branch):
            _steps(made, trunk.name, branch.fork, None, trunk, text, numbers, folder, advance)
            seconds = _steps(made, branch.name, branch.steps, branch, trunk, text, numbers, folder, advance)
            results.finish(folder, made.grid, branch, train.validation_loss(made, text), seconds)
        else:
            advance((branch.steps - branch.fork) * weight, branch.name)
        results.drop_state(folder, branch.name)
    results.drop_state(folder, trunk.name)


def _steps(
    made: Trainer,
    name: str,
    until: int,
    branch: Branch | None,
    trunk: Trunk,
    text: Text,
    numbers: Tensor,
    folder: Path,
    advance: Advance,
) -> float:
    """Trains from the checkpoint `name` (else the trunk's, else the start) to a step; returns the seconds since the start."""
    grid, weight = made.grid, flops_per_step(made.grid, trunk) / 1e12
    state = results.load_state(folder, name, made.device) or results.load_state(folder, trunk.name, made.device)
    state = state or train.start(grid, trunk)
    train.load(made, state)
    seconds, first = state.seconds, state.step
    if branch is not None:
        advance((first - branch.fork) * weight, name)  # what a killed sweep had done of this decay
    for step in range(first, until):
        began = time.perf_counter()
        inputs, targets = batch(text.train, grid.context, numbers[step * grid.batch : (step + 1) * grid.batch])
        train.train_step(made, inputs, targets, train.learning_rate(grid, step, branch))
        seconds += time.perf_counter() - began
        advance(weight, name)
        if (step + 1) % grid.save_every == 0 or step + 1 == until:
            results.save_state(folder, name, train.saved(made, step + 1, seconds))
    return seconds


def _silent(done: float, what: str) -> None:
    """No bar."""


def _bar(grid: Grid) -> Advance:
    """A bar over the compute of the whole sweep, with the time left."""
    total = sum(steps_of(grid, t) * flops_per_step(grid, t) for t in trunks(grid)) / 1e12
    shape = "{desc} {percentage:3.0f}%|{bar}| {n:.3g}/{total:.3g} TFLOPs, {elapsed} gone, {remaining} left"
    bar = extra("tqdm").tqdm(total=total, bar_format=shape, smoothing=0.02)

    def advance(done: float, what: str) -> None:
        bar.set_description_str(what, refresh=False)
        bar.update(min(done, total - bar.n))  # sums of fractions end a hair above

    return advance
