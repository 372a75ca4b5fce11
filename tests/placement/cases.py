"""What the tests of placement share: traces, clusters, random statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from moec.placement import RoutingStats, topology

DATA = Path(__file__).parent / "data" / "routing_traces.npz"
FOUR_BY_FOUR = topology("h100", nodes=4, gpus_per_node=4)


def halves(domain: str) -> tuple[np.ndarray, np.ndarray]:
    """[26, T, 6] of the first and of the second half of the domain's sequences."""
    with np.load(DATA, allow_pickle=False) as traces:
        topk, lengths = traces[f"{domain}_topk"], traces[f"{domain}_sequence_lengths"]
    cut = int(lengths[: len(lengths) // 2].sum())
    return topk[:, :cut], topk[:, cut:]


def random_topk(layers: int, tokens: int, top_k: int, experts: int, seed: int) -> np.ndarray:
    """[L, T, K] distinct ids per token, some experts far hotter than others."""
    rng = np.random.default_rng(seed)
    heat = rng.gumbel(size=(layers, tokens, experts)) + rng.normal(0, 1.5, size=(layers, 1, experts))
    return np.argsort(-heat, axis=2)[:, :, :top_k]


@st.composite
def requests(draw: st.DrawFn) -> tuple[RoutingStats, int, int, int, float]:
    """(statistics, nodes, GPUs per node, slots per GPU, traffic): E need not divide, E may be below G, slots may exceed E."""
    experts = draw(st.integers(1, 20))
    nodes, gpus = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    least = -(-experts // (nodes * gpus))
    slots = draw(st.integers(least, least + 3))
    tokens = draw(st.sampled_from([1, 7, 400]))
    topk = random_topk(2, tokens, min(experts, draw(st.integers(1, 4))), experts, draw(st.integers(0, 99)))
    return RoutingStats.from_topk(topk, experts), nodes, gpus, slots, draw(st.sampled_from([0.0, 0.5, 1.0]))
