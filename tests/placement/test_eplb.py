"""Our EPLB against the published example and against hand-computed steps of its contract."""

from __future__ import annotations

import numpy as np
import pytest

from moec.placement import PlacementError, eplb_slots
from moec.placement.published import pack, replicate

# The example of https://github.com/deepseek-ai/EPLB, README: two layers, 12 experts in 4 groups, 16 slots, 2 nodes, 8 GPUs.
LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_published_example() -> None:
    assert eplb_slots(LOADS, 16, 4, 2, 8).tolist() == PUBLISHED


def test_groups_that_do_not_divide_make_it_global() -> None:
    assert np.array_equal(eplb_slots(LOADS, 16, 3, 2, 8), eplb_slots(LOADS, 16, 1, 1, 8))


def test_replicate_by_hand() -> None:
    """10, 6, 2: the first copy goes to 10 (5 each), the second to 6 (3 each), the third to 10 (3.3 each)."""
    expert, copies = replicate(np.array([[10.0, 6.0, 2.0]]), 6)
    assert expert.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert copies.tolist() == [[3, 2, 1]]


def test_pack_by_hand() -> None:
    """9 to the first, 8 and then 5 to the second, which is full; 4 to the first."""
    assert pack(np.array([[4.0, 9.0, 8.0, 5.0]]), 2).tolist() == [[[1, 0], [2, 3]]]
    assert pack(np.array([[4.0, 9.0]]), 2).tolist() == [[[0], [1]]]


@pytest.mark.parametrize(
    ("slots", "groups", "nodes", "gpus"), [(15, 4, 2, 8), (16, 5, 1, 8), (8, 4, 2, 8), (18, 4, 4, 6)]
)
def test_sizes_it_does_not_take(slots: int, groups: int, nodes: int, gpus: int) -> None:
    with pytest.raises(PlacementError, match="EPLB wants"):
        eplb_slots(LOADS, slots, groups, nodes, gpus)
