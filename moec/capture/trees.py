"""Operands of graph nodes: tuples, lists, dicts and slices with nodes and constants at the leaves."""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="assignment"
from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from .indices import Mark


class NoStamp(Exception):
    """These iterations are not one body repeated; says why."""


def unmark(nodes: Iterable[fx.Node]) -> None:
    """Turn marked numbers back into plain ones."""

    def plain(leaf: object) -> object:
        return int(leaf) if type(leaf) is Mark else leaf

    for node in nodes:
        if any(type(leaf) is Mark for leaf in _leaves((node.args, node.kwargs))):
            node.args, node.kwargs = map_leaves(node.args, plain), map_leaves(node.kwargs, plain)


def map_leaves(tree: object, fn: Callable[[object], object]) -> object:
    return zip_leaves(tree, tree, lambda _, leaf: fn(leaf))


def zip_leaves(a: object, b: object, fn: Callable[[object, object], object]) -> object:
    """`b` with every leaf replaced by fn(leaf of a, leaf of b)."""
    if isinstance(b, (tuple, list)):
        if type(a) is not type(b) or len(a) != len(b):
            raise NoStamp(f"{a} became {b}")
        items = [zip_leaves(x, y, fn) for x, y in zip(a, b)]
        return items if isinstance(b, list) else tuple(items)
    if isinstance(b, dict):
        if not isinstance(a, dict) or list(a) != list(b):
            raise NoStamp(f"{a} became {b}")
        return {key: zip_leaves(a[key], b[key], fn) for key in b}
    if isinstance(b, slice):
        if not isinstance(a, slice):
            raise NoStamp(f"{a} became {b}")
        return slice(*(zip_leaves(getattr(a, part), getattr(b, part), fn) for part in ("start", "stop", "step")))
    return fn(a, b)


def _leaves(tree: object) -> list[object]:
    found: list[object] = []
    map_leaves(tree, found.append)
    return found
