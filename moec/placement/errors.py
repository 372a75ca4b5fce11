"""What placement raises on purpose: a request that cannot be met, or a file that is not what it says."""

from __future__ import annotations

from moec.errors import MoecError


class PlacementError(MoecError, ValueError):
    """Statistics, a topology, a plan or a request of `moec.placement` that cannot be used."""
