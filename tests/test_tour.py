"""The documents are true: their blocks run and print what they say, and what they list is what there is.

MOEC_UPDATE_DOCS=1 pytest tests/test_tour.py     writes what the blocks print into the documents

A ```python block may be followed by a ```text block, which is what it prints. All blocks of a document share one namespace. They
are compiled under the document's name and line numbers, so "tour.md:39" in an output is a line of the tour.
"""

import contextlib
import io
import linecache
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import nn

from moec import ops, schedule
from moec.config import Options
from moec.models import IDIOMS
from moec.ops import experts
from moec.passes import idioms

from . import layers

ROOT = Path(__file__).resolve().parent.parent
UPDATE = bool(os.environ.get("MOEC_UPDATE_DOCS"))
DOCUMENTS = ["docs/tour.md", "docs/adding-an-idiom.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A python block, the line of its first statement, and the span of the output that follows (None: prints nothing)."""

    code: str
    line: int
    output: tuple[int, int] | None


def blocks(text: str) -> Iterator[Block]:
    found = list(FENCE.finditer(text))
    for block, following in zip(found, [*found[1:], None]):
        if block[1] != "python":
            continue
        between = text[block.end() : following.start()] if following else "."
        output = following.span(2) if following and following[1] == "text" and not between.strip() else None
        yield Block(block[2], text.count("\n", 0, block.start(2)) + 1, output)


def normalised(printed: str) -> str:
    """Without what differs between machines: paths, addresses, trailing blanks."""
    printed = re.sub(r"(/[\w.+-]+)+/(?=(docs|tests|passes|moec|models)/)", "", printed)
    printed = re.sub(r"0x[0-9a-f]{6,}", "0x...", printed)
    printed = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")
    return printed + "\n" if printed else ""


def run(name: str, text: str, namespace: dict[str, object]) -> list[tuple[Block, str]]:
    """Every block, in order, with what it printed."""
    # Tracebacks, and what Dynamo notes about a line, are looked up here.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    results = []
    for block in blocks(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
        results.append((block, normalised(printed.getvalue())))
    return results


def updated(text: str, results: list[tuple[Block, str]]) -> str:
    for block, printed in reversed(results):
        if block.output:
            text = text[: block.output[0]] + printed + text[block.output[1] :]
    return text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document(name: str) -> None:
    path = ROOT / name
    text = path.read_text()
    results = run(name, text, {"__name__": "__main__"})
    assert len(results) > 2
    if UPDATE:
        while (new := updated(text, results)) != text:  # longer outputs move the lines that later outputs name
            text, results = new, run(name, new, {"__name__": "__main__"})
        path.write_text(text)
        return
    # The names of nodes are Dynamo's. The documents show those of the version that constraints.txt pins.
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned and not torch.__version__.startswith(pinned[1] + "."):
        pytest.skip(f"the blocks ran; what they print is only compared under torch {pinned[1]}")
    for block, printed in results:
        expected = text[slice(*block.output)] if block.output else ""
        assert printed == expected, f"{name}:{block.line} prints something else; MOEC_UPDATE_DOCS=1 rewrites it"


def test_the_harness_itself() -> None:
    text = "# A\n\n```python\nx = 1\nprint('/a/b/docs/c.md', hex(2**40))\n```\n```text\nold\n```\n"
    text += "\n```python\nx += 1\n```\nand\n```text\nno output\n```\n"
    (first, printed), (second, nothing) = run("docs/nowhere.md", text, {})
    assert (first.line, text[slice(*first.output or (0, 0))]) == (4, "old\n")
    assert printed == "docs/c.md 0x...\n"
    assert (second.output, nothing) == (None, "")
    with pytest.raises(ZeroDivisionError) as error:
        run("docs/nowhere.md", "# B\n\n```python\n1 / 0\n```\n", {})
    assert (Path(error.traceback[-1].path).name, error.traceback[-1].lineno + 1) == ("nowhere.md", 4)


# -- What is listed is what there is -----------------------------------------------------------------------------------------


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


README, DESIGN = (ROOT / "README.md").read_text(), (ROOT / "docs/design.md").read_text()


@pytest.mark.parametrize("text", [README, DESIGN], ids=["README", "design"])
def test_options_are_all_of_them(text: str) -> None:
    listed = re.findall(r"^\| `moec\.(\w+)` \| (.*?) \|", section(text, "Options"), re.MULTILINE)
    assert [name for name, _ in listed] == [f.name for f in fields(Options)]
    defaults = {name: re.search(r"`(.*?)`", cell) for name, cell in listed}
    assert {name: eval(m[1]) if m else None for name, m in defaults.items()} == vars(Options())


def test_schemas_are_those_of_the_ops() -> None:
    listed = dict(re.findall(r"^    moec::(\w+)(\(.*)$", section(DESIGN, "The ops"), re.MULTILINE))
    assert listed == {**ops.OPS, "experts": experts.SCHEMAS["experts"]}


def test_files_exist() -> None:
    """Every path that a document names in backquotes."""
    for name in ("README.md", "docs/design.md", *DOCUMENTS):
        text = (ROOT / name).read_text()
        for path in re.findall(r"`((?:moec|passes|models|tests|docs|examples|benchmarks)/[\w/.-]*)`", text):
            assert (ROOT / path).exists(), f"{name} names {path}"


def test_every_file_of_the_house_is_on_the_map() -> None:
    house = section(DESIGN, "The house")
    for folder in ("moec", "moec/capture", "moec/kernels", "moec/ops", "moec/schedule", "passes", "passes/idioms"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or re.search(rf"\b{path.stem}\b", house), f"{path.relative_to(ROOT)}"


def test_names_that_are_listed() -> None:
    assert set(re.findall(r"`models/(\w+)\.py`", section(README, "What it recognizes"))) == set(IDIOMS)
    assert {i.__name__.rsplit(".", 1)[-1] for i in idioms.IDIOMS} == {"loop", "slots", "dense"}, (
        "the document lists them"
    )
    for strategy in schedule.STRATEGIES:
        assert f"`{strategy.name}`" in DESIGN, strategy.name


def test_readme_runs() -> None:
    """The blocks of the README, in order, on layers of the kinds it speaks of."""
    layer, x = layers.build("static_where", torch.float32), layers.tokens(17, torch.float32)
    program = torch.export.export(layers.build("one_hot", torch.float32), (x,))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Module() for _ in range(4))
            self.layers[3].mlp = layer

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return layer(input_ids)

    namespace: dict[str, object] = {"model": Decoder(), "ids": x, "gm": program.module(), "example_inputs": (x,)}
    assert len(run("README.md", README, namespace)) >= 4
    assert [s.status for s in namespace["sites"]] == ["rewritten"]  # type: ignore[attr-defined]
    assert namespace["report"].graph_breaks == 0  # type: ignore[attr-defined]
