"""Many ranks, of which one exists: the graph, and the bytes that a rank sends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("dispatcher", "ranks", "collectives"), [("all-gather", 64, 5), ("all-to-all", 8, 5)])
def test_bytes_follow_the_formula(dispatcher: str, ranks: int, collectives: int) -> None:
    command = [sys.executable, "-m", "tests.parallel.many", dispatcher, str(ranks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["local"] == [128 // ranks, 48, 32]
    assert found["sent"] == pytest.approx(found["formula"])
    assert found["collectives"] == collectives  # sizes, slots, rows, weights, sums
    assert found["markers"] == 0
