"""A sweep killed with SIGKILL at random moments ends with the rows of an undisturbed one.

    python -m tests.scaling.kills --kills 10                      # eager, a minute or two
    python -m tests.scaling.kills --kills 10 --backend moec       # compiled, as people run it; each life compiles again

Moments are drawn uniformly over a share of the time that training takes, from the first checkpoint of each life on, so that later
kills find later stages. Prints both tables' digests; status 0 if they are equal.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = "--grid tiny --threads 1 --quiet --save-every 5 --tokens 20K 40K"


def main() -> int:
    """Returns 0 if the tables are equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        life(whole, args.backend).wait()
        with open(whole / "timing.csv") as file:
            lasts = sum(float(line["seconds"]) for line in csv.DictReader(file)) / 2
        done, total = 0, len(list((whole / "runs").glob("*.json")))
        while done < args.kills:
            child = life(killed, args.backend)
            wait_for_writing(child, killed)
            time.sleep(draw.uniform(0, lasts / args.kills))
            if child.poll() is not None:
                print("finished before it was killed; a longer grid is needed")
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            done += 1
            print(f"kill {done}: {len(list((killed / 'runs').glob('*.json')))} of {total} runs have rows", flush=True)
        life(killed, args.backend).wait()
        tables = [(folder / "rows.csv").read_bytes() for folder in (whole, killed)]
    digests = [hashlib.sha256(table).hexdigest()[:16] for table in tables]
    print(
        f"undisturbed {digests[0]}, killed {done} times {digests[1]}: {'equal' if tables[0] == tables[1] else 'DIFFERENT'}"
    )
    return 0 if tables[0] == tables[1] and done == args.kills else 1


def life(folder: Path, backend: str) -> subprocess.Popen[bytes]:
    """One process of the sweep."""
    command = [sys.executable, "-m", "moec.cli", "sweep", "--out", str(folder), "--backend", backend, *STEPS.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def wait_for_writing(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Until this life has changed a checkpoint."""
    before = newest(folder)
    while child.poll() is None and newest(folder) == before:
        time.sleep(0.005)


def newest(folder: Path) -> float:
    times = []
    for path in (folder / "state").glob("*.pt"):
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # renamed away while we looked
            continue
    return max(times, default=0.0)


if __name__ == "__main__":
    sys.exit(main())
