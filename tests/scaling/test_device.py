"""Measured tables: reading, interpolating, the break-even rule, plans in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest

from moec.scaling import Budget, Costs, Device, LayerTime, ScalingError, doublings, plan, published, read_device
from moec.scaling.device import measured_granularities, seconds_per_token
from moec.scaling.limits import device_doubts

E64 = published("e64")
RATE = 1e12


def layer(d: int, g: int, slower: float = 1.0, expansion: int = 64) -> LayerTime:
    """A layer that does its FLOPs at RATE, `slower` times slower."""
    return LayerTime(d, 4 * d // g, g * expansion, g, slower * 6 * 8 * d**2 / RATE)


def device(slower: dict[int, float], widths: tuple[int, ...] = (256, 1024)) -> Device:
    return Device("test", tuple(layer(d, g, s) for d in widths for g, s in slower.items()), RATE)


def test_a_machine_without_overhead_prices_tokens_as_flops_without_routing() -> None:
    even = device({1: 1.0, 4: 1.0})
    for d, g in ((256.0, 1), (700.0, 2), (5000.0, 4)):
        assert seconds_per_token(even, d, 64, g, Costs()) == pytest.approx(6 * 12 * d**2 * d / 64 / RATE)
    free = plan(E64, Budget(flops=1e20), 64, Costs(routing=0.0), granularities=(1.0, 2.0, 4.0))
    found = plan(E64, Budget(flops=1e20), 64, device=even)
    assert (found.granularity, found.d_model) == pytest.approx((free.granularity, free.d_model), rel=1e-6)


def test_a_budget_in_seconds_is_spent() -> None:
    found = plan(E64, Budget(seconds=3600.0), 64, device=device({1: 1.0, 2: 1.1, 4: 1.3}))
    assert found.seconds == pytest.approx(3600.0)


def test_between_layers_the_rate_is_interpolated() -> None:
    measured = device({1: 1.0, 4: 4.0})
    between = float(seconds_per_token(measured, 256.0, 64, 2, Costs()))
    assert between == pytest.approx(6 * 256**2 * 4 * (8 * 2 + 4) / RATE)


def test_break_even() -> None:
    """The slowdown counts the whole model: at twice the time for the layer, a token takes (8 * 2 + 4) / 12 of before."""
    steps = doublings(device({1: 1.0, 2: 2.0, 4: 2.1}), E64, 512.0, 64, Costs(), (1.0, 2.0, 4.0))
    assert [s.slowdown for s in steps] == pytest.approx([20 / 12 - 1, (8 * 2.1 + 4) / 20 - 1])
    assert [s.allowed for s in steps] == pytest.approx([0.356, 0.233], abs=0.002)
    assert [s.pays for s in steps] == [False, True]


def test_the_plan_stops_where_the_machine_eats_the_gain() -> None:
    assert plan(E64, Budget(seconds=1e6), 64, device=device({1: 1.0, 2: 1.05, 4: 1.1, 8: 2.0})).granularity == 4
    assert plan(E64, Budget(seconds=1e6), 64, device=device({1: 1.0, 2: 2.0, 4: 4.0})).granularity == 1


def test_only_what_was_measured_is_planned_and_said() -> None:
    small = device({1: 1.0, 2: 1.0}, widths=(64, 128))
    assert measured_granularities(small, 64) == (1.0, 2.0)
    found = plan(E64, Budget(flops=1e20), 16, device=small)
    assert found.granularity == 2
    texts = " | ".join(device_doubts(found, small))
    for part in ("measured at E = 64, not 16", "outside the widths measured", "finest in the table"):
        assert part in texts
    one = Device("test", (layer(256, 4),), RATE)
    assert "only G = 4" in " ".join(device_doubts(plan(E64, Budget(flops=1e18), 64, device=one), one))


def test_the_nearest_expansion_is_used() -> None:
    mixed = Device("test", (layer(256, 1, 1.0, expansion=8), layer(256, 1, 3.0, expansion=64)), RATE)
    slow, fast = (float(seconds_per_token(mixed, 256.0, e, 1, Costs())) for e in (64, 6))
    assert slow / fast == pytest.approx((8 * 3 + 4) / 12)


ROW = {"d_model": 256, "d_expert": 512, "num_experts": 16, "top_k": 2, "tokens_per_second": 1000.0}


def test_json_and_csv_say_the_same(tmp_path: Path) -> None:
    whole, csv = tmp_path / "m.json", tmp_path / "m.csv"
    whole.write_text(json.dumps({"machine": "mine", "rows": [ROW]}))
    csv.write_text("d_model,d_expert,num_experts,top_k,seconds_per_token\n256,512,16,2,0.001\n")
    assert read_device(whole).rows == read_device(csv).rows == (LayerTime(256, 512, 16, 2, 0.001),)
    assert read_device(whole).machine == "mine"
    (row,) = read_device(csv).rows
    assert (row.granularity, row.expansion) == (2, 8)
    assert np.isclose(row.rate(Costs()), 6 * 2 * 256 * 512 * 2 / 0.001)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "is not JSON"),
        ("{}", "no rows"),
        ("[3]", "row 1 is not an object"),
        (json.dumps([ROW | {"d_expert": "wide"}]), "row 1: d_expert is 'wide'"),
        (json.dumps([ROW, ROW | {"tokens_per_second": -1}]), "row 2: tokens_per_second"),
        (json.dumps([ROW | {"top_k": 32}]), "more than num_experts"),
        (json.dumps({"flops_per_second": 0, "rows": [ROW]}), "flops_per_second is 0"),
    ],
)
def test_a_table_that_cannot_be_used(data: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(data)
    with pytest.raises(ScalingError, match=reason):
        read_device(path)


def test_a_gap_in_a_csv_table(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("d_model,d_expert,num_experts,top_k,tokens_per_second\n256,512,,2,1000\n")
    with pytest.raises(ScalingError, match="row 1: num_experts is ''"):
        read_device(path)
