"""The law, its coefficient sets and what a model of the paper's shape costs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moec.scaling import (
    PUBLISHED,
    ScalingError,
    compute_ratio,
    conventions,
    for_expansion,
    loss,
    published,
    read_coefficients,
)
from moec.scaling.costs import Costs, active_params, flops_per_token, total_params
from tests.scaling.paper import TABLE_2, Row


@pytest.mark.parametrize("row", TABLE_2, ids=lambda r: f"{r.active_params:g}")
def test_the_rows_of_table_2_put_in(row: Row) -> None:
    """N, D, G of the table give its loss and its FLOPs, with nothing optimized."""
    d = (row.active_params * 64 / 12) ** (1 / 3)
    n = total_params(d, d / 64, 64)
    assert loss(published("e64"), float(n), row.tokens, row.granularity) == pytest.approx(row.loss, abs=0.004)
    flops = row.tokens * flops_per_token(d, d / 64, 64, row.granularity, Costs())
    assert flops == pytest.approx(row.flops, rel=0.005)


def test_total_parameters_are_43_times_the_active_ones_at_64() -> None:
    for expansion, ratio in ((64, 43), (16, 11), (1, 1)):
        assert total_params(512, 8, expansion) / active_params(512, 8) == pytest.approx(ratio)


def test_break_even_of_a_doubling() -> None:
    """What shared/research/law.md states, from the coefficients as printed in the paper."""
    for name, percents in (("e64-rounded", (35.6, 23.3, 15.4, 10.2, 6.8, 4.5)), ("e16", (25.8, 12.6, 6.2, 3.1))):
        for i, percent in enumerate(percents):
            assert 100 * (compute_ratio(published(name), 2**i, 2 ** (i + 1)) - 1) == pytest.approx(percent, abs=0.06)
    assert compute_ratio(published("e64-rounded"), 1, 16) == pytest.approx(2.13, abs=0.005)
    assert compute_ratio(published("e64-rounded"), 1, math.inf) == pytest.approx(2.60, abs=0.005)
    assert compute_ratio(published("e16"), 1, math.inf) == pytest.approx(1.60, abs=0.005)


def test_the_nearest_expansion_is_chosen() -> None:
    assert [for_expansion(e).name for e in (64, 128, 40, 16, 8, 1)] == ["e64", "e64", "e64", "e16", "e16", "e16"]


def test_every_set_has_a_source_and_a_name_of_its_own() -> None:
    assert len({law.name for law in PUBLISHED}) == len(PUBLISHED) == 5
    assert all("2402.07871" in law.source or "llm-random" in law.source for law in PUBLISHED)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ScalingError, match="e64, e64-rounded"):
        published("e32")


def test_loss_broadcasts() -> None:
    assert loss(published("e64"), np.array([[1e9], [2e9]]), 1e10, np.array([1.0, 2.0, 4.0])).shape == (2, 3)


def test_conventions_of_granularity() -> None:
    """Qwen3-30B-A3B: d_model 2048, d_expert 768."""
    names = conventions(2048, 768)
    assert (names.paper, names.leverage, names.sonic) == pytest.approx((10.67, 5.33, 2.67), abs=0.01)
    with pytest.raises(ScalingError, match="d_expert"):
        conventions(2048, 0)


GOOD = {"a": 18, "alpha": 0.1, "b": 30, "beta": 0.1, "g": 2, "gamma": 0.5, "c": 0.5}


def test_coefficients_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    measured = {"total_params": [1e5, 1e6], "tokens": [1e6, 2e6], "granularity": [1, 4], "context": 128}
    path.write_text(json.dumps({"coefficients": GOOD | {"expansion": 8}, "measured": measured}))
    law = read_coefficients(path)
    assert (law.alpha, law.expansion, law.measured.granularity, law.measured.context) == (0.1, 8, (1, 4), 128)
    path.write_text(json.dumps(GOOD))
    assert read_coefficients(path).expansion == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "no finite number for a, alpha"),
        (json.dumps(GOOD | {"beta": None}), "no finite number for beta"),
        (json.dumps(GOOD | {"alpha": -0.1}), "above zero"),
        (json.dumps(GOOD | {"g": -20}), "above zero"),
        (json.dumps(GOOD | {"measured": {"tokens": 3}}), "remove it or fit again"),
    ],
)
def test_a_file_that_is_no_fit(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(text)
    with pytest.raises(ScalingError, match=reason):
        read_coefficients(path)
