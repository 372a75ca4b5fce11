"""A finished sweep as a page: its data, pictures, the fitted curve, and what it does and does not show.

    python -m moec.scaling.report sweep --out docs/sweep.md

copies rows.csv, timing.csv and sweep.json into data/ beside the page, draws the fit there, and writes the page. Whether the loss
falls from G = 1 to finer experts at equal active compute is told as it came out, from pairs of runs that differ in G alone (same
shape, tokens, seed and so the same batches), with the noise between seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.errors import MoecError
from moec.scaling.commands.fit import lines
from moec.scaling.errors import ScalingError
from moec.scaling.fit import Fit, fit_runs
from moec.scaling.render import count
from moec.scaling.rows import read_runs
from moec.scaling.store import write_atomic

Row = Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Loss at one G minus loss at the coarsest, over pairs of runs that differ in nothing else. Nats; `error` of the mean."""

    granularity: int
    pairs: int
    lower: int
    mean: float
    error: float


def compare(rows: Iterable[Row]) -> tuple[Comparison, ...]:
    """Every finer G against the coarsest one. The error treats shapes and seeds as independent, not the lengths of one trunk."""
    by_g: dict[int, dict[tuple[str, ...], float]] = {}
    for row in rows:
        key: tuple[str, ...] = (row["d_model"], row["n_blocks"], row["seed"], row["tokens"])
        by_g.setdefault(int(row["granularity"]), {})[key] = float(row["loss"])
    coarsest, *finer = sorted(by_g)
    found = []
    for g in finer:
        differences = {k: loss - by_g[coarsest][k] for k, loss in by_g[g].items() if k in by_g[coarsest]}
        trunks: dict[tuple[str, ...], list[float]] = {}
        for key, value in differences.items():
            trunks.setdefault(key[:3], []).append(value)
        means = [statistics.fmean(values) for values in trunks.values()]
        error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        lower = sum(value < 0 for value in differences.values())
        found.append(Comparison(g, len(differences), lower, statistics.fmean(differences.values()), error))
    return tuple(found)


def verdict(c: Comparison, coarsest: int, seed_noise: float | None) -> str:
    """One sentence. A mean within two standard errors of zero decides nothing."""
    what = f"from G = {coarsest} to G = {c.granularity} the loss changes by {c.mean:+.4f} nats (standard error {c.error:.4f})"
    pairs = f"lower in {c.lower} of {c.pairs} pairs"
    if not abs(c.mean) > 2 * c.error:
        return f"{what}, {pairs}: **not told apart from zero**"
    noise = "" if seed_noise is None else f", {abs(c.mean) / seed_noise:.1f} times the noise between seeds"
    return f"{what}, {pairs}: it **{'falls' if c.mean < 0 else 'rises'}**{noise}"


def report(folder: Path, out: Path) -> Fit:
    """Writes the page and what it shows; returns the fit. Raises ScalingError for a folder that holds no finished sweep."""
    for name in ("rows.csv", "timing.csv", "sweep.json"):
        if not (folder / name).exists():
            raise ScalingError(f"{folder} has no {name}; give the --out folder of a moec sweep that has ended")
    data = out.parent / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("rows.csv", "timing.csv", "sweep.json"):
        shutil.copyfile(folder / name, data / f"sweep-{name}".replace("sweep-sweep", "sweep"))
    fit = fit_runs(read_runs(folder / "rows.csv"), source=str(out))
    from moec.scaling.plots import plot_fit

    plot_fit(str(data / "sweep-fit.png"), fit)
    rows, times = (list(csv.DictReader((folder / n).read_text().splitlines())) for n in ("rows.csv", "timing.csv"))
    write_atomic(out, page(rows, times, json.loads((folder / "sweep.json").read_text()), fit).encode())
    return fit


