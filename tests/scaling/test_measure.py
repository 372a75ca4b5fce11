"""The table of measured layers: shapes, what is written, and that plan can read it. No time is asserted."""

from pathlib import Path

import pytest

from moec.cli import main as moec
from moec.scaling import ScalingError, read_device
from moec.scaling.measure import main, measure


def test_a_time_for_every_layer() -> None:
    times, rate = measure((8, 16), (1, 2), expansion=2, tokens=32, backend="eager", seconds=0.001)
    assert [(t.d_model, t.d_expert, t.num_experts, t.top_k) for t in times] == [
        (8, 32, 2, 1),
        (8, 16, 4, 2),
        (16, 64, 2, 1),
        (16, 32, 4, 2),
    ]
    assert all(t.seconds_per_token > 0 for t in times)
    assert rate > 0


def test_the_command_writes_what_plan_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "measured.json"
    argv = "--d-model 8 16 --granularity 1 2 --expansion 2 --tokens 32 --backend eager --seconds 0.001".split()
    assert main([*argv, "--out", str(out)]) == 0
    device = read_device(out)
    assert len(device.rows) == 4
    assert "torch" in device.machine
    assert moec(["plan", "--flops", "1e18", "--expansion", "2", "--device", str(out)]) == 0
    assert "a token takes longer by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--d-model 0", "--d-model 0"),
        ("--granularity 3 --d-model 8", "take powers of two"),
        ("--seconds 0", "--seconds is 0"),
        ("--expansion -1", "--expansion -1"),
        ("--router best", "unknown router"),
    ],
)
def test_sizes_that_are_no_layer(argv: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv.split(), "--out", str(tmp_path / "m.json")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_nothing_to_measure() -> None:
    with pytest.raises(ScalingError, match="give whole numbers"):
        measure((), (1,), expansion=2)
