"""Python's cyclic collector, calmed while a frame is traced.

Tracing and guarding make millions of objects that live until they end. The collector would walk them over and over: a tenth
of the time for four layers of 128 experts, and a growing part for more.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Collections are rarer inside; thresholds that the user has set higher, or a collector that is off, stay as they are."""
    before = gc.get_threshold()
    if before[0] > 0:
        gc.set_threshold(max(before[0], 200_000), *(max(n, 20) for n in before[1:]))
    try:
        yield
    finally:
        gc.set_threshold(*before)
