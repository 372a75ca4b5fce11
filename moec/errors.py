"""The errors that moec raises on purpose. Each says what was found, what was expected and what to do about it."""

from __future__ import annotations


class MoecError(Exception):
    """Base of all errors that moec raises on purpose."""


class OptionError(MoecError, ValueError):
    """An option of `torch.compile(..., options={...})` that moec does not understand."""


class StrictError(MoecError, RuntimeError):
    """With `moec.strict`: something that would otherwise only have been reported (a refused site, an internal fault)."""


class GranularityError(MoecError, ValueError):
    """Sizes of experts that contradict each other, or that a model or config does not tell."""


class DeclarationError(MoecError, RuntimeError):
    """A promise about experts that cannot be made (`moec.declare`) or that the compiler cannot keep."""


class DeclarationWarning(UserWarning):
    """In place of DeclarationError, where the promise was made with `on_refusal="warn"`."""


class ParallelError(MoecError, RuntimeError):
    """Experts that cannot be spread over the ranks of a mesh as asked, or are not where a plan says."""
