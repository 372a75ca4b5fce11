"""What ranks do in these tests. Each case runs on all ranks and judges there; what it returns is for the test to look at."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import moec
from moec.parallel import entry
from moec.placement import Plan

from .. import hf, layers
from . import ranks

# -- plans ---------------------------------------------------------------------------------------------------------------


def make_plan(kind: str | None, num_layers: int, num_experts: int, world: int, seed: int = 0) -> Plan | None:
    """None: no plan, experts in order. "random": a permutation. "copies": two more slots on each rank, the last ones of the last
    rank empty where copies do not fit. "one": all on as few ranks as slots allow, the last rank has copies only.
    """
    if kind is None:
        return None
    rng = np.random.default_rng(seed)
    room = -(-num_experts // world) + (2 if kind == "copies" else 0)
    slots = np.full((num_layers, world, room), -1, dtype=np.int64)
    for layer in range(num_layers):
        order = rng.permutation(num_experts)
        for i, e in enumerate(order):
            slots[layer, i % world, i // world] = e
        if kind == "copies":
            for rank in range(world):
                for place in np.flatnonzero(slots[layer, rank] < 0)[: room if rank < world - 1 else 1]:
                    slots[layer, rank, place] = rng.choice(np.setdiff1d(np.arange(num_experts), slots[layer, rank]))
    return Plan(slots.reshape(num_layers, -1), num_experts, np.zeros(world, dtype=np.int64))


# -- measuring -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted() -> Any:
    """A Counter of the collectives that run, by name."""
    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    for event in profile.events():
        if event.name.startswith("_c10d_functional::"):
            found[event.name.split("::")[1]] += 1


def mine(model: nn.Module, name: str, full: Tensor | None) -> Tensor | None:
    """Of a tensor of the whole model, the part that this rank has."""
    state = entry.state_of(model)
    for layer in state.layers:
        if name in layer.found.stacked and full is not None:
            held = layer.experts(state.rank, state.ranks)
            part = torch.zeros(len(held), *full.shape[1:], dtype=full.dtype)
            for slot, e in enumerate(held):
                if e >= 0:
                    part[slot] = full[e]
            return part
        for names in layer.found.separate:
            if name in names and names.index(name) not in layer.experts(state.rank, state.ranks):
                return None
    return full


def part_of(model: nn.Module, run: hf.Run, value: Tensor) -> hf.Run:
    return hf.Run(value, {name: mine(model, name, g) for name, g in run.grads.items()})


def shares(model: nn.Module) -> dict[str, float]:
    """Bytes of experts in memory over those of the whole model, by layer; a check that weights are sharded."""
    state = entry.state_of(model)
    found = {}
    for layer in state.layers:
        here = whole = 0
        for name in layer.found.parameters:
            p = model.get_parameter(name)
            here += p.untyped_storage().nbytes()
            whole += p.element_size() * p[0].numel() * layer.found.num_experts if layer.found.stacked else p.nbytes
        found[layer.found.name] = here / whole
    return found


def mesh_of(mesh: DeviceMesh, dp: bool) -> tuple[DeviceMesh, DeviceMesh]:
    """(the mesh for experts, the mesh of all ranks)."""
    if not dp:
        return mesh, mesh
    whole = ranks.grid(mesh)
    return whole["ep"], whole


# -- decoders of transformers --------------------------------------------------------------------------------------------


def train(
    mesh: DeviceMesh,
    name: str,
    batches: list[int],
    plan: str | None = None,
    dispatcher: str | None = None,
    inner: str = "aot_eager",
    implementation: str = "eager",
    dtype: str = "float32",
    dp: bool = False,
    seq: int = 9,
    ddp: bool = False,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Forward, loss and backward on all ranks, against one process with all sequences; batches: sequences of each rank."""
    kind = getattr(torch, dtype)
    expert_mesh, whole = mesh_of(mesh, dp)
    rank = dist.get_rank()
    model = hf.build(name, implementation, kind, **(changes or {}))
    plain = hf.build(name, "eager", kind, **(changes or {}))
    every = hf.example_inputs(model, batch=sum(batches), seq=seq)
    begin = sum(batches[:rank])
    own = {k: v[begin : begin + batches[rank]] for k, v in every.items()}
    routers = hf.routers(model)
    made = make_plan(plan, len(routers), routers[0].num_experts, expert_mesh.size())
    report = moec.parallelize(model, expert_mesh, made, dispatcher=dispatcher)
    compiled = torch.compile(model, backend="moec", options={"moec.inner": inner}, fullgraph=True)
    if ddp:
        compiled = nn.parallel.DistributedDataParallel(compiled)
    whole_graphs = torch._dynamo.config.patch(optimize_ddp=False)  # its graphs per bucket would cut layers in two
    with hf.recorded_choices(model) as choices, counted() as ran, whole_graphs:
        logits = compiled(**own).logits
        share = logits.shape[0] / sum(batches) if not ddp else 1  # DDP averages: equal batches, each its own mean
        loss = hf.loss_of(logits, own) * share if logits.numel() else logits.sum()
        loss.backward()
    moec.parallel.sync_gradients(model, whole, reduction="mean" if ddp else "sum", experts_only=ddp)
    total = loss.detach().clone().float() / (mesh.size() if ddp else 1)
    dist.all_reduce(total)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, choices)
    same = [torch.cat([c[i] for c in everyone]) for i in range(len(choices))]
    eager, ref = hf.run(plain, every, choices=same), hf.reference(plain, every, choices=same)
    got = hf.Run(logits.detach(), {n: p.grad for n, p in model.named_parameters()})
    at = slice(begin, begin + batches[rank])
    worst = hf.measure(
        got,
        part_of(model, eager, eager.logits[at]),
        part_of(model, ref, ref.logits[at]),
        torch.finfo(kind).eps,
    )
    assert worst.ratio <= 1, worst
    exact = float(hf.loss_of(ref.logits, every))
    assert abs(float(total) - exact) <= 16 * torch.finfo(kind).eps * abs(exact), (float(total), exact)
    for key, p in model.named_parameters():  # on every rank that has it, what is trained gets a gradient
        assert p.grad is not None or ref.grads[key] is None or mine(model, key, ref.grads[key]) is None, key
    return {"ran": dict(ran), "shares": shares(model), "report": str(report), "ratio": worst.ratio}


