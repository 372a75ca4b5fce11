"""Grids, text, the schedule, and sweeps that are killed: at every write in this process, and by SIGKILL in another."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.cli import main
from moec.scaling import ScalingError, store
from moec.scaling.commands.sweep import grid_of
from moec.scaling.rows import read_runs
from moec.scaling.sweep import results, text, train
from moec.scaling.sweep.grid import GRIDS, Grid, all_branches, branches, check, steps_of, trunks
from moec.scaling.sweep.runner import sweep

TINY = replace(GRIDS["tiny"], backend="eager", shapes=((8, 1),), granularities=(2,))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of two files that a tiny model can learn something about."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} {i} and {i + 1} make {2 * i + 1}." for i in range(2000)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(words: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sweep(TINY, text.read_text([words]), folder, bars=False) == 2
    return (folder / "rows.csv").read_bytes()


def test_a_grid_is_trunks_with_branches() -> None:
    grid = GRIDS["small"]
    check(grid)
    assert len(trunks(grid)) == 24
    names = [b.name for b in all_branches(grid)]
    assert len(names) == len(set(names)) == 72
    short, middle, long = branches(grid, trunks(grid)[0])
    assert short.fork < short.steps < middle.fork < middle.steps < long.fork < long.steps
    assert short.tokens == short.steps * 16 * 128 <= 400_000
    assert steps_of(grid, trunks(grid)[0]) == long.fork + sum(b.steps - b.fork for b in (short, middle, long))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"granularities": (3,)}, "--granularity 3 does not divide 4 * d_model = 32"),
        ({"granularities": ()}, "--granularity"),
        ({"granularities": (2, 2)}, "repeats itself"),
        ({"shapes": ((100, 1),)}, None),
        ({"shapes": ((200, 1),)}, "3 heads do not divide"),
        ({"shapes": ((0, 1),)}, "--shape 0x1"),
        ({"tokens": (100,)}, "--tokens 100 is less than 640"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"expansion": -1}, "--expansion is -1"),
        ({"warmup": -1}, "--warmup"),
        ({"decay": 1.0}, "--decay is 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0"),
    ],
)
def test_an_impossible_grid_says_what_to_change(change: dict[str, object], reason: str | None) -> None:
    grid = replace(TINY, **change)  # type: ignore[arg-type]
    if reason is None:
        return check(grid)
    with pytest.raises(ScalingError, match=reason.replace("*", r"\*")):
        check(grid)


def test_the_default_text_is_the_standard_library() -> None:
    found = text.read_text()
    assert found.files > 500
    assert len(found.train) > 5_000_000
    assert 0.04 < len(found.valid) / (len(found.train) + len(found.valid)) < 0.06
    assert b"def " in bytes(found.valid[:65536].tolist())


def test_folders_are_read_in_order_and_what_is_not_text_is_left_out(words: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in words.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "a.bin").write_bytes(b"\0\1\2")
    mixed, plain = text.read_text([folder]), text.read_text([words])
    assert (mixed.files, mixed.skipped, mixed.digest) == (2, 1, plain.digest)
    assert text.read_text([words / "one.txt"]).digest != plain.digest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xfe\xfa", "not UTF-8 text"),
        (b"a\0b", "not UTF-8 text"),
        (b"", "holds no text"),
        (None, "does not exist"),
    ],
)
def test_text_that_is_not_text(data: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ScalingError, match=reason):
        text.read_text([path])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ScalingError, match="holds no text"):
        text.read_text([empty])


def test_too_little_text(words: Path, tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="give more text with --text, or lower --tokens"):
        sweep(replace(TINY, tokens=(10_000_000,)), text.read_text([words]), tmp_path, bars=False)


def test_batches_repeat_nothing_and_depend_on_the_seed_alone(words: Path) -> None:
    found = text.read_text([words])
    order = text.order(found, 16, seed=0)
    assert len(set(order.tolist())) == len(order) == text.windows(found.train, 16)
    assert torch.equal(order, text.order(found, 16, seed=0))
    assert not torch.equal(order, text.order(found, 16, seed=1))
    inputs, targets = text.batch(found.train, 16, order[:4])
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_validation_is_not_trained_on(words: Path) -> None:
    found = text.read_text([words])
    whole = b"\n".join(p.read_bytes() for p in sorted(words.iterdir()))
    assert len(found.train) + len(found.valid) == len(whole)
    assert bytes(found.valid.tolist()) not in bytes(found.train.tolist())


def test_the_learning_rate_is_a_trapezoid() -> None:
    (branch, _) = branches(TINY, trunks(TINY)[0])
    rates = [train.learning_rate(TINY, step, branch) / TINY.learning_rate for step in range(branch.steps)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4 : branch.fork] == [1.0] * (branch.fork - 4)
    assert rates[branch.fork :] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert train.learning_rate(TINY, branch.fork, None) == TINY.learning_rate


def test_a_sweep_learns_and_its_rows_are_what_fit_reads(words: Path, tmp_path: Path) -> None:
    grid = replace(GRIDS["tiny"], backend="eager", shapes=((8, 1),), seeds=2)
    assert sweep(grid, text.read_text([words]), tmp_path, bars=True) == 8
    runs = read_runs(tmp_path / "rows.csv")
    assert len(runs) == 8
    assert {r.granularity for r in runs} == {1, 2}
    assert {r.total_params for r in runs} == {8**2 * 20}
    assert {r.seed for r in runs} == {"0", "1"}
    assert {r.context for r in runs} == {16}
    by_length: dict[float, list[float]] = {}
    for r in runs:
        by_length.setdefault(r.tokens, []).append(r.loss)
    short, long = (sum(x) / len(x) for _, x in sorted(by_length.items()))
    assert long < short - 0.1 < 5.5
    with open(tmp_path / "timing.csv") as file:
        assert all(float(line["tokens_per_second"]) > 0 for line in csv.DictReader(file))
    assert not list((tmp_path / "state").iterdir())
    assert sweep(grid, text.read_text([words]), tmp_path, bars=False) == 8


class Killed(BaseException):
    """Stands for SIGKILL: nothing in moec may catch it."""


@pytest.mark.parametrize("after", [True, False], ids=["after the rename", "before the rename"])
def test_killed_at_every_write(
    after: bool, words: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life ends at its first write, once done, or at its second, not yet done; the rows are those undisturbed."""
    real = os.replace
    writes = 0

    def dying(source: str, target: str) -> None:
        nonlocal writes
        writes += 1
        if not after and writes == 2:
            raise Killed
        real(source, target)
        if after:
            raise Killed

    found = text.read_text([words])
    lives = 0
    while len(list(tmp_path.glob("runs/*.json"))) < 2:
        writes, lives = 0, lives + 1
        monkeypatch.setattr(store.os, "replace", dying)
        with pytest.raises(Killed):
            sweep(TINY, found, tmp_path, bars=False)
        monkeypatch.setattr(store.os, "replace", real)
    assert lives > 10
    assert sweep(TINY, found, tmp_path, bars=False) == 2
    assert (tmp_path / "rows.csv").read_bytes() == undisturbed
    assert not list(tmp_path.rglob("*.tmp"))


