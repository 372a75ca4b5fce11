"""From `*.cpp` to a loaded library: compiled once per (sources, compiler, flags, processor) and user, cached on disk.

The library has a plain C interface and no torch header, so it compiles in seconds and outlives torch's ABI. Its threads are
those of the OpenMP runtime that torch has loaded; a second one in the process would fight over the cores.

A cache entry is the library followed by its SHA-256: loading a truncated one would not fail but kill the process. Entries
are written under another name and renamed, so that processes may build at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from moec import config

log = logging.getLogger("moec")

SOURCES = ("experts.cpp", "forward.h", "backward.h", "call.h", "product.h", "activation.h", "simd.h")
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "f16c")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c", "-mavx2", "-mbmi2"),
)
TIMEOUT = 300  # seconds; it takes ten


class Unavailable(Exception):
    """Why there is no library, in a line."""


def available() -> str | None:
    """None if the kernels can be used here; else why not, in a line. The first call may compile; it never raises."""
    result = _loaded()
    return result if isinstance(result, str) else None


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError where `available()` says why there is none."""
    result = _loaded()
    if isinstance(result, str):
        raise RuntimeError(f"moec's CPU kernels cannot be used: {result}")
    return result


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    try:
        return _load()
    except Unavailable as reason:
        return str(reason)
    except Exception as fault:  # whatever is wrong with this machine, the plain ops still run
        return f"{type(fault).__name__}: {fault}"


def _load() -> ctypes.CDLL:
    if not config.native():
        raise Unavailable("switched off by MOEC_NATIVE")
    _check_processor()
    folder, command = _folder(), [_compiler(), *FLAGS, *_openmp()]
    path = folder / f"{_key(command)}.so"
    if not _intact(path):
        _build(command, path)
    return ctypes.CDLL(str(path))


def _check_processor() -> None:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"written for x86-64 Linux, not for {platform.machine()} {platform.system()}")
    if missing := [f for f in FEATURES if f not in _processor_flags()]:
        raise Unavailable(f"the processor lacks {', '.join(missing)}")


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _compiler() -> str:
    """The one Inductor would use: CXX, or g++."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as fault:
        raise Unavailable(f"no C++ compiler: {str(fault).splitlines()[0]}") from fault


def _openmp() -> tuple[str, ...]:
    """Compile for OpenMP, link the runtime that is loaded already. GNU's and Intel's both have the entry points of GNU's."""
    import torch  # noqa: F401  (loads it)

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libiomp5")):
            return ("-fopenmp", "-Wl,--no-as-needed", path)
    return ("-fopenmp",)


def _folder() -> Path:
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # makes the folder already

        folder = Path(cache_dir()) / "moec"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise Unavailable(f"no cache folder: {fault}") from fault
    return folder


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (*command, _version(command[0]), platform.libc_ver()[1], *FEATURES):
        digest.update(part.encode() + b"\0")
    for name in SOURCES:
        digest.update(_source(name).read_bytes())
    return digest.hexdigest()[:32]


def _source(name: str) -> Path:
    return Path(__file__).parent / name


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT).stdout
    except (OSError, subprocess.SubprocessError) as fault:
        raise Unavailable(f"no C++ compiler: {fault}") from fault


def _intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(command: list[str], path: Path) -> None:
    """Compile into a folder of its own, seal, rename to `path`."""
    log.info("moec: compiling the CPU kernels, once for this machine and version, into %s", path.parent)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            made = Path(folder) / path.name
            run = subprocess.run(
                [command[0], "-o", str(made), str(_source("experts.cpp")), *command[1:]],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            if run.returncode:
                errors = [line for line in run.stderr.splitlines() if "error" in line] or [run.stderr.strip()[-200:]]
                raise Unavailable(f"{command[0]} fails: {errors[0]}")
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError) as fault:
        if not _intact(path):  # else someone else was faster
            raise Unavailable(f"cannot compile into {path.parent}: {fault}") from fault
    with contextlib.suppress(OSError):
        path.chmod(0o755)