# -- layers --------------------------------------------------------------------------------------------------------------


def layer_of(kind: str, **changes: Any) -> nn.Module:
    """A layer in float64: an idiom of moec.models, or `moec.nn`."""
    if kind == "moec.nn":
        torch.manual_seed(0)
        sizes = {"d_model": layers.D, "d_ff": 16, "expansion": 3, "granularity": 2, "init_scale": 1.0}
        return moec.nn.MoE(**{**sizes, **changes}, dtype=torch.float64)
    return layers.build(kind, **changes)


def one_layer(
    mesh: DeviceMesh,
    kind: str,
    counts: list[int],
    plan: str | None = None,
    dispatcher: str | None = None,
    inner: str = "aot_eager",
    changes: dict[str, Any] | None = None,
    prepare: str | None = None,
    more: list[list[int]] | None = None,
) -> dict[str, Any]:
    """Value, gradient of x and of every parameter, against one process with all tokens. counts: tokens of each
    rank; more: those of later calls.
    """
    rank = mesh.get_local_rank()
    model, plain = (layer_of(kind, **(changes or {})) for _ in range(2))
    if prepare:
        for m in (model, plain):
            PREPARATIONS[prepare](m)
    experts = model.num_experts if hasattr(model, "num_experts") else layers.E
    made = make_plan(plan, 1, experts, mesh.size())
    moec.parallelize(model, mesh, made, args=(layers.tokens(7),), dispatcher=dispatcher)
    compiled = torch.compile(model, backend="moec", options={"moec.inner": inner}, fullgraph=True)
    for sizes in (counts, *(more or [])):
        every = layers.tokens(sum(sizes))
        begin = sum(sizes[:rank])
        x = every[begin : begin + sizes[rank]].detach().clone().requires_grad_()
        model.zero_grad()
        with counted() as ran:
            out = compiled(x)
            probe = torch.cos(torch.arange(every.numel(), dtype=torch.float64)).view(every.shape)
            out.backward(probe[begin : begin + sizes[rank]])
        moec.parallel.sync_gradients(model, reduction="sum")
        ref = layers.run(plain, plain, every)
        torch.testing.assert_close(out.detach(), ref.logits[begin : begin + sizes[rank]])
        torch.testing.assert_close(x.grad, ref.grads["x"][begin : begin + sizes[rank]])
        for name, p in model.named_parameters():
            want = mine(model, name, ref.grads[name])
            got = p.grad
            if want is None or got is None:
                assert want is None or not want.any(), name
                assert got is None or not got.any(), name
            else:
                torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")
    return {"ran": dict(ran), "shares": shares(model)}


def _on_two(layer: nn.Module) -> None:
    layers.prefer(layer, (0, 1))


PREPARATIONS: dict[str, Callable[[nn.Module], None]] = {"on two experts": _on_two}


