"""The error of this package: input that makes no sense to plan, fit or train with, and what to change about it."""

from __future__ import annotations

from types import ModuleType

from moec.errors import MoecError


class ScalingError(MoecError, ValueError):
    """A budget, a table, a text or a grid that cannot be used. The message says what to change."""


def extra(module: str) -> ModuleType:
    """A module of the optional extra [scaling]. Raises ScalingError with the command that installs it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as missing:
        raise ScalingError(
            f"{module} is needed for this and cannot be imported ({missing}); pip install moec[scaling]"
        ) from missing


def positive(value: float, what: str) -> float:
    """`value`, if it is a finite number above zero. Raises ScalingError naming `what` otherwise."""
    if not 0 < value < float("inf"):
        raise ScalingError(f"{what} is {value:g}; give a finite number above zero")
    return value
