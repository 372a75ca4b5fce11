"""The page: go where the gain holds on the machine, no-go where there is none, measure more where one cannot know."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moec.cli import main
from moec.scaling import Budget, Coefficients, Device, ScalingError, published
from moec.scaling.advise import GO, MEASURE_MORE, NO_GO, Advice, advise
from moec.scaling.fit import fit_runs
from moec.scaling.optimum import plan
from moec.scaling.page import page
from tests.scaling.runs import drawn
from tests.scaling.test_device import device
from tests.scaling.test_fit import write

E64 = published("e64")
NEAR = Budget(flops=3e18)
FREE = device({1: 1.0, 2: 1.02, 4: 1.04, 8: 1.06, 16: 1.08}, widths=(256, 512, 1024))
DEAR = device({1: 1.0, 2: 1.6, 4: 2.6, 8: 4.0, 16: 7.0}, widths=(256, 512, 1024))


def advice(
    law: Coefficients = E64,
    noise: float = 0.003,
    machine: Device | None = FREE,
    budget: Budget = NEAR,
    **grid: tuple[float, ...],
) -> Advice:
    runs = drawn(law, np.random.default_rng(0), noise, **grid)  # type: ignore[arg-type]
    return advise(fit_runs(runs, resamples=30), budget, 64, device=machine)


@pytest.fixture(scope="module")
def good() -> Advice:
    return advice()


def test_go_where_the_machine_keeps_the_gain(good: Advice) -> None:
    assert good.verdict.decision == GO
    assert good.plan.granularity == 16
    assert good.worth[16].low > 1.5
    assert good.tokens.low < good.plan.tokens < good.tokens.high
    assert good.best_share[16] > 0.9
    assert any("no gain is left" in text for text in good.verdict.changes)


def test_no_go_where_the_machine_eats_it() -> None:
    found = advice(machine=DEAR)
    assert found.verdict.decision == NO_GO
    assert found.plan.granularity == 1
    assert all(not step.pays for step in found.steps)
    assert any("a kernel that makes 1 -> 2 cost less than" in text for text in found.verdict.changes)


def test_no_go_where_finer_experts_hurt() -> None:
    assert advice(replace(E64, g=-1.0, a=20.0)).verdict.decision == NO_GO


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"machine": None}, "no machine was asked"),
        ({"budget": Budget(flops=1e23)}, "outside the runs"),
        ({"law": replace(E64, g=0.05), "noise": 0.01, "machine": device(dict.fromkeys((1, 2, 4, 8, 16), 1.0))}, "may"),
        ({"widths": (256,)}, "not identifiable: N never varies"),
    ],
)
def test_measure_more_where_one_cannot_know(more: dict[str, object], reason: str) -> None:
    found = advice(**more)  # type: ignore[arg-type]
    assert found.verdict.decision == MEASURE_MORE
    assert any(reason in text for text in found.verdict.reasons)
    assert found.verdict.changes


def test_how_many_runs_would_tell() -> None:
    changes = advice(replace(E64, g=0.1), noise=0.02).verdict.changes
    assert any("runs of the same kind" in text or "no affordable number" in text for text in changes)


def test_worth_is_what_plan_says_of_the_coarsest() -> None:
    found = advice(machine=None)
    whole = plan(found.fit.coefficients, NEAR, 64, granularities=(1.0, 2.0, 4.0, 8.0, 16.0))
    extra = {a.granularity: a.extra_compute for a in whole.alternatives}
    assert found.worth[found.plan.granularity].value == pytest.approx(1 + extra[1], rel=1e-5)


def test_one_granularity_is_nothing_to_compare() -> None:
    with pytest.raises(ScalingError, match="only G = 4 is left to compare"):
        advice(granularities=(4.0,))


def test_the_page_holds_everything(good: Advice) -> None:
    text = page(good, FREE, "advice.png")
    for part in (
        "# Granularity: go",
        "G = 16",
        "Tokens needed",
        "Measured on test",
        "pays",
        "What would change it",
        "45 runs",
    ):
        assert part in text
    assert "Slowdown: not measured" in page(advice(machine=None), None, "")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = write(tmp_path / "rows.csv", drawn(E64, np.random.default_rng(0)))
    out = tmp_path / "advice"
    assert main(["advise", str(rows), "--flops", "3e18", "--resamples", "20", "--out", str(out)]) == 0
    assert capsys.readouterr().out == (out / "advice.md").read_text()
    assert (out / "advice.png").stat().st_size > 5000
    assert main(["advise", str(rows), "--resamples", "40", "--out", str(out)]) == 2
    assert "no budget" in capsys.readouterr().err


def test_an_unknown_expansion_has_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    runs = drawn(E64, np.random.default_rng(0))
    lines = ["total_params,tokens,granularity,loss"] + [
        f"{r.total_params},{r.tokens},{r.granularity},{r.loss}" for r in runs
    ]
    rows.write_text("\n".join(lines))
    assert main(["advise", str(rows), "--flops", "1e18", "--no-plot", "--out", str(tmp_path)]) == 2
    assert "--expansion" in capsys.readouterr().err
