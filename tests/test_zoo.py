"""The zoo (`make zoo`, benchmarks/zoo) covers what it says. That is cheap; running all of it is not, and is not done here."""

import re
from pathlib import Path

import pytest

from benchmarks.zoo import build, families, probe, table

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"


def test_every_family_is_built_or_listed() -> None:
    """What the scan of transformers' sources finds, and no more: a new release with a new family fails here."""
    built = {build.folder(name) for name in families.FAMILIES}
    assert not built & families.NOT_BUILT.keys()
    assert built | families.NOT_BUILT.keys() == build.scan().keys()


def test_scan_knows_decorated_experts() -> None:
    found = build.scan()
    assert found["mixtral"]
    assert not found["llama4"]
    assert sum(found.values()) >= 50
    assert all(found[build.folder(name)] == build.decorated(name) for name in families.FAMILIES)


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_probes_a_family(name: str) -> None:
    record = probe.probe(name)
    assert not table.failed(record), table.line(record)
    assert table.rewritten(record)
    assert table.whole(record)
    assert [p["implementation"] for p in record["probes"]] == ["eager", "grouped_mm"][: 1 + build.decorated(name)]
    assert all(p["layers"] == families.LAYERS and p["inner"] == "aot_eager" for p in record["probes"])


def test_page_says_what_the_families_are() -> None:
    """Every family has a row, whatever became of it, and a reason where it is not rewritten whole."""
    text = PAGE.read_text()
    rows = re.findall(r"^\| ([a-z]\S*) \|", text, re.M)
    assert rows == ["family", *sorted(families.FAMILIES)]
    assert all(f"- `{name}` " in text for name in families.NOT_BUILT)
    assert table.NO_REASON not in text
    assert f"**{len(families.FAMILIES)} families" in text
