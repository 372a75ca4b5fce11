"""The number of a loop's iteration, watched.

To repeat an iteration without tracing it, one must know that its number did nothing but (a) go into the graph, (b) pick a
module out of a ModuleList, (c) be compared with a constant. `Index` is a Python int for Dynamo that reports anything else:
arithmetic, string formatting, indexing a list, a branch. Unwatched (`uses` is None) it is an ordinary constant.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.variables import ConstantVariable
from torch._guards import Source

COMPARISONS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_CONTAINERS = torch.nn.modules.container.__file__
_LOOK_UPS = ("__getitem__", "_get_abs_string_index")

Path = tuple[int, ...]  # where in the (nested) tuple that the iterator yields


@dataclasses.dataclass
class Uses:
    """What one watched iteration did with its number, and anything else that forbids repeating it."""

    output: OutputGraph
    watching: bool = True
    escaped: str | None = None
    compared: list[tuple[Path, str, int, bool]] = dataclasses.field(default_factory=list)
    looked_up: dict[Path, list[Source]] = dataclasses.field(default_factory=dict)  # the ModuleLists, by their names

    def escape(self, how: str) -> None:
        if self.watching and self.escaped is None:
            self.escaped = how

    def read(self, path: Path) -> None:
        """The bare number was asked for; the code of ModuleList and ParameterList may, to look up that child."""
        if not self.watching:
            return
        tx = self.output.current_tx
        container = tx.symbolic_locals.get("self") if tx.f_code.co_filename == _CONTAINERS else None
        if container is None or container.source is None or tx.f_code.co_name not in _LOOK_UPS:
            self.escape("its number was used in Python")
        else:
            self.looked_up.setdefault(path, []).append(container.source)


class Mark(int):
    """The number as it stands in the graph while the iteration is watched."""

    path: Path


class Index(ConstantVariable):
    _nonvar_fields = {"uses", "path", "_number", *ConstantVariable._nonvar_fields}

    def __init__(self, value: int, uses: Uses | None = None, path: Path = (), **kwargs: object) -> None:
        self.uses, self.path = uses, path
        super().__init__(value, **kwargs)

    @property
    def value(self) -> int:
        if self.uses is not None:
            self.uses.read(self.path)
        return self._number

    @value.setter
    def value(self, value: int) -> None:
        self._number = value

    def as_proxy(self) -> int:
        return marked(self._number, self.uses, self.path)

    def python_type(self) -> type:
        return int

    def is_symnode_like(self) -> bool:
        return True

    def is_constant_none(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._number})"


def marked(number: int, uses: Uses | None, path: Path) -> int:
    if uses is None or not uses.watching:
        return number
    mark = Mark(number)
    mark.path = path
    return mark