def page(rows: Sequence[Row], times: Sequence[Row], settings: Mapping[str, object], fit: Fit) -> str:
    """The Markdown."""
    comparisons = compare(rows)
    coarsest = min(int(row["granularity"]) for row in rows)
    seeds = "unknown: one seed" if fit.seed_noise is None else f"{fit.seed_noise:.4f} nats"
    parts = [
        "# A sweep: does a finer granularity lower the loss at this size?",
        "",
        f"{len(rows)} runs on {len({row['run'] for row in rows})} trunks, made by `moec sweep --grid small` and written up by "
        "`python -m moec.scaling.report`. Data: `data/sweep-rows.csv`, `data/sweep-timing.csv`, `data/sweep.json`.",
        "",
        f"Settings: {_settings(settings)}.",
        "",
        "## What came out",
        "",
        "At equal active parameters, tokens, seed and batches, routers not counted (as in the law):",
        "",
        *(f"- {verdict(c, coarsest, fit.seed_noise)}" for c in comparisons),
        f"- noise between seeds, pooled over everything that was run twice: {seeds}",
        "",
        *_losses(rows),
        "",
        "## The law, fitted",
        "",
        "```",
        *lines(fit),
        "```",
        "",
        "![](data/sweep-fit.png)",
        "",
        "## What it costs here",
        "",
        *_speeds(rows, times),
        "",
        "## What it does not show",
        "",
        *_limits(rows, settings),
    ]
    return "\n".join(parts) + "\n"


def _settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _losses(rows: Sequence[Row]) -> list[str]:
    """Mean over seeds, by shape and tokens, a column for each G."""
    grains = sorted({int(row["granularity"]) for row in rows})
    cells: dict[tuple[int, int, int], dict[int, list[float]]] = {}
    for row in rows:
        key = (int(row["d_model"]), int(row["n_blocks"]), int(row["tokens"]))
        cells.setdefault(key, {}).setdefault(int(row["granularity"]), []).append(float(row["loss"]))
    head = [
        "| d_model x blocks | tokens | " + " | ".join(f"G = {g}" for g in grains) + " |",
        "|---" * (2 + len(grains)) + "|",
    ]
    return head + [
        f"| {d} x {n} | {count(tokens)} | "
        + " | ".join(f"{statistics.fmean(by_g[g]):.4f}" if g in by_g else "" for g in grains)
        + " |"
        for (d, n, tokens), by_g in sorted(cells.items())
    ]


def _speeds(rows: Sequence[Row], times: Sequence[Row]) -> list[str]:
    """Median tokens per second of training, by shape, a column for each G."""
    speed = {t["name"]: float(t["tokens_per_second"]) for t in times}
    grains = sorted({int(row["granularity"]) for row in rows})
    shapes = sorted({(int(row["d_model"]), int(row["n_blocks"])) for row in rows})
    made = [
        "Tokens per second of training, median over runs, compiling left out:",
        "",
        "| d_model x blocks | " + " | ".join(f"G = {g}" for g in grains) + " |",
        "|---" * (1 + len(grains)) + "|",
    ]
    for d, n in shapes:
        cells = []
        for g in grains:
            some = [
                speed[r["name"]]
                for r in rows
                if (int(r["d_model"]), int(r["n_blocks"]), int(r["granularity"])) == (d, n, g)
            ]
            cells.append(f"{statistics.median(some):,.0f}" if some else "")
        made.append(f"| {d} x {n} | " + " | ".join(cells) + " |")
    return made


def _limits(rows: Sequence[Row], settings: Mapping[str, object]) -> list[str]:
    biggest = max(int(row["total_params"]) for row in rows)
    longest = max(int(row["tokens"]) for row in rows)
    return [
        f"- Models of at most {count(biggest)} non-embedding parameters and {count(longest)} tokens: a thousand times below the "
        "published runs. Nothing here carries to a size one would deploy; `moec advise` refuses to.",
        f"- One learning rate ({settings.get('learning_rate')}) for all widths and G; the best one may differ by G.",
        f"- Router {settings.get('router')}, context {settings.get('context')}, bytes instead of tokens; the paper has expert "
        "choice, 256, and a tokenizer.",
        "- Seeds change the start and the order of the text together; runs of one seed share batches, so that differences "
        "between G are less noisy than the runs themselves.",
        "- Lengths of one trunk share most of their training: they are not independent runs, and are not counted as such.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 after an error on stderr."""
    parser = argparse.ArgumentParser(prog="python -m moec.scaling.report", description="A finished sweep as a page.")
    parser.add_argument("folder", type=Path, help="the --out of moec sweep")
    parser.add_argument("--out", type=Path, default=Path("docs/sweep.md"))
    args = parser.parse_args(argv)
    try:
        fit = report(args.folder, args.out)
    except (MoecError, OSError) as error:
        print(f"moec.scaling.report: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(fit)))
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
