"""Imports go one way: a module imports its own layer and those below it. `models` imports torch alone.

The layers are those of docs/design.md. An import inside a function counts too; one under `if TYPE_CHECKING:` does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A package stands for everything in it.
LAYERS = (
    ("errors", "config", "ir", "granularity"),
    ("fx", "ops"),
    ("capture", "schedule", "kernels", "placement", "models"),
    ("passes",),
    ("pipeline", "report", "verify", "parallel"),
    ("backend", "declaration", "nn"),
    ("scaling", "testing", "cli", "inspect"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def sources() -> list[Path]:
    """Every module under the name it is imported by: moec/passes and moec/models are links."""
    found = []
    for path in sorted((ROOT / "moec").iterdir()):
        found += [path] if path.suffix == ".py" else sorted(path.rglob("*.py")) if path.is_dir() else []
    return [p for p in found if p != ROOT / "moec" / "__init__.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything imported, except for the benefit of type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = module.split(".") if is_package else module.split(".")[:-1]
            base = anchor[: len(anchor) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node, module, is_package)


def violations(path: Path) -> list[str]:
    module = module_name(path)
    part = module.split(".")[1]
    if part not in RANK:
        return [f"{module} is in no layer; add {part!r} to LAYERS in {Path(__file__).name}"]
    found = []
    for line, name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}: {module} imports {name}"
        if part == "models":
            if name.split(".")[:2] != ["moec", "models"] and top not in (
                "torch",
                "collections",
                "typing",
                "__future__",
            ):
                found.append(f"{where}; models import torch alone")
        elif top in ("passes", "models", "tests"):
            found.append(f"{where}; say moec.{top}" if top != "tests" else f"{where}; tests are not part of moec")
        elif top == "moec" and RANK.get(target, -1) > RANK[part]:
            found.append(f"{where}, which is above it")
    return found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert not violations(path), "\n".join(violations(path))


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("moec/ir.py", "from moec.fx import graph", "above"),
        ("moec/ir.py", "def f():\n    from .passes.roll import roll", "above"),
        ("moec/passes/facts.py", "from ..pipeline import Pass", "above"),
        ("moec/passes/facts.py", "from passes import roll", "say moec.passes"),
        ("moec/models/one_hot.py", "import numpy", "torch alone"),
        ("moec/unheard_of.py", "", "in no layer"),
        ("moec/passes/facts.py", "from . import roll\nfrom ..ir import Site\nfrom moec.errors import MoecError", None),
        ("moec/ir.py", "if TYPE_CHECKING:\n    from moec.passes import roll", None),
    ],
)
def test_the_rule_itself(
    module: str, code: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = violations(path)
    assert (not found) if expected is None else (len(found) == 1 and expected in found[0])
