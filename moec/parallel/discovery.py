"""Which parameters are experts? The model is traced as moec would trace it, on a copy that holds no data.

    find(model, args, kwargs)  ->  [Found(name="layers.0.mlp.experts", stacked=("...gate_up_proj", "...down_proj"), ...), ...]

Detection and lowering do the work; what is read off here is where the weights of each rewritten layer come from. Everything that
could go wrong later is an error now, before a weight is touched: a refused layer, a weight that is computed before it is used, a
parameter that two layers share or that is read elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from moec import capture, schedule
from moec.config import Options
from moec.errors import ParallelError
from moec.fx import target_name, value
from moec.ir import Site
from moec.passes import exchange
from moec.passes.terms import location
from moec.pipeline import rewrite_graph


@dataclass(frozen=True)
class Found:
    """One layer: how many experts, and the parameters [E, ...], or the E parameters, that hold them, by name."""

    name: str  # of the innermost module that holds them all
    location: str
    num_experts: int
    top_k: int
    d_model: int
    stacked: tuple[str, ...] = ()
    separate: tuple[tuple[str, ...], ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.stacked, *(name for names in self.separate for name in names))


def find(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None) -> list[Found]:
    """The layers whose experts can be spread over ranks, in order. Raises ParallelError where one cannot, or without any."""
    if not args and kwargs is None:
        kwargs = _example(model)
    capture.install()
    shadow = _shadow(model)
    stub = _Stub(shadow)
    fault: Exception | None = None
    try:
        with capture.promises.listening(), schedule.in_steps():
            torch.compile(shadow, backend=stub)(*args, **(kwargs or {}))
    except Exception as error:  # after a refusal the rest may well fail, without data
        fault = error
    refused = list(dict.fromkeys(stub.refused))
    if refused:
        raise ParallelError("a layer of experts was not recognized, so nothing was changed: " + "; ".join(refused))
    if fault is not None:
        if isinstance(fault, ParallelError):
            raise fault
        raise ParallelError(
            f"the model could not be traced to find its experts ({type(fault).__name__}: {fault}). Pass inputs that it runs on, "
            "as args= or kwargs="
        ) from fault
    if not stub.found:
        raise ParallelError(
            "no layer of experts was found in this model; moec.explain(model, *inputs) shows what was traced"
        )
    _check_alone(shadow, stub)
    return stub.found


def _example(model: nn.Module) -> dict[str, object]:
    config = getattr(model, "config", None)
    if hasattr(model, "dummy_inputs") and getattr(config, "vocab_size", None):
        return {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    raise ParallelError(
        f"{type(model).__name__} has to be traced to find its experts: pass inputs that it runs on, as args= or kwargs="
    )


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have no memory of their own: one zero, seen at every index. (On the meta device some
    models cannot be traced.)
    """
    memo: dict[int, object] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(_nothing(p.shape, p), p.requires_grad)
    shadow: nn.Module = copy.deepcopy(model, memo)
    return shadow


def _nothing(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(tuple(shape))


def _pretend(gm: fx.GraphModule) -> Callable[..., object]:
    """In the place of a compiled graph: its outputs, as zeros without memory."""
    outputs = [value(n) if isinstance(n, fx.Node) else n for n in gm.graph.find_nodes(op="output")[0].args[0]]

    def size(s: object) -> int:
        return s if isinstance(s, int) else int(getattr(getattr(s, "node", None), "hint", None) or 1)

    def run(*inputs: object) -> list[object]:
        return [
            _nothing([size(s) for s in v.shape], torch.empty((), dtype=v.dtype, device=v.device))
            if isinstance(v, Tensor)
            else size(v)
            if isinstance(v, torch.SymInt)
            else v
            for v in outputs
        ]

    return run


@dataclass(eq=False)
class _Stub:
    """A backend that is moec's up to the point where the graph would be compiled."""

    model: nn.Module
    found: list[Found] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    read: dict[str, list[str]] = field(default_factory=dict)  # parameters: who reads them outside layers of experts
    _moec_backend = True
    __name__ = "moec"

    def __post_init__(self) -> None:
        self.backend_ctx_ctor = capture.backend_ctx_ctor

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        result = rewrite_graph(gm, Options(verify="off"))
        self.refused += [f"{s.idiom}: {s.reason}" for s in result.sites if s.status == "refused"]
        if self.refused:
            raise ParallelError(self.refused[0])
        left = capture.markers.marker_places(result.gm)
        if left:
            raise ParallelError(
                f"tracing assumed that every expert has tokens, and no layer explains it: {sorted(left)}"
            )
        self._read(result.gm, example_inputs, result.sites)
        return _pretend(gm)

    def _read(self, gm: fx.GraphModule, example_inputs: Sequence[object], sites: list[Site]) -> None:
        names: dict[int, str] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), name)
        holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        origin = {h: names[id(x)] for h, x in zip(holders, example_inputs) if id(x) in names}
        layers = exchange.layers(gm.graph)
        if len(layers) != len(sites):
            raise ParallelError(
                f"{len(sites)} layers were recognized, {len(layers)} are routed sums of this graph: experts inside graphs "
                "of their own (activation checkpointing) are not handled"
            )
        taken: dict[fx.Node, fx.Node] = {}
        for layer, site in zip(layers, sites):
            self.found.append(_found(layer, site, origin, taken))
        for holder, name in origin.items():
            others = [u for u in _readers(holder) if u.target not in exchange.PRODUCTS]
            self.read.setdefault(name, []).extend(f"{target_name(u)} ({location(u)})" for u in others)


