"""dispatchers: how tokens get to the ranks that hold their experts, and the sums back.

    AllGather   every token to every rank; sums come back by reduce-scatter
    AllToAll    every token once to each rank that holds one of its experts; partial sums come back and are added in rank order

A dispatcher is data: `open` writes what a layer does once (who goes where) and returns a channel; `bring` and `back` of the
channel write the two ways. Rows are tokens: a token travels with the slots of all its K choices, and a rank keeps those that are
its own.

Which one is a matter of cost. All ranks must take the same, so the choice depends on nothing that a rank knows alone: not on its
number of tokens, but on one that is given.

Shape letters: T tokens of this rank, K top-k, R ranks, P tokens that came here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from moec.ops import collectives

OPS = torch.ops.moec
Write = Callable[..., fx.Node]  # (target, *args) -> the new node


@dataclass(frozen=True)
class Traffic:
    """What the cost of a layer depends on. `latency` in seconds, `bandwidth` in bytes per second of one rank, one direction."""

    tokens: int  # of one rank
    top_k: int
    ranks: int
    width: int  # of a row
    itemsize: int  # bytes of one element of a row
    bandwidth: float = 450e9
    latency: float = 2e-6

    @property
    def there(self) -> int:
        """Bytes of one token on its way: its row, and the slot and the weight of each choice."""
        return self.width * self.itemsize + self.top_k * (8 + self.itemsize)

    def visited(self) -> float:
        """The expected number of other ranks that a token visits, if its experts are spread evenly."""
        return (self.ranks - 1) * (1 - (1 - 1 / self.ranks) ** self.top_k)


@dataclass(frozen=True, eq=False)
class Channel:
    """An open way to the experts: the slots [P, K] of the tokens that came here, and how to write the two ways."""

    slots: fx.Node
    bring: Callable[[fx.Node], fx.Node]  # [T, ...] -> [P, ...]
    back: Callable[[fx.Node], fx.Node]  # [P, ...] -> [T, ...], summed over ranks


class Dispatcher(Protocol):
    """One way of moving tokens. `sent` are bytes that leave one rank for one layer, forward only."""

    @property
    def name(self) -> str: ...

    def open(self, write: Write, shared: dict[object, fx.Node], slots: fx.Node, at: Place) -> Channel: ...

    def sent(self, traffic: Traffic) -> float: ...

    def seconds(self, traffic: Traffic) -> float: ...


@dataclass(frozen=True)
class Place:
    """Where this rank stands: its number among `ranks`, its slots, the process group by name; `tokens` is T, as a key."""

    rank: int
    ranks: int
    slots_per_rank: int
    group: str
    tokens: object = None


@dataclass(frozen=True)
class AllGather:
    """Every token to every rank. `shared` keeps the agreement on the padded size: once for a graph and a number of tokens."""

    name: str = "all-gather"

    def open(self, write: Write, shared: dict[object, fx.Node], slots: fx.Node, at: Place) -> Channel:
        key = (self.name, at.group, at.tokens)
        if key not in shared:
            shared[key] = write(collectives.widest, slots, at.ranks, at.group)
        rows = shared[key]

        def bring(x: fx.Node, fill: int = 0) -> fx.Node:
            return write(collectives.gather_rows, x, rows, at.ranks, at.group, fill)

        tokens = write(torch.ops.aten.sym_size.int, slots, 0)

        def back(y: fx.Node) -> fx.Node:
            return write(collectives.scatter_sums, y, tokens, at.ranks, at.group)

        return Channel(bring(slots, -1), bring, back)

    def sent(self, traffic: Traffic) -> float:
        back = traffic.width * max(traffic.itemsize, 4)  # sums of 16 bits travel in 32
        return (traffic.ranks - 1) * (8 + traffic.tokens * (traffic.there + back))

    def seconds(self, traffic: Traffic) -> float:
        return 5 * traffic.latency + self.sent(traffic) / traffic.bandwidth


@dataclass(frozen=True)
class AllToAll:
    """Every token once to each rank that it has a slot on, in uneven numbers that the ranks tell each other first."""

    name: str = "all-to-all"

    def open(self, write: Write, shared: dict[object, fx.Node], slots: fx.Node, at: Place) -> Channel:
        ranks = write(OPS.visits.default, slots, at.slots_per_rank, at.ranks)
        routed = write(OPS.route.default, ranks, at.ranks)
        order, inverse, ends = (write(operator.getitem, routed, i) for i in range(3))
        told = write(collectives.splits, ends, at.ranks, at.group)
        received, sent, total = (write(operator.getitem, told, i) for i in range(3))
        order = write(OPS.trim_rows.default, order, total)

        def bring(x: fx.Node) -> fx.Node:
            rows = write(OPS.dispatch.default, x, order, inverse, ends, at.ranks)
            return write(collectives.swap_rows, rows, received, sent, at.group)

        def back(y: fx.Node) -> fx.Node:
            rows = write(collectives.swap_rows, y, sent, received, at.group)
            return write(OPS.combine.default, rows, order, inverse, ends, at.ranks)

        return Channel(bring(slots), bring, back)

    def sent(self, traffic: Traffic) -> float:
        back = traffic.width * traffic.itemsize
        return 8 * (traffic.ranks - 1) + traffic.visited() * traffic.tokens * (traffic.there + back)

    def seconds(self, traffic: Traffic) -> float:
        return 6 * traffic.latency + self.sent(traffic) / traffic.bandwidth


DISPATCHERS: tuple[Dispatcher, ...] = (AllGather(), AllToAll())


def cheapest(traffic: Traffic) -> Dispatcher:
    """The dispatcher that the cost model expects to be fastest; the first of equals."""
    return min(DISPATCHERS, key=lambda d: d.seconds(traffic))
