"""Numbers as people write them on a command line: 1.93e20, 3B tokens, 80GB, 12h."""

from __future__ import annotations

import re

from moec.scaling.errors import ScalingError

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTES = {"": 1.0, "B": 1.0} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for end, base in (("B", 1000.0), ("IB", 1024.0))
}
SECONDS = {"": 1.0, "S": 1.0, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0}


def quantity(text: str, units: dict[str, float], what: str) -> float:
    """A number above zero with an optional unit, case ignored. Raises ScalingError naming `what` and the units."""
    match = re.fullmatch(r"([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        match = None
    if match is None or unit not in units:
        names = ", ".join(u for u in units if u)
        raise ScalingError(f"{what} {text!r} is not a number; write one such as 1.5e9, or with a unit ({names})")
    if not 0 < number < float("inf"):
        raise ScalingError(f"{what} is {text}; give a number above zero")
    return number * units[unit]