def command(words: Path, out: Path) -> list[str]:
    options = "--grid tiny --backend eager --shape 8x1 --granularity 2 --threads 1 --quiet --save-every 3"
    return [sys.executable, "-m", "moec.cli", "sweep", "--text", str(words), "--out", str(out), *options.split()]


def test_sigkill(words: Path, undisturbed: bytes, tmp_path: Path) -> None:
    """Once when the first checkpoint is there, once a little later. Ten random moments: python -m tests.scaling.kills."""
    killed = tmp_path / "killed"
    for checkpoints in (1, 4):
        child = subprocess.Popen(command(words, killed), stdout=subprocess.DEVNULL)
        seen: set[float] = set()
        while child.poll() is None and len(seen) < checkpoints:
            seen |= (
                {p.stat().st_mtime for p in (killed / "state").glob("*.pt")} if (killed / "state").exists() else set()
            )
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command(words, killed), check=True, capture_output=True)
    assert (killed / "rows.csv").read_bytes() == undisturbed


def test_another_sweep_in_the_same_folder_is_refused(words: Path, tmp_path: Path) -> None:
    found = text.read_text([words])
    results.begin(tmp_path, results.manifest(TINY, found, torch.get_num_threads(), "cpu"))
    with pytest.raises(ScalingError, match=r"holds another sweep: learning_rate 0.003 \(now 0.001\)"):
        sweep(replace(TINY, learning_rate=0.001), found, tmp_path, bars=False)
    with pytest.raises(ScalingError, match="holds another sweep: text"):
        sweep(TINY, text.read_text([words / "one.txt"]), tmp_path, bars=False)
    held = results.lock(tmp_path)
    with pytest.raises(ScalingError, match="another sweep is running"):
        sweep(TINY, found, tmp_path, bars=False)
    held.close()