# -- a model in use ------------------------------------------------------------------------------------------------------


def several(mesh: DeviceMesh, calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Several cases in a row, to save starting tests."""
    return [globals()[name](mesh, **arguments) for name, arguments in calls]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, dims=1).flatten())


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the whole model by name, on every rank."""
    state = entry.state_of(model)
    stacked = {n: layer for layer in state.layers for n in layer.found.stacked}
    found = {}
    for name, value in model.state_dict().items():
        if name not in stacked:
            found[name] = value.detach().clone()
            continue
        held = stacked[name].experts(state.rank, state.ranks)
        everyone: list[Any] = [None] * state.ranks
        dist.all_gather_object(
            everyone, {e: value[i].clone() for i, e in enumerate(held) if e >= 0}, state.mesh.get_group()
        )
        rows: dict[int, Tensor] = {}
        for told in everyone:
            for e, row in told.items():
                assert e not in rows or torch.equal(rows[e], row), f"copies of expert {e} of {name} differ"
                rows[e] = row
        found[name] = torch.stack([rows[e] for e in range(stacked[name].found.num_experts)])
    return found


def life(mesh: DeviceMesh, name: str, path: str, dispatcher: str) -> dict[str, Any]:
    """Three steps of AdamW with a rebalance after the first, beside one process; then a checkpoint."""
    import torch.distributed.checkpoint as dcp

    rank, world = mesh.get_local_rank(), mesh.size()
    model, plain = hf.build(name), hf.build(name)
    every = hf.example_inputs(model, batch=2 * world, seq=9)
    own = {k: v[2 * rank : 2 * rank + 2] for k, v in every.items()}
    experts = hf.routers(model)[0].num_experts
    first, second, third = (make_plan("copies", hf.NUM_MOE_LAYERS, experts, world, seed) for seed in range(3))
    moec.parallelize(model, mesh, first, dispatcher=dispatcher)
    compiled = torch.compile(model, backend="moec", options={"moec.inner": "aot_eager"}, fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]

    def step() -> tuple[float, float]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = hf.loss_of(compiled(**own).logits, own)
        loss.backward()
        moec.parallel.sync_gradients(model)
        want = hf.loss_of(plain(**every).logits, every)
        want.backward()
        for p in plain.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for optimizer in optimizers:
            optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / world, float(want.detach())

    losses = [step()]
    graphs = compiled_graphs()
    with torch.no_grad():
        before = compiled(**own).logits
    graphs = compiled_graphs()
    moved = moec.rebalance(model, second, optimizers[0])
    with torch.no_grad():
        after = compiled(**own).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert moved.slots > 0
    assert moec.rebalance(model, second, optimizers[0]).slots == 0
    losses.append(step())
    moec.rebalance(model, third, optimizers[0])
    losses.append(step())
    assert compiled_graphs() == graphs, "a rebalance compiled something"
    for got, want in losses:
        assert abs(got - want) < 1e-4 * want, losses
    whole = full_state(model)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(whole[key], value, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
    dcp.save(moec.parallel.state_dict(model), checkpoint_id=path)
    return {"whole": {k: v.numpy() for k, v in whole.items()}, "sent": moved.sent}


def resume(mesh: DeviceMesh, name: str, path: str, plan: str | None, whole: dict[str, Any]) -> None:
    """What another number of ranks saved, read under another plan; and a full state taken in."""
    import torch.distributed.checkpoint as dcp

    model = hf.build(name, seed=7)
    made = make_plan(plan, hf.NUM_MOE_LAYERS, hf.routers(model)[0].num_experts, mesh.size(), seed=5)
    moec.parallelize(model, mesh, made)
    state = moec.parallel.state_dict(model)
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: v.shape for k, v in whole.items()}
    dcp.load(state, checkpoint_id=path)
    for key, value in full_state(model).items():
        assert np.array_equal(value.numpy(), whole[key]), key
    other = hf.build(name, seed=8)
    moec.parallel.load_state_dict(model, other.state_dict())
    for key, value in full_state(model).items():
        assert torch.equal(value, other.state_dict()[key]), key


# -- refusals ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one set of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer_of("hit_stacked") for _ in range(2))
        self.layers[1].experts = self.layers[0].experts

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class ReadElsewhere(nn.Module):
    """The weights of the experts are penalized in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer_of("hit_stacked")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1e-3 * next(iter(self.layer.experts.parameters())).square().sum()


class Flat(nn.Module):
    """Experts in one matrix [E * F, D], viewed as a stack in the forward (DBRX)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(layers.D, 4, bias=False, dtype=torch.float64)
        self.up = nn.Parameter(torch.randn(4 * 8, layers.D, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(4 * 8, layers.D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        up, down = self.up.view(4, 8, -1), self.down.view(4, 8, -1)
        out = torch.zeros_like(x)
        for e in range(4):
            token, choice = torch.where(ids == e)
            y = F.silu(x[token] @ up[e].t()) @ down[e]
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


class NoExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(layers.D, layers.D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LastWins(nn.Module):
    """No routed sum: refused."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layer_of("skip_empty")

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.inner.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.inner.experts):
            token, choice = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out[token] = expert(x[token]) * weights[token, choice, None]
        return out


def refused(mesh: DeviceMesh, what: str, path: str) -> tuple[str, str]:
    """(class, message) of what parallelize raises; the model is as it was."""
    rank = mesh.get_local_rank()
    model: Any = layer_of("hit_stacked")
    settings: dict[str, Any] = {"args": (layers.tokens(5),)}
    given: Any = mesh
    if what == "corrupt plan":
        settings["plan"] = path
    elif what == "corrupt on one rank":
        settings["plan"] = path if rank else make_plan("random", 1, 8, mesh.size())
    elif what == "other E":
        settings["plan"] = make_plan("random", 1, 6, mesh.size())
    elif what == "other L":
        settings["plan"] = make_plan("random", 3, 8, mesh.size())
    elif what == "other GPUs":
        settings["plan"] = make_plan("random", 1, 8, 2 * mesh.size())
    elif what == "different plans":
        settings["plan"] = make_plan("random", 1, 8, mesh.size(), seed=rank)
    elif what == "no plan":
        settings["plan"] = {"slots": 3}
    elif what == "two dimensions":
        given = ranks.grid(mesh)
    elif what == "no mesh":
        given = dist.group.WORLD
    elif what == "compiled":
        model = torch.compile(model)
    elif what == "twice":
        moec.parallelize(model, mesh, **settings)
    elif what == "dispatcher":
        settings["dispatcher"] = "pigeons"
    elif what == "tokens":
        settings["tokens"] = 0
    elif what == "no inputs":
        settings = {}
    elif what == "wrong inputs":
        settings = {"args": (layers.tokens(5)[:, :3],)}
    else:
        model = {
            "tied": Tied,
            "read elsewhere": ReadElsewhere,
            "flat": Flat,
            "none": NoExperts,
            "not a sum": LastWins,
        }[what]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        moec.parallelize(model, given, **settings)
    except Exception as error:
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def _weights_of(model: nn.Module) -> Tensor:
    return model.experts.up_proj * 2


def _broken(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward that Dynamo gives up."""

    def forward(x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = x + model.experts.up_proj.sum()
        return x

    return forward


def misused(mesh: DeviceMesh) -> dict[str, str]:
    """What a parallelized layer says when it is used wrongly."""
    x = layers.tokens(5)
    model, found = layer_of("hit_stacked"), {}
    moec.parallelize(model, mesh, make_plan("random", 1, 8, mesh.size()), args=(x,))
    calls: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "another backend": lambda: torch.compile(model, backend="aot_eager")(x),
        "a part with another backend": lambda: torch.compile(_weights_of, backend="aot_eager")(model),
        "a break in the loop": lambda: torch.compile(_broken(model), backend="moec")(x),
        "switched off": lambda: torch.compile(model, backend="moec", options={"moec.disable": True})(x),
        "rebalance: other E": lambda: moec.rebalance(model, make_plan("random", 1, 6, mesh.size())),
        "rebalance: other slots": lambda: moec.rebalance(model, make_plan("copies", 1, 8, mesh.size())),
        "rebalance: different": lambda: moec.rebalance(
            model, make_plan("random", 1, 8, mesh.size(), seed=mesh.get_local_rank())
        ),
        "rebalance: none": lambda: moec.rebalance(model, None),
        "rebalance: other model": lambda: moec.rebalance(nn.Linear(2, 2), make_plan("random", 1, 8, mesh.size())),
        "state: missing": lambda: moec.parallel.load_state_dict(model, {}),
        "reduction": lambda: moec.parallel.sync_gradients(model, reduction="max"),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch._dynamo.reset()
    want = layer_of("hit_stacked")(x)
    got = torch.compile(model, backend="moec", options={"moec.inner": "eager"})(x)
    torch.testing.assert_close(got, want)  # and after all that it works as before
    torch._dynamo.reset()
    found["explain"] = str(moec.explain(model, x))
    return found
