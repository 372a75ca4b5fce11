"""docs/zoo.md from the results: a summary, one row for each family, and in words why a layer was refused or a graph broke."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from . import families
from .notes import NOTES

NO_REASON = "No reason written yet."

Record = Mapping[str, Any]  # what probe.py writes for one family

HEADER = """\
# The zoo: every MoE family of transformers

Written by `make zoo`; do not edit. Each family is built small from its config with random weights ({layers} layers where the
family allows it, {experts} experts, {tokens} tokens, float32, training mode) and compiled in a process of its own with
`torch.compile(model, backend="moec", options={{"moec.inner": "aot_eager"}})`, forward and backward: once with the experts as
their authors wrote them (`eager`), once with transformers' own `grouped_mm` where the family has it. `a:b` is another
architecture or input of family `a`.

{date} · torch {torch}, transformers {transformers}, Python {python}, {machine} · sources of moec: {moec}

**{summary}.**

- *rewritten*: MoE layers that ran rewritten in one forward, of those that ran.
- *graphs*: graphs that ran in one forward; then the breaks, those in the MoE's own classes + those in the family's other code.
- *error*: the worst of output and all gradients, ||got - ref|| / (2 ||eager - ref|| + 4 eps ||ref||), the reference being eager
  in float64; at most 1 is right. *eager inside*: torch's own `aot_eager` cannot run the family, so moec ran with `eager`.
- *plain*: graphs of torch.compile without moec, with `grouped_mm` experts where there are any: what the family's own code allows.

"""
COLUMNS = (
    "family",
    "model",
    "eager: rewritten",
    "graphs",
    "error",
    "grouped_mm: rewritten",
    "graphs",
    "error",
    "plain",
    "idioms",
)


def failed(record: Record) -> str:
    """What went wrong, if anything did: an error, or a result outside the measure."""
    if record.get("error"):
        return record["error"]
    for p in record["probes"]:
        if p["error"]:
            return f"{p['implementation']}: {p['error']}"
        if p["worst"]["ratio"] > max(1, p["control"] or 0):
            return f"{p['implementation']}: wrong, {p['worst']['ratio']:.3g} times the bound in {p['worst']['name']}"
    return ""


def rewritten(record: Record) -> bool:
    return not record.get("error") and all(p["rewritten"] >= p["layers"] for p in record["probes"])


def whole(record: Record) -> bool:
    return not record.get("error") and all(p["graphs"] == 1 and not p["breaks"] for p in record["probes"])


def refused(record: Record) -> bool:
    return not record.get("error") and any(p["refusals"] for p in record["probes"])


def line(record: Record) -> str:
    """One family in one line, for the terminal."""
    if record.get("error"):
        return f"FAILED: {record['error'].splitlines()[0][:160]}"
    parts = []
    for p in record["probes"]:
        error = "" if p["worst"] is None else f", {p['worst']['ratio']:.2f} of the bound"
        parts.append(f"{p['implementation']}: {p['rewritten']}/{p['layers']} rewritten, {_graphs(p)}{error}")
    bad = failed(record)
    return "; ".join(parts) + (f"; FAILED: {bad.splitlines()[0][:160]}" if bad else "")


def summary(found: Mapping[str, Record]) -> str:
    probes = [p for r in found.values() if not r.get("error") for p in r["probes"]]
    layers, done = sum(p["layers"] for p in probes), sum(min(p["rewritten"], p["layers"]) for p in probes)
    right, full, one = (sum(map(f, found.values())) for f in (lambda r: not failed(r), rewritten, whole))
    share = f"{full / max(len(found), 1):.0%}"
    return (
        f"{len(found)} families, {right} right by the measure; every MoE layer rewritten in {full} ({share}), "
        f"{one} in one graph; over both implementations {done} of {layers} layers rewritten ({done / max(layers, 1):.0%})"
    )


def page(found: Mapping[str, Record]) -> str:
    ok = [r for r in found.values() if not r.get("error")]
    text = HEADER.format(
        layers=families.LAYERS,
        experts=families.E,
        tokens=families.BATCH * families.SEQ,
        date=max((r["date"] for r in ok), default="never"),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}, CPU",
        moec=", ".join(sorted({r["moec"] for r in ok})),
        summary=summary(found),
    )
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(n, r) for n, r in sorted(found.items()))]
    text += "".join("| " + " | ".join(row) + " |\n" for row in rows)
    text += "\n## Refused, broken or wrong\n\n"
    for name, record in sorted(found.items()):
        if not (rewritten(record) and whole(record)) or failed(record) or refused(record):
            text += "\n".join([f"### {name}", "", NOTES.get(name, NO_REASON), "", *_evidence(record), "", ""])
    text += "## Not in the zoo\n\nTheir modeling files speak of experts, and they are not here because:\n\n"
    text += "".join(f"- `{name}` {why}.\n" for name, why in sorted(families.NOT_BUILT.items()))
    return text


def _places(breaks: list[Record]) -> dict[str, Record]:
    """One break for each place: Dynamo tells of one several times, as it takes smaller and smaller pieces of the frame."""
    return {b["where"]: b for b in reversed(breaks)}


def _graphs(probe: Record) -> str:
    places = _places(probe["breaks"]).values()
    ours = sum(b["dispatch"] for b in places)
    breaks = f", {ours} + {len(places) - ours} breaks" if places else ""
    return f"{probe['graphs']} graph{'s' if probe['graphs'] != 1 else ''}{breaks}"


def _row(name: str, record: Record) -> tuple[str, ...]:
    if record.get("error"):
        return (name, *[""] * (len(COLUMNS) - 2), f"failed: {record['error'].splitlines()[0][:80]}")
    cells: list[str] = []
    for p in record["probes"]:
        error = "failed" if p["worst"] is None else f"{p['worst']['ratio']:.2f}"
        if p["worst"] and p["control"] and p["worst"]["ratio"] > 1:
            error += f" ({p['control']:.2f} without moec)"
        error += ", eager inside" if p["inner"] == "eager" else ""
        cells += [f"{p['rewritten']} of {p['layers']}", _graphs(p), error]
    cells += ["", "", ""] * (2 - len(record["probes"]))
    plain = record["plain"]
    places = len(_places(plain["breaks"]))
    breaks = f", breaks in {places}" if places else ""
    idioms = sorted({i for p in record["probes"] for i in p["idioms"]})
    return (name, record["model"], *cells, f"{plain['graphs']}{breaks}", ", ".join(idioms))


def _evidence(record: Record) -> list[str]:
    """What moec itself says, once where both implementations agree."""
    found: dict[str, None] = {}
    if record.get("error"):
        return [f"- failed: {record['error']}"]
    for p in record["probes"]:
        where = f"`{p['implementation']}`"
        found |= {f"- {where} refused, {_short(reason)}": None for _, reason in p["refusals"]}
        found |= {
            f"- {where} breaks at {b['where']}: {_cause(b['reason'])}": None for b in _places(p["breaks"]).values()
        }
        found |= {f"- {where} failed: {p['error']}": None} if p["error"] else {}
    bad = failed(record)
    return [*found, *([f"- {bad}"] if bad else [])]


def _cause(reason: str) -> str:
    """Without how Dynamo went on from there."""
    cause = re.split(r"Graph break encountered: |e\.g\. f\([^)]*\): |torch\._check\*\(\)\. ", reason)[-1]
    return cause.partition(" (unhinted")[0]


def _short(text: str) -> str:
    from .probe import short

    return " ".join(f"({short(word)}" if word.startswith("(/") else word for word in text.split())