def test_a_run_gone_wrong_has_a_row_without_a_loss(words: Path, tmp_path: Path) -> None:
    wild = replace(TINY, learning_rate=0.99, tokens=(640,))
    folder = tmp_path
    results.begin(folder, results.manifest(wild, text.read_text([words]), 1, "cpu"))
    (branch,) = all_branches(wild)
    results.finish(folder, wild, branch, float("nan"), 1.0)
    assert results.write_tables(folder, wild) == 1
    with pytest.raises(ScalingError, match="line 2: loss is ''"):
        read_runs(folder / "rows.csv")


@pytest.mark.parametrize("router", ["expert_choice", "sigmoid"])
def test_other_routers_train(router: str, words: Path, tmp_path: Path) -> None:
    assert sweep(replace(TINY, router=router, tokens=(1280,)), text.read_text([words]), tmp_path, bars=False) == 1


@pytest.mark.slow
def test_compiled_by_moec_the_losses_are_those_of_eager(words: Path, undisturbed: bytes, tmp_path: Path) -> None:
    sweep(replace(TINY, backend="moec"), text.read_text([words]), tmp_path, bars=False)
    eager = [float(row["loss"]) for row in csv.DictReader(undisturbed.decode().splitlines())]
    assert [r.loss for r in read_runs(tmp_path / "rows.csv")] == pytest.approx(eager, abs=2e-3)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--shape 64", "write d_model x n_blocks"),
        ("--tokens many", "'many' is not a number"),
        ("--granularity 5 --shape 64x2", "does not divide"),
        ("--grid tiny --router best", "take one of softmax"),
        ("--grid tiny --backend fast", "take one of moec, inductor, eager"),
        ("--grid tiny --text /nowhere", "does not exist"),
        ("--grid tiny --threads 0", "--threads is 0"),
        ("--grid tiny --seeds -2", "--seeds is -2"),
    ],
)
def test_options_that_make_no_sense(argv: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--quiet", "--out", str(tmp_path), *argv.split()]) == 2
    assert reason in capsys.readouterr().err


def test_dry_run_lists_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--dry-run", "--tokens", "1M", "--seeds", "3", "--shape", "64x2"]) == 0
    head, *names = capsys.readouterr().out.splitlines()
    assert head.startswith("12 runs on 12 trunks")
    assert names[0] == "d64-n2-g1-s0-t488"


def test_the_manifest_holds_what_rows_depend_on(words: Path, tmp_path: Path) -> None:
    found = text.read_text([words])
    results.begin(tmp_path, results.manifest(TINY, found, 2, "cpu"))
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert data["text"] == found.digest
    assert {"machine", "threads", "router", "learning_rate", "save_every"} <= set(data)


def test_every_option_of_a_grid_can_be_said() -> None:
    import argparse

    from moec.scaling.commands.sweep import configure

    parser = argparse.ArgumentParser()
    configure(parser)
    said = "--shape 8x1 --granularity 1 --tokens 2K --seeds 3 --expansion 4 --batch 2 --context 8 --learning-rate 0.1 --warmup 3"
    more = "--decay 0.3 --router sigmoid --backend eager --save-every 5 --validation 64 --balance-loss 0.1 --z-loss 0.2"
    wanted = Grid(((8, 1),), (1,), (2000,), 3, 4, 2, 8, 0.1, 3, 0.3, "sigmoid", 0.1, 0.2, "eager", 5, 64)
    assert grid_of(parser.parse_args([*said.split(), *more.split()])) == wanted
