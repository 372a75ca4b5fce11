"""Fits on disk: the JSON that `moec fit --out` writes and `moec plan --coefficients` reads.

    {"coefficients": {"a": ..., "alpha": ..., "b": ..., "beta": ..., "g": ..., "gamma": ..., "c": ..., "expansion": 8},
     "measured": {"total_params": [low, high], "tokens": [low, high], "granularity": [low, high], "context": 128}, ...}

`measured` may be missing (then the ranges of the published runs are assumed), and the seven numbers may stand at the top. Files
are written to a temporary name, flushed to the disk and renamed: a reader, or a machine that loses power, sees all or nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from moec.scaling.errors import ScalingError
from moec.scaling.law import PAPER_RUNS, Coefficients, Measured

_NUMBERS = ("a", "alpha", "b", "beta", "g", "gamma", "c")


def write_atomic(path: str | Path, data: bytes) -> None:
    """All or nothing, and on the disk when this returns: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: str | Path, data: Mapping[str, object]) -> None:
    """Indented JSON, atomically. Infinite and undefined numbers become null."""
    write_atomic(path, (json.dumps(plain(data), indent=2) + "\n").encode())


def plain(value: object) -> object:
    """`value` as JSON has it: tuples are lists, numbers that JSON cannot write are null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_coefficients(path: str | Path) -> Coefficients:
    """A fit from its JSON. Raises ScalingError for a missing or impossible value, OSError for a file that is not there."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as bad:
        raise ScalingError(f"{path} is not JSON ({bad}); give a file that moec fit --out wrote") from bad
    data = data if isinstance(data, dict) else {}
    values = data.get("coefficients", data)
    wrong = [name for name in _NUMBERS if not _finite(values.get(name))]
    if wrong:
        raise ScalingError(f"{path} has no finite number for {', '.join(wrong)}; the law needs {', '.join(_NUMBERS)}")
    if min(values["alpha"], values["beta"], values["gamma"], values["a"], values["a"] + values["g"], values["b"]) <= 0:
        raise ScalingError(
            f"{path}: alpha, beta, gamma, a, a + g and b have to be above zero; correct the file or fit again"
        )
    expansion = values.get("expansion")
    return Coefficients(
        **{name: float(values[name]) for name in _NUMBERS},
        name=Path(path).name,
        expansion=float(expansion) if _finite(expansion) else 0.0,
        source=str(path),
        measured=_measured(data.get("measured"), path),
    )


def _measured(data: object, path: str | Path) -> Measured:
    if data is None:
        return PAPER_RUNS
    try:
        ranges = {n: tuple(map(float, data[n])) for n in ("total_params", "tokens", "granularity")}  # type: ignore[index]
        context = data.get("context")  # type: ignore[attr-defined]
        (n0, n1), (d0, d1), (g0, g1) = ranges["total_params"], ranges["tokens"], ranges["granularity"]
    except (KeyError, TypeError, ValueError, AttributeError) as bad:
        raise ScalingError(
            f'{path}: "measured" is not as moec fit writes it ({bad!r}); remove it or fit again'
        ) from bad
    return Measured((n0, n1), (d0, d1), (g0, g1), int(context) if _finite(context) else None)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
