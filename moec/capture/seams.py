"""How moec reaches into Dynamo: wrap one attribute, and do without if it is not there.

Every seam has the same shape: `wrap(owner, "name", around)` replaces `owner.name` by `around(original)`. The replacement asks
first whether the frame being traced is moec's own (`frames.ours`) and otherwise calls the original. A torch version without
the attribute loses what the seam brings (the frame breaks there, as it does without moec) and says so once.
"""

# Dynamo's annotations are wider than the values it passes here.
# mypy: disable-error-code="arg-type,attr-defined,var-annotated"
from __future__ import annotations

import contextlib
import dis
import functools
import logging
from collections.abc import Callable, Iterator

log = logging.getLogger("moec")


def wrap(owner: object, name: str, around: Callable[[Callable[..., object]], Callable[..., object]]) -> bool:
    """Replace `owner.name` by `around(owner.name)`; False where torch has no such attribute."""
    original = getattr(owner, name, None)
    if original is None:
        log.warning("moec.capture: this torch has no %s.%s; the frames that need it will break", owner, name)
        return False
    setattr(owner, name, functools.wraps(original)(around(original)))
    return True


def wrap_opcode(translator: type, name: str, around: Callable[[Callable[..., None]], Callable[..., None]]) -> bool:
    """Wrap a bytecode handler. Dynamo copies handlers into one dispatch table per class, so those are rewritten too."""
    if name not in dis.opmap:
        return True  # another Python version's opcode
    if not wrap(translator, name, around):
        return False
    for cls in with_subclasses(translator):
        cls.dispatch_table[dis.opmap[name]] = getattr(cls, name)
    return True


def with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for sub in cls.__subclasses__():
        yield from with_subclasses(sub)


stamping_on = borrowing_on = True


@contextlib.contextmanager
def stamping(on: bool, borrow: bool = True) -> Iterator[None]:
    """Switch the stamping of equal iterations on or off (the graphs are the same, tracing is slower without).

    With `borrow`, stamped nodes may carry the example values of another iteration; see `fakes`.
    """
    global stamping_on, borrowing_on
    before = stamping_on, borrowing_on
    stamping_on, borrowing_on = on, borrow
    try:
        yield
    finally:
        stamping_on, borrowing_on = before
