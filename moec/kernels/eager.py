"""The reference itself, under the name of a strategy: what everything else is compared with, and the last resort."""

from __future__ import annotations

from moec.ops.reference import grouped_linear, grouped_outer

__all__ = ["grouped_linear", "grouped_outer"]
