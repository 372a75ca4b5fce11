"""What the backend does with graphs of a parallelized model: tokens are exchanged around each layer, or an error says why not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import fx
from torch._dynamo.exc import ShortenTraceback

from moec.config import Options
from moec.errors import ParallelError
from moec.passes import exchange
from moec.pipeline import Result


class NotSpread(ParallelError, ShortenTraceback):
    """A ParallelError that Dynamo hands to the user as it is, although a backend raises it."""


def _told(message: str) -> NotSpread:
    frame = inspect.currentframe()
    return NotSpread(message, first_useful_frame=frame.f_back if frame is not None else None)


@dataclass(frozen=True)
class Spread:
    """The layers of a graph that exchange tokens, and the options it is to be compiled with."""

    layouts: tuple[exchange.Layout, ...]
    options: Options


def spread(result: Result, options: Options) -> Spread:
    """Writes the exchange of tokens into all graphs of a result.

    A graph for no tokens at all goes to "aot_eager": Inductor simplifies what is computed from empty gradients, and collectives
    of the backward, which other ranks wait for, would run in the forward.

    Raises ParallelError where sharded weights are read by anything but a rewritten layer: there is no way to run that.
    """
    if not exchange.markers(result.gm):
        return Spread((), options)
    layouts: list[exchange.Layout] = []
    try:
        for gm in [m for m in result.gm.modules() if isinstance(m, fx.GraphModule)]:
            layouts += exchange.spread(gm)
    except ParallelError as error:
        raise _told(str(error)) from error
    if left := exchange.markers(result.gm):
        names = ", ".join(sorted({exchange.layout_of(m).name for m in left}))
        refused = [f"{s.idiom}: {s.reason}" for s in result.sites if s.status == "refused"]
        why = "; ".join(dict.fromkeys(refused)) or "they are read outside their layer, or moec is switched off"
        raise _told(f"the experts of {names} are spread over ranks, but their layer was not rewritten: {why}")
    rewritten = [s for s in result.sites if s.status == "rewritten"]
    for site, layout in zip(rewritten, layouts):
        if len(rewritten) == len(layouts):
            site.strategy = f"{site.strategy}, {layout.dispatcher.name} over {layout.place.ranks} ranks"
    if options.inner == "inductor" and any(layout.place.tokens == 0 for layout in layouts):
        options = replace(options, inner="aot_eager")
    return Spread(tuple(layouts), options)
