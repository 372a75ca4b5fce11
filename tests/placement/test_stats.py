"""What is counted, and what the topology makes of a graph."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

from moec.placement import Link, PlacementError, Recorder, RoutingStats, topology

from .cases import random_topk


def test_counts_and_coactivation_by_hand() -> None:
    """Tokens {0, 1}, {0, 2}, {0, 1}; a dropped slot and an id twice count as what they are."""
    stats = RoutingStats.from_topk(np.array([[[0, 1], [2, 0], [1, 0], [3, -1], [3, 3]]]), num_experts=4)
    assert stats.counts.tolist() == [[[3, 2, 1, 3]]]
    assert stats.coactivation.tolist() == [[[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]]]
    assert stats.tokens.tolist() == [5]


def test_windows_and_samples() -> None:
    topk = random_topk(2, 100, 3, 8, 0)
    whole, cut = RoutingStats.from_topk(topk, 8), RoutingStats.from_topk(topk, 8, windows=3, sample=20)
    assert cut.counts.shape == (3, 2, 8)
    assert np.array_equal(cut.counts.sum(axis=0), whole.counts[0])
    assert 15 <= cut.tokens.min() <= cut.tokens.max() <= 24
    assert cut.windows == ("window0", "window1", "window2")


def test_recording_is_from_topk() -> None:
    topk = random_topk(2, 90, 3, 8, 1)
    recorder = Recorder(2, 8)
    for part in np.split(topk, 3, axis=1):
        for layer in range(2):
            recorder.accumulate(layer, torch.from_numpy(part[layer]).reshape(5, 6, 3))  # [batch, sequence, K]
    stats, whole = recorder.stats(), RoutingStats.from_topk(topk, 8)
    assert np.array_equal(stats.counts, whole.counts)
    assert np.array_equal(stats.coactivation, whole.coactivation)


def test_recording_forgets_ids_that_are_no_expert_and_takes_no_tokens() -> None:
    recorder = Recorder(1, 4, sample=0)
    recorder.accumulate(0, torch.tensor([[0, 9], [-1, 4], [3, 3]]))
    recorder.accumulate(0, torch.empty(0, 2, dtype=torch.int64))
    stats = recorder.stats()
    assert stats.counts.tolist() == [[[1, 0, 0, 2]]]
    assert not stats.coactivation.any()


def test_merge() -> None:
    topk = random_topk(2, 60, 3, 8, 2)
    a, b = RoutingStats.from_topk(topk[:, :20], 8), RoutingStats.from_topk(topk[:, 20:], 8, name="later")
    both, whole = a.merge(b), RoutingStats.from_topk(topk, 8)
    assert both.windows == ("window0", "later0")
    assert np.array_equal(both.loads(), whole.loads())
    assert np.array_equal(both.coactivation, whole.coactivation)
    with pytest.raises(PlacementError, match="merge those of one model only"):
        a.merge(RoutingStats.from_topk(topk, 9))


def test_ranks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(1, 4)
    recorder.accumulate(0, torch.tensor([[0, 1]]))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(3))
    stats = recorder.stats(reduce=True)
    assert stats.counts.tolist() == [[[3, 3, 0, 0]]]
    assert stats.tokens.tolist() == [3]
    assert recorder.stats().counts.tolist() == [[[1, 1, 0, 0]]]  # what this rank holds stays its own


@pytest.mark.parametrize(
    ("topk", "reason"),
    [
        (np.zeros((2, 3)), "layers, tokens, top-k"),
        (np.zeros((0, 1, 1)), "none of them 0"),
        (np.full((1, 1, 1), 4), "id 4 with num_experts=4"),
    ],
)
def test_routings_that_do_not_fit(topk: np.ndarray, reason: str) -> None:
    with pytest.raises(PlacementError, match=reason):
        RoutingStats.from_topk(topk, 4)


def test_presets() -> None:
    cluster = topology("h100", nodes=3, gpus_per_node=2)
    assert cluster.node_of_gpu.tolist() == [0, 0, 1, 1, 2, 2]
    assert cluster.link(0, 1) == Link(450e9, 2e-6)
    assert cluster.link(1, 5) == Link(50e9, 1e-5)
    assert cluster.link(4, 4).latency == 0
    assert topology("flat", gpus_per_node=8).num_nodes == 1
    own = topology(nodes=2, gpus_per_node=2, inside=Link(900e9, 1e-6), between=Link(100e9, 2e-6))
    assert own.link(0, 3) == Link(100e9, 4e-6)


def test_the_largest_fall_of_bandwidth_is_the_boundary_of_nodes() -> None:
    """Pairs at 900, boxes of two pairs at 450, boxes joined at 25 GB/s: a node is a box. Between GPUs counts the widest path."""
    graph = nx.Graph()
    graph.add_nodes_from(range(8), kind="gpu")
    graph.add_edges_from(((i, i + 1) for i in range(0, 8, 2)), bandwidth=900e9, latency=1e-6)
    graph.add_edges_from([(0, 2), (4, 6)], bandwidth=450e9, latency=1e-6)
    graph.add_edges_from([(1, 5), (3, 7)], bandwidth=25e9, latency=5e-6)
    cluster = topology(graph)
    assert [(bandwidth, islands.tolist()) for bandwidth, islands in cluster.levels] == [
        (900e9, [0, 0, 1, 1, 2, 2, 3, 3]),
        (450e9, [0, 0, 0, 0, 1, 1, 1, 1]),
        (25e9, [0] * 8),
    ]
    assert cluster.node_of_gpu.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert cluster.link(1, 3) == Link(450e9, 3e-6)


def test_graphs_that_are_no_cluster() -> None:
    graph = nx.Graph()
    with pytest.raises(PlacementError, match='mark its vertices with kind="gpu"'):
        topology(graph)
    graph.add_nodes_from("ab", kind="gpu")
    with pytest.raises(PlacementError, match="not connected"):
        topology(graph)
    graph.add_edge("a", "b", bandwidth=0, latency=0)
    with pytest.raises(PlacementError, match="bandwidth > 0 in bytes/s"):
        topology(graph)
    with pytest.raises(PlacementError, match="choose one of flat, h100, h200"):
        topology("b9000")
    with pytest.raises(PlacementError, match="both links"):
        topology(nodes=2)
    with pytest.raises(PlacementError, match="both are at least 1"):
        topology("h100", nodes=0)
