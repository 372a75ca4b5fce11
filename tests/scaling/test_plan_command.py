"""`moec plan` as people and scripts call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moec.cli import main
from moec.scaling import ScalingError
from moec.scaling.quantity import BYTES, COUNTS, SECONDS, quantity
from tests.scaling.test_device import device


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(out(capsys, "--flops", "1.93e20", "--expansion", "64", "--json"))
    assert data["granularity"] == 16
    assert isinstance(data["granularity"], int)
    assert data["tokens"] == pytest.approx(28.94e9, rel=0.015)
    assert data["active_params"] == pytest.approx(1e9, rel=0.015)
    assert data["total_params"] == pytest.approx(43 * data["active_params"])
    assert data["loss"] == pytest.approx(2.491, abs=0.005)
    assert data["flops"] == pytest.approx(1.93e20)
    assert data["d_model"] == pytest.approx((data["active_params"] * 64 / 12) ** (1 / 3))
    assert data["coefficients"]["name"] == "e64"
    assert any("extrapolated" in w for w in data["warnings"])
    assert [o["law"] for o in data["opinions"]] == ["Efficiency Leverage", "Zhao et al."]


def test_json_never_holds_what_json_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(out(capsys, "--flops", "1e22", "--tokens", "3B", "--memory", "8GB", "--json"))
    assert {a["extra_compute"] for a in data["alternatives"]} == {None, 0.0}


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "--flops", "1.93e20")
    for part in ("G = 16 at E = 64", "28.8B", "Efficiency Leverage", "DISAGREES", "1->2 35.6%", "Be warned", "best"):
        assert part in text


def test_units_and_other_coefficients(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = json.loads(out(capsys, "--tokens", "3B", "--memory", "80GiB", "--json", "--coefficients", "e64-heldout"))
    assert data["tokens"] == pytest.approx(3e9, rel=1e-5)
    assert data["coefficients"]["name"] == "e64-heldout"
    fit = tmp_path / "fit.json"
    fit.write_text(
        json.dumps({"a": 18, "alpha": 0.1, "b": 30, "beta": 0.1, "g": 2, "gamma": 0.5, "c": 0.5, "expansion": 8})
    )
    data = json.loads(out(capsys, "--tokens", "3B", "--expansion", "8", "--json", "--coefficients", str(fit)))
    assert data["coefficients"]["name"] == "fit.json"
    assert not any("was not fitted" in w for w in data["warnings"])


def test_another_expansion_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert "E = 8 was not fitted: the coefficients are those of E = 16" in out(
        capsys, "--flops", "1e18", "--expansion", "8"
    )


def test_a_measured_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    measured = device({1: 1.0, 2: 1.05, 4: 1.8})
    rows = [vars(row) for row in measured.rows]
    path.write_text(json.dumps({"machine": "my GPU", "flops_per_second": measured.rate, "rows": rows}))
    text = out(capsys, "--hours", "40", "--device", str(path))
    for part in ("G = 2 at E = 64", "my GPU", "1 -> 2", "+3.3%", "pays", "does not pay", "40 h"):
        assert part in text
    data = json.loads(out(capsys, "--hours", "90min", "--device", str(path), "--json"))
    assert data["seconds"] == pytest.approx(5400)
    assert [step["pays"] for step in data["break_even"]] == [True, False]


def test_max_granularity_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    text = out(capsys, "--flops", "1e20", "--max-granularity", "4", "--plot", str(path))
    assert "G = 4 at E = 64" in text
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("", "no budget"),
        ("--flops -1e20", "--flops is -1e20; give a number above zero"),
        ("--flops=-3B", "above zero"),
        ("--flops much", "'much' is not a number"),
        ("--tokens 3X", "with a unit (K, M, B, G, T)"),
        ("--flops 1e20 --expansion -4", "--expansion is -4"),
        ("--flops 1e20 --expansion nan", "--expansion is nan"),
        ("--flops 1e20 --coefficients e32", "e64-rounded"),
        ("--flops 1e20 --coefficients /nowhere/fit.json", "/nowhere/fit.json"),
        ("--flops 1e20 --max-granularity 0.5", "--max-granularity 0.5"),
        ("--hours 3", "--device measured.json"),
        ("--flops 1e20 --routing-cost -2", "--routing-cost"),
    ],
)
def test_bad_input_ends_in_one_line_that_says_what_to_change(
    argv: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_quantities() -> None:
    assert quantity("3b", COUNTS, "x") == 3e9
    assert quantity("1.5e3K", COUNTS, "x") == 1.5e6
    assert quantity("80 GiB", BYTES, "x") == 80 * 2**30
    assert quantity("2d", SECONDS, "x") == 172800
    for text in ("", "1..2", "inf", "3 4"):
        with pytest.raises(ScalingError):
            quantity(text, COUNTS, "x")


def test_planning_needs_neither_torch_nor_scipy_nor_matplotlib() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'scipy', 'matplotlib', 'tqdm'): sys.modules[name] = None\n"
        "from moec.cli import main\n"
        "sys.exit(main(['plan', '--flops', '1e20', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["granularity"] == 16


def test_a_plot_without_matplotlib_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from moec.cli import main\n"
        "sys.exit(main(['plan', '--flops', '1e20', '--plot', '/tmp/never.png']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install moec[scaling]" in done.stderr
