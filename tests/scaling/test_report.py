"""A sweep written up: what came out is said as it came out."""

from pathlib import Path

import pytest

from moec.scaling.report import Comparison, compare, main, verdict
from moec.scaling.sweep import results
from moec.scaling.sweep.grid import Grid, all_branches
from moec.scaling.sweep.text import Text

GRID = Grid(shapes=((32, 2), (64, 2)), granularities=(1, 2, 4), tokens=(200_000, 400_000), seeds=2, learning_rate=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep that was never trained: losses by formula, G = 4 better by 0.02, G = 2 worse by as much as better."""
    import torch

    out = tmp_path / "sweep"
    empty = Text(torch.zeros(1), torch.zeros(1), "none", 1, 0)
    results.begin(out, results.manifest(GRID, empty, 2, "cpu"))
    for i, branch in enumerate(all_branches(GRID)):
        t = branch.trunk
        wobble = 0.003 * (-1) ** i
        loss = 2.0 + 20 / t.d_model + 3e4 / branch.tokens + 0.005 * t.seed
        loss += {1: 0.0, 2: 0.01 * (-1) ** t.seed, 4: -0.02}[t.granularity] + wobble
        results.finish(out, GRID, branch, loss, 10.0)
    results.write_tables(out, GRID)
    return out


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "docs" / "sweep.md"
    assert main([str(folder), "--out", str(page)]) == 0
    text = page.read_text()
    for part in (
        "24 runs on 12 trunks",
        "from G = 1 to G = 4 the loss changes by -0.0200 nats (standard error 0.0000), lower in 8 of 8 pairs: it **falls**",
        "from G = 1 to G = 2",
        "**not told apart from zero**",
        "noise between seeds",
        "| 32 x 2 | 199K |",
        "learning_rate 0.01",
        "moec fit: 24 runs",
        "What it does not show",
    ):
        assert part in text
    assert (page.parent / "data" / "sweep-rows.csv").read_bytes() == (folder / "rows.csv").read_bytes()
    assert (page.parent / "data" / "sweep-fit.png").stat().st_size > 5000
    assert (page.parent / "data" / "sweep.json").exists()


def test_a_folder_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no rows.csv; give the --out folder" in capsys.readouterr().err


def test_lengths_of_one_trunk_count_as_one() -> None:
    rows = [
        {"d_model": "8", "n_blocks": "1", "seed": seed, "tokens": str(tokens), "granularity": g, "loss": str(loss)}
        for seed, shift in (("0", 0.1), ("1", 0.3))
        for tokens in (10, 20, 30, 40)
        for g, loss in (("1", 2.0), ("2", 2.0 - shift))
    ]
    (found,) = compare(rows)
    assert (found.pairs, found.lower) == (8, 8)
    assert found.mean == pytest.approx(-0.2)
    assert found.error == pytest.approx(0.1)


def test_what_rises_is_said_to_rise() -> None:
    assert "**rises**, 2.0 times the noise" in verdict(Comparison(4, 8, 0, 0.02, 0.001), 1, 0.01)
    assert "not told apart" in verdict(Comparison(4, 2, 1, 0.02, float("nan")), 1, None)
