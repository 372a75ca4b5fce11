"""The cluster as a graph: GPUs and switches, bandwidth and latency on the edges; nodes are found by bandwidth.

    topology("h100", nodes=4, gpus_per_node=8)                     # NVLink inside a node, one InfiniBand NIC per GPU
    topology("flat", gpus_per_node=8)                              # one box
    topology(nodes=4, gpus_per_node=8, inside=Link(900e9, 2e-6), between=Link(100e9, 5e-6))
    topology(my_graph)                                             # any networkx graph, GPUs marked kind="gpu"

Between two GPUs counts the widest path: its bandwidth is that of its narrowest edge. Cut all edges below some
bandwidth, and the cluster falls into islands: one *level* for each such partition. The boundary that placement cares
about is the one where bandwidth falls the most; its islands are the *nodes*. Islands may differ in size.

Not handled: GPUs of different speed or memory, and contention on a shared edge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import numpy as np

from .errors import PlacementError


@dataclass(frozen=True)
class Link:
    """What one edge carries: bandwidth in bytes per second and direction, latency in seconds."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Preset:
    """The two links of a cluster of equal nodes: from a GPU to its node's switch, and from a GPU to the fabric."""

    inside: Link
    between: Link


# Nominal bandwidth per GPU and direction: NVLink 4 450 GB/s, NDR InfiniBand 400 Gb/s = 50 GB/s (H200 has the links of
# H100). Latencies are orders of magnitude, one way, half of it on each of the two edges of a path; pass a Link of your
# own where it matters.
PRESETS = {
    "flat": Preset(Link(450e9, 1e-6), Link(450e9, 1e-6)),
    "h100": Preset(Link(450e9, 1e-6), Link(50e9, 5e-6)),
    "h200": Preset(Link(450e9, 1e-6), Link(50e9, 5e-6)),
}


@dataclass(frozen=True, eq=False)
class Topology:
    """A cluster.

    graph  networkx graph; vertices with kind="gpu" are GPUs, in the order of their ranks; every edge has `bandwidth`
           (bytes/s) and `latency` (s)

    Raises PlacementError where there is no GPU, where one cannot be reached, or where an edge lacks its numbers.
    """

    graph: nx.Graph = field(repr=False)

    def __post_init__(self) -> None:
        if not self.gpus:
            raise PlacementError('the graph has no GPU; mark its vertices with kind="gpu"')
        for a, b, edge in self.graph.edges(data=True):
            if not edge.get("bandwidth", 0) > 0 or not edge.get("latency", -1) >= 0:
                raise PlacementError(
                    f"edge {a!r} - {b!r} has {edge}; give it bandwidth > 0 in bytes/s and latency >= 0 in seconds"
                )
        if not nx.is_connected(self.graph):
            raise PlacementError("the graph is not connected; add the links between its parts")

    @cached_property
    def gpus(self) -> tuple[object, ...]:
        return tuple(v for v, kind in self.graph.nodes(data="kind") if kind == "gpu")

    @property
    def num_gpus(self) -> int:
        return len(self.gpus)

    @cached_property
    def levels(self) -> tuple[tuple[float, np.ndarray], ...]:
        """((bandwidth in bytes/s, island of each GPU [G] int64), ...): the distinct partitions, finest first."""
        found: list[tuple[float, np.ndarray]] = []
        for bandwidth in sorted({edge["bandwidth"] for *_, edge in self.graph.edges(data=True)}, reverse=True):
            wide = nx.Graph()
            wide.add_nodes_from(self.graph)
            wide.add_edges_from((a, b) for a, b, w in self.graph.edges(data="bandwidth") if w >= bandwidth)
            island = {v: i for i, part in enumerate(nx.connected_components(wide)) for v in part}
            _, islands = np.unique([island[g] for g in self.gpus], return_inverse=True)
            islands = _by_first(islands)
            if islands.max(initial=0) + 1 < (found[-1][1].max() + 1 if found else self.num_gpus):
                found.append((float(bandwidth), islands))
        return tuple(found)

    @cached_property
    def node_of_gpu(self) -> np.ndarray:
        """[G] int64: the node of each GPU, numbered by first GPU; all 0 where bandwidth is the same everywhere."""
        if len(self.levels) < 2:
            return np.zeros(self.num_gpus, dtype=np.int64)
        falls = [a[0] / b[0] for a, b in zip(self.levels, self.levels[1:])]
        return self.levels[int(np.argmax(falls))][1]

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_gpu.max()) + 1

    def link(self, a: int, b: int) -> Link:
        """Between GPUs a and b (ranks): the bandwidth of the widest path, and the least latency of paths that wide."""
        start, end = self.gpus[a], self.gpus[b]
        if start == end:
            return Link(float("inf"), 0.0)
        path = nx.shortest_path(self._widest, start, end)
        bandwidth = min(self.graph.edges[edge]["bandwidth"] for edge in zip(path, path[1:]))
        wide = nx.subgraph_view(self.graph, filter_edge=lambda u, v: self.graph.edges[u, v]["bandwidth"] >= bandwidth)
        return Link(bandwidth, float(nx.shortest_path_length(wide, start, end, weight="latency")))

    @cached_property
    def _widest(self) -> nx.Graph:
        return nx.maximum_spanning_tree(self.graph, weight="bandwidth")


def topology(
    kind: str | nx.Graph | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    inside: Link | None = None,
    between: Link | None = None,
) -> Topology:
    """The cluster: a preset's name, a graph of your own, or `nodes` equal nodes with links of your own.

    kind     one of PRESETS, or a graph as Topology describes it; None: both links are given
    inside   from a GPU to its node's switch; the preset's if None
    between  from a GPU to the fabric that joins the nodes; the preset's if None

    Raises PlacementError for a preset that is not known and for sizes below 1.
    """
    if isinstance(kind, nx.Graph):
        return Topology(kind)
    if kind is None and (inside is None or between is None):
        raise PlacementError("say which cluster: a preset, a graph, or both links: inside=Link(...), between=Link(...)")
    if kind is not None and kind not in PRESETS:
        raise PlacementError(f"unknown topology {kind!r}; choose one of {', '.join(PRESETS)} or pass links of your own")
    if nodes < 1 or gpus_per_node < 1:
        raise PlacementError(f"{nodes} nodes of {gpus_per_node} GPUs; both are at least 1")
    preset = PRESETS[kind or "flat"]
    inside, between = inside or preset.inside, between or preset.between
    graph = nx.Graph()
    for n in range(nodes):
        for g in range(gpus_per_node):
            gpu = f"gpu{n * gpus_per_node + g}"
            graph.add_node(gpu, kind="gpu")
            graph.add_edge(gpu, f"switch{n}", bandwidth=inside.bandwidth, latency=inside.latency)
            if nodes > 1:
                graph.add_edge(gpu, "fabric", bandwidth=between.bandwidth, latency=between.latency)
    return Topology(graph)


def _by_first(islands: np.ndarray) -> np.ndarray:
    """The same partition, islands numbered in the order in which they first appear."""
    _, first, inverse = np.unique(islands, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)
