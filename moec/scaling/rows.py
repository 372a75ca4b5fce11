"""Runs as a table: one line per training run, in CSV or JSON, read for `moec fit`; `moec sweep` writes the same columns.

| column | |
|---|---|
| `loss` | final loss, nats per token, of text not trained on (or smoothed training loss, as in the paper) |
| `tokens` | D, trained on |
| `granularity` | G |
| `total_params` | N, non-embedding, without routers; or else `d_model`, `n_blocks` and `expansion` |
| `expansion` | E; one fit is for one E |
| `run` | what shares noise: branches of one trunk have the same value (optional; each line its own) |
| `seed` | runs that differ in nothing else measure the noise (optional) |
| `context` | tokens in a sequence (optional, kept for warnings) |

Other columns are left alone. JSON is a list of objects, or an object with the list under "rows".
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.scaling.costs import total_params
from moec.scaling.errors import ScalingError
from moec.scaling.law import Measured


@dataclass(frozen=True)
class Run:
    """One line of the table. `expansion` 0 and `context` 0: unknown."""

    total_params: float
    tokens: float
    granularity: float
    loss: float
    run: str
    seed: str = ""
    expansion: float = 0.0
    context: int = 0


def read_runs(path: str | Path, expansion: float | None = None) -> tuple[Run, ...]:
    """The runs of a table, or those of one E. Raises ScalingError naming the line and the column that cannot be used."""
    path = Path(path)
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ScalingError(f"{path} is not text; give the CSV or JSON that moec sweep wrote")
    text = raw.decode("utf-8", errors="replace")
    lines = _csv(text, path) if path.suffix.lower() == ".csv" else _json(text, path)
    runs = tuple(_run(line, where) for where, line in lines)
    if not runs:
        raise ScalingError(
            f"{path} has no runs; it needs one line per run with loss, tokens, granularity and total_params"
        )
    found = sorted({r.expansion for r in runs})
    if expansion is not None:
        runs = tuple(r for r in runs if r.expansion == expansion)
        if not runs:
            raise ScalingError(
                f"{path} has no runs with expansion {expansion:g}; it has {', '.join(f'{e:g}' for e in found)}"
            )
    elif len(found) > 1:
        raise ScalingError(
            f"{path} mixes expansions {', '.join(f'{e:g}' for e in found)}; the law is for one E, choose with --expansion"
        )
    return runs


def measured(runs: Sequence[Run]) -> Measured:
    """The ranges that the runs span."""

    def span(values: list[float]) -> tuple[float, float]:
        return min(values), max(values)

    contexts = {r.context for r in runs}
    return Measured(
        total_params=span([r.total_params for r in runs]),
        tokens=span([r.tokens for r in runs]),
        granularity=span([r.granularity for r in runs]),
        context=contexts.pop() if len(contexts) == 1 and 0 not in contexts else None,
    )


def _csv(text: str, path: Path) -> list[tuple[str, Mapping[str, object]]]:
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in ("loss", "tokens", "granularity") if c not in (reader.fieldnames or ())]
    if missing:
        raise ScalingError(f"{path} has no column {', '.join(missing)}; its first line has to name the columns")
    lines: list[tuple[str, Mapping[str, object]]] = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise ScalingError(f"{where} has {'more' if None in row else 'fewer'} cells than columns; correct the line")
        lines.append((where, row))
    return lines


def _json(text: str, path: Path) -> list[tuple[str, Mapping[str, object]]]:
    try:
        data = json.loads(text)
    except ValueError as bad:
        raise ScalingError(f"{path} is not JSON ({bad}); a table of another kind has to end in .csv") from bad
    rows = data.get("rows") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ScalingError(f'{path} is no list of runs; write a list of objects, or one under "rows"')
    return [(f"{path}, run {i + 1}", row) for i, row in enumerate(rows)]


def _run(row: Mapping[str, object], where: str) -> Run:
    def given(column: str) -> bool:
        return row.get(column) not in (None, "")

    def number(column: str) -> float:
        try:
            value = float(row.get(column) or "")  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise ScalingError(f"{where}: {column} is {row.get(column)!r}; give a number above zero, or remove the run")
        return value

    expansion = number("expansion") if given("expansion") else 0.0
    if given("total_params"):
        params = number("total_params")
    elif given("d_model") and given("n_blocks") and expansion:
        params = float(total_params(number("d_model"), number("n_blocks"), expansion))
    else:
        raise ScalingError(f"{where}: total_params is empty; fill it in, or d_model, n_blocks and expansion")
    return Run(
        total_params=params,
        tokens=number("tokens"),
        granularity=number("granularity"),
        loss=number("loss"),
        run=str(row["run"]) if given("run") else where,
        seed=str(row["seed"]) if given("seed") else "",
        expansion=expansion,
        context=int(number("context")) if given("context") else 0,
    )
