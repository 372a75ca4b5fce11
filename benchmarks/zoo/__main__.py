"""Question: which MoE families of transformers does moec understand, and what does it say of the others?

    make zoo                                    # every family that has no result yet, then docs/zoo.md
    make zoo ARGS="--only mixtral --again"      # these again (`--only` may be given more than once)
    make zoo ARGS=--report                      # only write docs/zoo.md from the results

Each family runs in a process of its own (`probe.py`), within a time limit; its result is a JSON file under `--results`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from . import families, table

ROOT = Path(__file__).parents[2]


def measure(name: str, results: Path, limit: int) -> str:
    """Runs one family; its log lies beside its result. Returns one line for people."""
    path = results / f"{name}.json"
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with (results / f"{name}.log").open("w") as log:
        try:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.zoo.probe", name, str(path)],
                cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            path.write_text(json.dumps({"error": f"no result within {limit} s"}))
    if not path.exists():
        path.write_text(json.dumps({"error": "the process died; see its log"}))
    return table.line(json.loads(path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(families.FAMILIES), help="a family; may be repeated")
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, default=240, help="seconds for one family")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "zoo")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "zoo.md")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)

    names = args.only or list(families.FAMILIES)
    todo = [n for n in names if args.again or not (args.results / f"{n}.json").exists()]
    todo = [] if args.report else todo
    print(f"{len(names)} families, {len(todo)} to run, {args.workers} at a time; results in {args.results}", flush=True)
    for name in todo:
        (args.results / f"{name}.json").unlink(missing_ok=True)
    start = time.monotonic()
    with ThreadPoolExecutor(args.workers) as pool:
        running = {pool.submit(measure, name, args.results, args.limit): name for name in todo}
        for done, future in enumerate(as_completed(running), 1):
            left = (time.monotonic() - start) / done * (len(todo) - done)
            print(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {running[future]}: {future.result()}", flush=True)

    found = {n: json.loads((args.results / f"{n}.json").read_text()) for n in families.FAMILIES
             if (args.results / f"{n}.json").exists()}  # fmt: skip
    args.docs.write_text(table.page(found))
    print(f"{args.docs}: {table.summary(found)}")


if __name__ == "__main__":
    main()
