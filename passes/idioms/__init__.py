"""The idioms, one file each. A visible tuple: an idiom is `candidates(values) -> [Candidate]`, tried in this order.

An idiom only says where a routed sum may end and in which order its rows stand there; `passes.body` proves the rest. See
docs/adding-an-idiom.md.
"""

from moec.passes.idioms import dense, loop, slots
from moec.passes.idioms.common import Candidate, Found

IDIOMS = (loop, slots, dense)

__all__ = ["IDIOMS", "Candidate", "Found"]
