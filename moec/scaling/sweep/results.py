"""The folder of a sweep, and what is in it at any moment.

    sweep.json         the grid, the text's digest, machine, threads; written first, never changed
    runs/<run>.json    one for every finished run: its row, and apart from it how long it took
    state/<trunk>.pt   where the trunk stands; state/<run>.pt where its decay stands; gone when they are done
    rows.csv           all rows in the order of the grid; timing.csv seconds and tokens per second of the same runs

Every file is written whole (`store.write_atomic`) and means something by itself. A run is finished when its file in runs/
exists, and that file has its name: nothing is lost, nothing counted twice. rows.csv is the same, byte for byte, whether a sweep
was killed or not; times are not, which is why they stand apart.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch

from moec.scaling import costs as cost
from moec.scaling.errors import ScalingError
from moec.scaling.measure import machine
from moec.scaling.store import plain, write_atomic, write_json
from moec.scaling.sweep.grid import Branch, Grid, all_branches, flops_per_step
from moec.scaling.sweep.text import Text
from moec.scaling.sweep.train import State

_TIMES = ("seconds", "tokens_per_second")


def lock(folder: Path) -> IO[bytes]:
    """Held while the file is open, given back by the system when the process dies. Raises ScalingError where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "wb")  # noqa: SIM115  (open as long as the sweep runs)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as held:
        file.close()
        raise ScalingError(f"another sweep is running in {folder}; wait for it, or give --out another folder") from held
    return file


def manifest(grid: Grid, text: Text, threads: int, device: str) -> dict[str, object]:
    """Everything that the rows depend on."""
    return {
        **{name: plain(value) for name, value in asdict(grid).items()},
        "text": text.digest,
        "threads": threads,
        "device": device,
        "machine": machine(),
        "python": platform.python_version(),
    }


def begin(folder: Path, wanted: Mapping[str, object]) -> None:
    """Writes the manifest, or checks that the sweep that is there is this one. Raises ScalingError naming what differs."""
    path = folder / "sweep.json"
    for part in ("runs", "state"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for left in folder.rglob(".*.tmp"):  # what a kill left half written
        left.unlink()
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    differ = [k for k in wanted if found.get(k) != wanted[k]]
    if differ:
        told = ", ".join(f"{k} {found.get(k)} (now {wanted[k]})" for k in differ)
        raise ScalingError(
            f"{folder} holds another sweep: {told}; say the same again to go on with it, or give another --out"
        )


def is_finished(folder: Path, branch: Branch) -> bool:
    return (folder / "runs" / f"{branch.name}.json").exists()


def finish(folder: Path, grid: Grid, branch: Branch, loss: float, seconds: float) -> None:
    """Writes the run's file; from then on it counts."""
    times = {"seconds": seconds, "tokens_per_second": branch.tokens / seconds if seconds else math.inf}
    write_json(folder / "runs" / f"{branch.name}.json", {"row": _row(grid, branch, loss), "timing": times})


def write_tables(folder: Path, grid: Grid) -> int:
    """rows.csv and timing.csv of all finished runs; returns how many there are."""
    runs = {
        b.name: json.loads((folder / "runs" / f"{b.name}.json").read_text())
        for b in all_branches(grid)
        if is_finished(folder, b)
    }
    if runs:
        write_atomic(folder / "rows.csv", _csv([data["row"] for data in runs.values()]))
        write_atomic(folder / "timing.csv", _csv([{"name": name} | data["timing"] for name, data in runs.items()]))
    return len(runs)


def save_state(folder: Path, name: str, state: State) -> None:
    """A checkpoint, in place of the one before."""
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    write_atomic(folder / "state" / f"{name}.pt", buffer.getvalue())


def load_state(folder: Path, name: str, device: str) -> State | None:
    """The checkpoint of that name, if there is one."""
    path = folder / "state" / f"{name}.pt"
    if not path.exists():
        return None
    return State(**torch.load(path, map_location=device, weights_only=True))


def drop_state(folder: Path, name: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(folder / "state" / f"{name}.pt")


def _row(grid: Grid, branch: Branch, loss: float) -> dict[str, object]:
    """Columns as `moec.scaling.rows` reads them, and what tells runs apart. A run gone wrong has no loss: JSON has no NaN."""
    t = branch.trunk
    return {
        "name": branch.name,
        "run": t.name,
        "seed": t.seed,
        "d_model": t.d_model,
        "n_blocks": t.n_blocks,
        "expansion": grid.expansion,
        "granularity": t.granularity,
        "total_params": int(cost.total_params(t.d_model, t.n_blocks, grid.expansion)),
        "active_params": int(cost.active_params(t.d_model, t.n_blocks)),
        "tokens": branch.tokens,
        "flops": flops_per_step(grid, t) * branch.steps,
        "context": grid.context,
        "loss": loss,
    }


def _csv(rows: list[dict[str, object]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
