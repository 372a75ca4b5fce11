"""Files of placement: a format name, a version and plain arrays, in npz or JSON. Nothing is ever unpickled.

    write(path, "moec.plan", 1, {"physical_to_logical": array, ...})
    read(path, "moec.plan", 1, {"physical_to_logical": ("i", 2), ...})   ->  the same arrays, checked

A file is written beside its final name and moved there, so that a reader never sees half of one. What cannot be read
(not such a file, truncated, another format, another version, a field that is missing or of another kind) is a
PlacementError that names the file and the field; a file that is not there stays the OSError it is.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import PlacementError

Arrays = dict[str, np.ndarray]
Field = tuple[str, int]  # kinds of numpy dtype ("iu", "f", "U"), number of dimensions

_BROKEN = (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def write(path: str | os.PathLike[str], name: str, version: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays as .npz or .json, by the suffix. Raises PlacementError for any other suffix."""
    path = Path(path)
    if path.suffix not in (".npz", ".json"):
        raise PlacementError(f"{path}: placement files end in .npz or .json; choose one of the two")
    content = {"format": np.array(name), "version": np.array(version), **arrays}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            if path.suffix == ".npz":
                np.savez_compressed(file, allow_pickle=False, **content)
            else:
                file.write(json.dumps({key: value.tolist() for key, value in content.items()}).encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], name: str, version: int, fields: Mapping[str, Field]) -> Arrays:
    """The arrays of a file that `write` made. Raises OSError where there is none, PlacementError where it is not sound."""
    path = Path(path)
    with open(path, "rb") as file:
        try:
            content = _json(file.read()) if path.suffix == ".json" else _npz(file)
        except _BROKEN as error:
            raise PlacementError(
                f"{path} is damaged or no {name} file ({type(error).__name__}: {error}); write it again with save()"
            ) from error
    found = str(content.get("format", np.array("none")))
    if found != name:
        raise PlacementError(f"{path} has format {found!r}; expected {name!r}. Pass a file that moec wrote for this")
    if str(content.get("version")) != str(version):
        raise PlacementError(
            f"{path} has version {content.get('version')}; this moec reads version {version}. "
            "Write it again with this moec, or use the moec that wrote it"
        )
    return {key: _field(path, key, content, kinds, ndim) for key, (kinds, ndim) in fields.items()}


def _npz(file: BinaryIO) -> Arrays:
    archive = np.load(file, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise ValueError("one array, no archive")
    return {key: archive[key] for key in archive.files}


def _json(data: bytes) -> Arrays:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return {str(key): np.array(value) for key, value in content.items()}


def _field(path: Path, key: str, content: Arrays, kinds: str, ndim: int) -> np.ndarray:
    if key not in content:
        raise PlacementError(f"{path} lacks the field {key!r}; it has {', '.join(sorted(content))}")
    array = content[key]
    if array.size == 0 and array.dtype.kind == "f":  # an empty JSON list has no type of its own
        array = array.astype("U" if kinds == "U" else "i8" if "i" in kinds else "f8")
    if "f" in kinds and array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if array.dtype.kind not in kinds or array.ndim != ndim:
        raise PlacementError(
            f"{path}: {key!r} is {array.dtype} with {array.ndim} dimensions; expected {ndim} dimensions of kind {kinds!r}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PlacementError(f"{path}: {key!r} holds values that are not finite")
    return array
