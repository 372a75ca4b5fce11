"""What no placement can beat: lower bounds on the imbalance, from loads and slots alone.

Shape letters: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np

from .published import replicate


def lower_bound(loads_LE: np.ndarray, gpus: int, slots_per_gpu: int) -> np.ndarray:
    """[L] float64: the load of the busiest GPU over the mean is never less, whatever lies where.

    The mean itself is a bound. With spare slots, some copy gets at least max_e w_e / c_e, least for EPLB's greedy
    choice of copies c. With none, every GPU holds exactly C experts. Look at the k hottest: either two of them meet on
    a GPU, which then has at least the k-th and the (k-1)-th and the C - 2 lightest; or they are on k GPUs, which hold k
    (C - 1) more experts, at best the lightest. So for every k the smaller of the two is a bound (k = 1: the hottest
    beside the C - 1 lightest).
    """
    layers, experts = loads_LE.shape
    mean = np.maximum(loads_LE.sum(axis=1), 1e-30) / gpus
    slots = gpus * slots_per_gpu
    if slots > experts:
        per_copy = loads_LE / replicate(loads_LE, slots)[1]
        return np.maximum(1.0, per_copy.max(axis=1) / mean)
    rising = np.sort(loads_LE, axis=1)
    falling = rising[:, ::-1]
    lightest = np.pad(np.cumsum(rising, axis=1), ((0, 0), (1, 0)))  # [L, E + 1]: of none, one, two, ...
    k = np.arange(1, gpus + 1)
    apart = (np.cumsum(falling, axis=1)[:, :gpus] + lightest[:, k * (slots_per_gpu - 1)]) / k
    together = np.full((layers, gpus), np.inf)
    if slots_per_gpu > 1:
        together[:, 1:] = falling[:, : gpus - 1] + falling[:, 1:gpus] + lightest[:, slots_per_gpu - 2, None]
    return np.maximum(1.0, np.minimum(apart, together).max(axis=1) / mean)
