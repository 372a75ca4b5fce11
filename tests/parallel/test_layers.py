"""One layer in float64: every way to write a dispatch, ranks and experts without tokens, experts that do not divide."""

from typing import Any

import pytest

from . import cases, ranks

EAGER = {"inner": "eager"}
CASES: list[dict[str, Any]] = [
    {"kind": "skip_empty", "counts": [7, 4], "plan": "copies", "dispatcher": "all-gather"},
    {"kind": "hit_modules", "counts": [5, 0], "plan": "copies", "dispatcher": "all-to-all"},
    {"kind": "hit_stacked", "counts": [0, 5], "plan": "random", "dispatcher": "all-gather"},
    {"kind": "hit_stacked", "counts": [6, 6], "dispatcher": "all-to-all", "prepare": "on two experts"},
    {"kind": "hit_stacked", "counts": [1, 6], "dispatcher": "all-to-all", "changes": {"num_experts": 7}},
    {"kind": "hit_stacked", "counts": [4, 3], "plan": "copies", "changes": {"body": "interleaved"}, **EAGER},
    {"kind": "skip_empty", "counts": [1, 6], "changes": {"num_experts": 7}, "prepare": "on two experts", **EAGER},
    {"kind": "grouped_mm", "counts": [7, 4], "plan": "random", **EAGER},
    {"kind": "batched_mm", "counts": [7, 4], "plan": "random", **EAGER},
    {"kind": "dense_loop", "counts": [7, 4], "plan": "random", **EAGER},
    {"kind": "dense_stacked", "counts": [7, 4], "plan": "random", **EAGER},
    # every rank compiles when its own size is new
    {
        "kind": "hit_stacked",
        "counts": [7, 4],
        "more": [[5, 4], [9, 0], [1, 3], [8, 8]],
        "dispatcher": "all-to-all",
    },
    {"kind": "moec.nn", "counts": [4, 9], "more": [[5, 4], [9, 1]], "dispatcher": "all-gather", "inner": "inductor"},
    {"kind": "moec.nn", "counts": [0, 6], "dispatcher": "all-gather", "inner": "inductor"},
    {
        "kind": "moec.nn",
        "counts": [5, 6],
        "plan": "copies",
        "dispatcher": "all-to-all",
        "changes": {"gated": True, "bias": True, "activation": "silu", "shared_experts": 1},
    },
    {"kind": "moec.nn", "counts": [4, 4], "changes": {"capacity_factor": 8.0, "output_norm": False}, **EAGER},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{c.get('plan')}-{c['counts'][0]}-{c['counts'][1]}")
def test_two_ranks(case: dict[str, Any]) -> None:
    for found in ranks.run(2, cases.one_layer, **case):
        assert all(share < 0.9 for share in found["shares"].values()), found
        assert sum(found["ran"].values()) > 0