def _found(layer: exchange.Layer, site: Site, origin: dict[fx.Node, str], taken: dict[fx.Node, fx.Node]) -> Found:
    if layer.route.target is not torch.ops.moec.route.default:
        raise ParallelError(f"{site.location}: experts that choose their tokens are not handled")
    if site.num_experts is None or site.top_k is None:
        raise ParallelError(f"{site.location}: the number of experts or of choices is not known")
    stacked: dict[str, None] = {}
    separate: dict[tuple[str, ...], None] = {}
    for product in layer.products:
        for _, ws in exchange.weights(product):
            own = []
            for w in ws:
                source, odd = exchange.root(w)
                if odd is not None or source not in origin:
                    what = f"`{target_name(source)}`" if odd is not None else f"`{source}`, which is no parameter"
                    raise ParallelError(
                        f"{site.location}: an expert's weight is computed by {what} before it is used ({location(source)}); "
                        "only views and casts that leave the expert dim alone are handled"
                    )
                if taken.setdefault(source, layer.route) is not layer.route:
                    raise ParallelError(
                        f"{origin[source]} is used by two layers of experts; tied experts are not handled"
                    )
                own.append(origin[source])
            if len(ws) > 1:
                if len(set(own)) < len(own):
                    raise ParallelError(f"{own[0]} serves several experts of one layer; tied experts are not handled")
                separate[tuple(own)] = None
            elif (sizes := exchange.shape(exchange.root(ws[0])[0]))[0] != site.num_experts:
                raise ParallelError(
                    f"{own[0]} is {tuple(sizes)}; its first dim is not that of the {site.num_experts} experts"
                )
            else:
                stacked[own[0]] = None
    if stacked and separate:
        raise ParallelError(
            f"{site.location}: some weights of these experts are stacked, others are not; this is not handled"
        )
    names = [*stacked, *(n for names in separate for n in names)]
    return Found(
        _common(names), site.location, site.num_experts, site.top_k, site.d_model or 0, tuple(stacked), tuple(separate)
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a value through views and casts."""
    found: list[fx.Node] = []
    for user in node.users:
        through = user.target not in exchange.PRODUCTS and exchange.root(user)[1] is None and user.op != "output"
        found += _readers(user) if through and user.users else [] if through else [user]
    return found


def _check_alone(model: nn.Module, stub: _Stub) -> None:
    """Every parameter of experts has one name, and one layer that reads it."""
    mine = {name for layer in stub.found for name in layer.parameters}
    for name, readers in stub.read.items():
        if readers and name in mine:
            raise ParallelError(f"{name} is read outside its layer of experts too, by {', '.join(readers)}")
    every: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        every.setdefault(id(p), []).append(name)
    known: set[str] = set()
    for layer in stub.found:
        for name in layer.parameters:
            names = every[id(model.get_parameter(name))]
            if len(names) > 1 or name in known:
                raise ParallelError(
                    f"{' and '.join(names)} are one parameter or serve twice; tied experts are not handled"
                )
            known.add(name)
    # where the graph breaks between equal layers, Dynamo traces one and uses its code for all
    alike = {(_pattern(n), model.get_parameter(n).shape) for n in known}
    for name, p in model.named_parameters():
        if name not in known and (_pattern(name), p.shape) in alike:
            raise ParallelError(
                f"{name} looks like the experts that were found, and was not: the graph breaks between the layers. "
                'torch.compile(model, backend="moec", fullgraph=True) says where'
            )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _common(names: Sequence[str]) -> str:
    """The longest common path of modules."""
    parts = [n.split(".")[:-1] for n in names]
    end = next((i for i, ps in enumerate(zip(*parts)) if len(set(ps)) > 1), min(map(len, parts)))
    return ".".join(parts[0][:end])
