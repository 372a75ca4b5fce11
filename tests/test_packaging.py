"""What a person gets from `pip install`: links followed, entry point in place, bare imports refused."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_imports_from_anywhere(tmp_path: Path) -> None:
    """The editable install, from a folder that is not the repository."""
    done = python("import moec, moec.passes, moec.models; print(moec.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "moec" / "__init__.py"


@pytest.mark.parametrize("name", ["passes", "models"])
def test_bare_import_names_the_right_one(name: str) -> None:
    done = python(f"import {name}", ROOT)
    assert done.returncode == 1
    assert f"ImportError: these are moec's {'passes' if name == 'passes' else 'reference models'}" in done.stderr
    assert f"say `from moec.{name} import ...`" in done.stderr


@pytest.mark.parametrize("name", ["passes", "models"])
def test_links_are_relative(name: str) -> None:
    assert os.readlink(ROOT / "moec" / name) == f"../{name}"


def test_import_is_cheap(tmp_path: Path) -> None:
    done = python("import sys, moec; sys.exit('torch' in sys.modules)", tmp_path)
    assert done.returncode == 0, "import moec loaded torch"


def test_unknown_name(tmp_path: Path) -> None:
    done = python("import moec; moec.explian", tmp_path)
    assert "AttributeError: module 'moec' has no attribute 'explian'; it has explain, rewrite" in done.stderr


def test_entry_point() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="moec")
    assert found.value == "moec.backend:backend"


def test_wheel_contains_everything(tmp_path: Path) -> None:
    """Built without isolation and dependencies, so without a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    # a copy, so that the build leaves nothing behind in the repository
    source = tmp_path / "source"
    tracked = ["pyproject.toml", "README.md", "moec", "passes", "models"]
    source.mkdir()
    subprocess.run(["cp", "-a", *[str(ROOT / name) for name in tracked], str(source)], check=True)
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("moec-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"moec/py.typed"} | {
        f"moec/{path.relative_to(ROOT / top) if top == 'moec' else path.relative_to(ROOT)}"
        for top in ("moec", "passes", "models")
        for path in (ROOT / top).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert expected <= names
    assert not [name for name in names if name.startswith(("passes", "models", "tests"))]

    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    done = python("import moec.passes, moec.models.one_hot as m; print(m.__file__)", tmp_path, PYTHONPATH=str(unpacked))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(unpacked / "moec" / "models" / "one_hot.py")
