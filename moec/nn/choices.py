"""Settings that a user chooses by name or by number; each error names what was found, what is possible, what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of a visible table. Raises ValueError for a name that is not in it, naming those that are."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def positive_int(what: str, value: int) -> int:
    """Raises ValueError unless `value` is an int of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is a whole number of at least 1, not {value!r}")
    return value


def expert_width(d_ff: int, granularity: int) -> int:
    """d_expert = d_ff / G. Raises ValueError where that is no whole number."""
    if d_ff % granularity:
        divisors = [g for g in range(1, d_ff + 1) if d_ff % g == 0]
        nearest = sorted(sorted(divisors, key=lambda g: abs(g - granularity))[:2])
        widths = [n * granularity for n in (d_ff // granularity, d_ff // granularity + 1) if n]
        raise ValueError(
            f"granularity={granularity} does not divide d_ff={d_ff}, so that experts would have no whole width; take "
            f"granularity={' or '.join(map(str, nearest))}, or d_ff={' or '.join(map(str, widths))}"
        )
    return d_ff // granularity
