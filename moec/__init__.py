"""moec: `torch.compile(model, backend="moec")` for Mixture-of-Experts models.

Names are imported when first used, so that `import moec` costs nothing.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# public name -> the module that defines it. That of `explain` must not be called moec.explain: importing a submodule sets the
# attribute of that name on the package, and the function would be gone.
_PUBLIC = {
    "explain": "moec.inspect",
    "rewrite": "moec.pipeline",
    "granularity_of": "moec.granularity",
    "declare": "moec.declaration",
    "parallelize": "moec.parallel",
    "rebalance": "moec.parallel",
}
_SUBMODULES = ("nn", "ops", "parallel", "placement", "scaling")

__all__ = [*_PUBLIC, *_SUBMODULES]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        value: object = getattr(import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"moec.{name}")
    else:
        raise AttributeError(f"module 'moec' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
