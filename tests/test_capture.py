"""Capture: every way of writing the dispatch arrives as one graph, and nothing else in the process notices.

Each form below is compared with itself, eager: values and gradients, over routings with empty experts. What a graph assumes
must be what its markers say.
"""

from __future__ import annotations

import operator
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moec import capture
from moec.capture import markers

T, D, FF, E, K = 17, 16, 8, 8, 2

capture.install()


class Recorder:
    """A backend that keeps the graphs and runs them eagerly."""

    _moec_backend = True

    def __init__(self, deny=False):
        self.graphs, self.places, self.deny = [], [], deny

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        self.places.append(markers.marker_places(gm))
        if self.deny and self.places[-1]:
            capture.retrace_without(self.places[-1], "the test says so")
        return gm.forward


class Expert(nn.Module):
    def __init__(self, width=FF, act=F.silu):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Router and experts; `skip` experts are never chosen."""

    def __init__(self, num_experts=E, skip=()):
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(D, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))
        bias = torch.zeros(num_experts)
        bias[list(skip)] = -100.0
        self.register_buffer("router_bias", bias)

    def route(self, x):
        weights, ids = torch.topk((self.gate(x) + self.router_bias).softmax(-1), K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class Where(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            out[token] += self.experts[e](x[token]) * weights[token, slot, None]
        return out


class WhereSkippingBySize(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.shape[0] == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return out


class WhereSkippingByNumel(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if not token.numel() > 0:
                continue
            out = out.index_add(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class WhereSkippingByLen(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            if len(token) and e >= 0:
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class BooleanMask(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                weight = (weights * (ids == e)).sum(-1, keepdim=True)
                out[mask] += self.experts[e](x[mask]) * weight[mask]
        return out


class BooleanMaskItem(BooleanMask):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = (ids == e).any(dim=-1)
            if not mask.any().item():
                continue
            out[mask] += self.experts[e](x[mask]) * (weights * (ids == e)).sum(-1, keepdim=True)[mask]
        return out


class OneHotCounts(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        counts = mask.sum(dim=(1, 2))
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            if counts[e] == 0:
                continue
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class CountTruth(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        counts = torch.zeros(self.num_experts, dtype=torch.int64)
        counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            if counts[e]:
                token, slot = torch.where(ids == e)
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class LitGPT(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        masks = ids.unsqueeze(-1) == torch.arange(self.num_experts, device=x.device)
        masks = masks.permute(2, 0, 1)
        y = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            y[token] += weights[token, slot, None] * expert(x[token])
        return y


class HuggingFaceV4(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current = x[None, top_x].reshape(-1, x.shape[-1])
            out.index_add_(0, top_x, (expert_layer(current) * weights[top_x, idx, None]).to(x.dtype))
        return out


class HuggingFaceV5(Layer):
    """Stacked weights, and the sentinel E for tokens that other ranks own."""

    def __init__(self, num_experts=E, skip=()):
        super().__init__(num_experts, skip)
        del self.experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * FF, D) / 4)
        self.down_proj = nn.Parameter(torch.randn(num_experts, D, FF) / 4)

    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        with torch.no_grad():
            expert_mask = F.one_hot(ids, num_classes=self.num_experts + 1).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            _, token_idx = torch.where(expert_mask[expert_idx])
            pos, token_idx = torch.where(expert_mask[expert_idx])
            gate, up = F.linear(x[token_idx], self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert_idx]) * weights[token_idx, pos, None]
            out.index_add_(0, token_idx, y.to(out.dtype))
        return out


class HitFlat(Layer):
    def ids_of(self, hit):
        return hit.nonzero().flatten()

    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        hit = torch.bincount(ids.flatten(), minlength=self.num_experts) > 0
        for e in self.ids_of(hit):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class HitSqueezeItem(HitFlat):
    def ids_of(self, hit):
        return [e.item() for e in torch.nonzero(hit).squeeze(-1)]


class HitList(HitFlat):
    def ids_of(self, hit):
        return torch.where(hit)[0].tolist()


class HitInt(HitFlat):
    def ids_of(self, hit):
        return [int(e) for e in torch.nonzero(hit, as_tuple=True)[0]]


class HitUnique(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in torch.unique(ids):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class DeepSeek(Layer):
    def counts(self, ids):
        counts = ids.new_zeros((ids.shape[0], self.num_experts))
        counts.scatter_(1, ids, 1)
        return counts.sum(dim=0)

    def forward(self, x):
        weights, ids = self.route(x)
        tokens_per_expert = self.counts(ids)
        order = ids.view(-1).argsort()
        sorted_tokens = x[order // ids.shape[1]]
        outputs, start_idx = [], 0
        for i, num_tokens in enumerate(tokens_per_expert.tolist()):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            outputs.append(self.experts[i](sorted_tokens[start_idx:end_idx]))
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class DeepSeekBincount(DeepSeek):
    def counts(self, ids):
        return torch.bincount(ids.view(-1), minlength=self.num_experts)


class DeepSeekBincountMethod(DeepSeek):
    def counts(self, ids):
        return ids.to(torch.int32).view(-1).bincount(minlength=self.num_experts)


class Split(Layer):
    def forward(self, x):
        weights, ids = self.route(x)
        order = ids.view(-1).argsort()
        counts = torch.bincount(ids.view(-1), minlength=self.num_experts)
        parts = torch.split(x[order // K], counts.tolist())
        outs = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return (new_x.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


FORMS = [
    Where, WhereSkippingBySize, WhereSkippingByNumel, WhereSkippingByLen, BooleanMask, BooleanMaskItem, OneHotCounts, CountTruth,
    LitGPT, HuggingFaceV4, HuggingFaceV5, HitFlat, HitSqueezeItem, HitList, HitInt, HitUnique,
    DeepSeek, DeepSeekBincount, DeepSeekBincountMethod, Split,
]  # fmt: skip
ASSUMING_NOTHING = {Where, LitGPT, Split}
ROUTINGS = {"all hit": (), "some empty": (0, 3, 7), "two take all": tuple(range(2, E))}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    capture.forget_denied()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model, backend=None):
    backend = backend or Recorder()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, backend=backend), backend


def breaks():
    counters = torch._dynamo.utils.counters  # the name of the counter changed between torch versions
    return sum(counters["graph_break"].values()) + sum(counters["unimplemented"].values())


def run(fn, model, x):
    """Value, gradient of x, gradients of all parameters; an expert without tokens counts as zero."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = fn(x)
    (y * torch.arange(1.0, y.numel() + 1).view_as(y).cos()).sum().backward()
    return [y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def assert_same(fn, model, x):
    for got, want in zip(run(fn, model, x), run(model, model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_that_computes_what_eager_does(form, routing):
    model = form(skip=ROUTINGS[routing]).double()
    fn, backend = compiled(model)
    assert_same(fn, model, torch.randn(T, D, dtype=torch.float64))
    assert (len(backend.graphs), breaks()) == (1, 0)
    assert bool(backend.places[0]) == (form not in ASSUMING_NOTHING)
    # The same graph must do for another routing of the same shape.
    assert_same(fn, model, torch.randn(T, D, dtype=torch.float64))
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("form", [WhereSkippingBySize, HuggingFaceV4, HuggingFaceV5, LitGPT, DeepSeek, Split])
def test_token_counts_do_not_recompile(form):
    model = form().double()
    fn, backend = compiled(model)
    for tokens in (1, 2, 17, 64, 333):
        assert_same(fn, model, torch.randn(tokens, D, dtype=torch.float64))
    assert len(backend.graphs) <= 3
    before = len(backend.graphs)
    assert_same(fn, model, torch.randn(91, D, dtype=torch.float64))
    assert len(backend.graphs) == before


# -- Nothing else in the process notices -------------------------------------------------------------------------------------


def helper(hit, x):
    """Branches and loops on what is really there."""
    rows = hit.nonzero()
    seen = [int(e) for e in rows.flatten()]
    if (hit > 100).any():
        seen.append(100)
    if rows.shape[0] == 0:
        seen.append(-1)
    return x * len(seen) + sum(seen)


class CallsHelper(HuggingFaceV4):
    def __init__(self, helper, **kwargs):
        super().__init__(**kwargs)
        self.helper = helper

    def forward(self, x):
        hit = torch.bincount(self.route(x)[1].flatten(), minlength=E)
        return self.helper(hit, super().forward(x))


@pytest.mark.parametrize("how", ["disable", "eager", "aot_eager"])
def test_helpers_of_others_called_from_inside_see_the_truth(how):
    inner = (
        torch.compiler.disable(helper)
        if how == "disable"
        else torch.compiler.disable(torch.compile(helper, backend=how))
    )
    for skip in ((), (0, 3)):
        model = CallsHelper(inner, skip=skip).double()
        reference = CallsHelper(helper, skip=skip).double()
        reference.load_state_dict(model.state_dict())
        fn, backend = compiled(model)
        x = torch.randn(T, D, dtype=torch.float64)
        torch.testing.assert_close(fn(x), reference(x))
        assert backend.graphs


def test_another_backend_is_untouched():
    def counting(gm, example_inputs):
        counting.graphs += 1
        assert not markers.marker_places(gm)
        return gm.forward

    counts = []
    for seams_used in (False, True):
        torch._dynamo.reset()
        if seams_used:
            model = HuggingFaceV4().double()
            assert_same(compiled(model)[0], model, torch.randn(T, D, dtype=torch.float64))
        counting.graphs = 0
        model = WhereSkippingBySize(skip=(0, 3)).double()
        assert_same(compiled(model, counting)[0], model, torch.randn(T, D, dtype=torch.float64))
        counts.append(counting.graphs)
    assert counts[0] == counts[1] > 1
    assert not torch._dynamo.config.capture_scalar_outputs
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops


def test_whose_backend():
    import functools

    from torch._dynamo.repro.after_dynamo import wrap_backend_debug

    ours, other = Recorder(), lambda gm, ex: gm.forward
    for wrapped in (
        ours,
        functools.partial(ours),
        wrap_backend_debug(ours, "moec"),
        wrap_backend_debug(functools.partial(ours), "moec"),
    ):
        assert capture.is_ours(wrapped)
    for wrapped in (other, functools.partial(other), wrap_backend_debug(other, "other"), None, "moec"):
        assert not capture.is_ours(wrapped)


def test_other_data_dependent_branches_break_as_before():
    def f(x):
        y = x * 2
        if y.sum() > 0:  # floating point: no count
            return y + 1
        return y - 1

    fn, backend = compiled(f)
    for x in (torch.ones(3), -torch.ones(3)):
        torch.testing.assert_close(fn(x), f(x))
    assert len(backend.graphs) == 3


# -- Assumptions can be taken back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [WhereSkippingBySize, BooleanMask, HuggingFaceV4, HitList, HitUnique, DeepSeek, HuggingFaceV5]
)
def test_retrace_without(form):
    model = form(skip=(0, 3)).double()
    fn, backend = compiled(model, Recorder(deny=True))
    x = torch.randn(T, D, dtype=torch.float64)
    with pytest.warns(UserWarning, match="test_capture.py:.*the test says so"):
        assert_same(fn, model, x)
    assert backend.places[0]
    assert not backend.places[-1]
    assert_same(fn, model, torch.randn(T, D, dtype=torch.float64))
    # A denied place stays denied for this module: no second warning when it is compiled for another shape.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(fn, model, torch.randn(T + 1, D, dtype=torch.float64))


def test_bincount_of_unknown_ids_is_an_assumption():
    def f(ids):
        return torch.bincount(ids, minlength=4) * 2

    fn, backend = compiled(f)
    torch.testing.assert_close(fn(torch.tensor([0, 1, 1])), torch.tensor([2, 4, 0, 0]))
    assert backend.places[0]
    torch._dynamo.reset()
    fn, backend = compiled(f, Recorder(deny=True))
    with pytest.warns(UserWarning, match="the test says so"):
        torch.testing.assert_close(fn(torch.tensor([0, 1, 5])), torch.tensor([2, 2, 0, 0, 0, 2]))
    assert not backend.places[-1]


def test_markers_survive_dead_code_elimination_and_cost_nothing():
    fn, backend = compiled(WhereSkippingBySize())
    fn(torch.randn(T, D))
    graph = backend.graphs[0].graph
    graph.eliminate_dead_code()
    assert sum(map(markers.is_marker, graph.nodes)) == E
    assert markers.assume(True, False, "x:1") is None
    assert markers.assume_every(torch.ones(3), "x:1") is None


# -- Equal iterations are stamped, and nobody can tell -----------------------------------------------------------------------


def rows(gm):
    """A graph as comparable data: operations, wiring, constants with their types, shapes, symbols."""
    number = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}

    def shape(value):
        if isinstance(value, torch.Tensor):
            return [str(n) for n in (*value.shape, *value.stride())], value.dtype, value.device, value.requires_grad
        if isinstance(value, (tuple, list)):
            return [shape(item) for item in value]
        return str(value)

    def leaf(value):
        return number[value] if isinstance(value, torch.fx.Node) else (type(value), repr(value))

    return [
        (
            node.op,
            node.name if node.op == "placeholder" else node.target,
            repr(torch.utils._pytree.tree_map(leaf, (node.args, node.kwargs))),
            repr(shape(node.meta.get("example_value"))),
            sorted(map(str, node.meta.get("unbacked_bindings", ()))),
        )
        for node in gm.graph.nodes
    ]


def tensors(gm):
    """The operations that make tensors, by shape, and which of them each reads; all sizes that the data decide are alike."""
    place = {node: i for i, node in enumerate(n for n in gm.graph.nodes if not is_number(n))}
    return [
        (node.target, re.sub(r"\bu\d+\b", "u", str(row[3])), [place[n] for n in node.all_input_nodes if n in place])
        for node, row in zip(gm.graph.nodes, rows(gm))
        if node in place
    ]


def is_number(node):
    """Or an index that nothing but numbers is made of."""
    if node.target is operator.getitem:
        return all(map(is_number, node.users))
    return node.op.startswith("call") and not isinstance(node.meta.get("example_value"), (torch.Tensor, tuple, list))


class GuardedRecorder(Recorder):
    """Remembers the guards as well: names and kinds."""

    def __call__(self, gm, example_inputs):
        guards = torch._guards.TracingContext.get().guards_context.dynamo_guards
        self.guards = sorted(
            {(re.sub(r"___\d+", "", str(g.name)), g.create_fn_name()) for g in guards}
        )  # names are numbered
        return super().__call__(gm, example_inputs)


def traced(model, x, stamping, borrow=False):
    torch._dynamo.reset()
    fn, backend = compiled(model, GuardedRecorder())
    with capture.stamping(stamping, borrow):
        y = fn(x)
    assert len(backend.graphs) == 1
    return y, backend


@pytest.fixture
def stamps(monkeypatch):
    """How many iterations were stamped."""
    from moec.capture.loops import Lesson

    repeat, count = Lesson.repeat, []

    def counting(self, *args):
        repeat(self, *args)
        count.append(args)

    monkeypatch.setattr(Lesson, "repeat", counting)
    return count


def assert_stamping_changes_nothing(model, guards=True):
    x = torch.randn(T, D, dtype=torch.float64)
    _, plain = traced(model, x, False)
    y, stamped = traced(model, x, True)
    assert rows(stamped.graphs[0]) == rows(plain.graphs[0])
    assert stamped.guards == plain.guards or not guards
    torch.testing.assert_close(y, model(x))


STAMPED = {
    Where: E - 3, WhereSkippingBySize: E - 3, WhereSkippingByNumel: E - 3, WhereSkippingByLen: E - 3, BooleanMask: E - 3,
    BooleanMaskItem: E - 3, OneHotCounts: E - 3, CountTruth: E - 3, LitGPT: E - 3, HuggingFaceV4: E - 3,
    HuggingFaceV5: E - 3, HitFlat: E - 3, HitUnique: E - 3, DeepSeek: E - 3, DeepSeekBincount: E - 3, Split: E - 3,
}  # fmt: skip


def test_everything_that_forbids_a_stamp_is_seen():
    """On a torch where this fails, no loop is stamped: slower, not wrong."""
    from moec.capture import watch

    assert watch.complete


@pytest.mark.parametrize("form", FORMS)
def test_stamped_graph_is_the_traced_graph(form, stamps):
    assert_stamping_changes_nothing(form(skip=(1, 6)).double())
    assert len(stamps) >= STAMPED.get(form, 0)


@pytest.mark.parametrize("form", [Where, LitGPT, HuggingFaceV5, DeepSeek])
def test_stamped_graph_is_the_traced_graph_with_symbolic_tokens(form):
    model = form().double()
    found = []
    for stamping in (False, True):
        torch._dynamo.reset()
        fn, backend = compiled(model)
        with capture.stamping(stamping, borrow=False):
            for tokens in (5, 11):
                fn(torch.randn(tokens, D, dtype=torch.float64))
        found.append(rows(backend.graphs[-1]))
        assert len(backend.graphs) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize("form", FORMS)
def test_borrowed_values_differ_only_in_sizes_that_the_data_decide(form):
    model, x = form(skip=(1, 6)).double(), torch.randn(T, D, dtype=torch.float64)
    (_, exact), (y, borrowing) = traced(model, x, True), traced(model, x, True, borrow=True)
    assert not markers.borrowed(exact.graphs[0])
    assert tensors(exact.graphs[0]) == tensors(borrowing.graphs[0])
    torch.testing.assert_close(y, model(x))


class ReadsWhatAnExpertMade(Layer):
    """Refused: the last expert's rows are read after the loop."""

    def forward(self, x):
        weights, ids = self.route(x)
        out, most = torch.zeros_like(x), x.new_zeros(())
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            rows = self.experts[e](x[token])
            most = most + rows.square().sum()
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out + most


def test_a_refused_loop_is_traced_again_with_values_of_its_own(monkeypatch):
    from moec import backend as entry

    model = ReadsWhatAnExpertMade().double()
    again, seen = [], []
    retrace, inner = capture.retrace_exactly, entry.compile_inner
    monkeypatch.setattr(capture, "retrace_exactly", lambda: again.append(1) or retrace())
    monkeypatch.setattr(entry, "compile_inner", lambda gm, *rest: seen.append(gm) or inner(gm, *rest))
    fn = torch.compile(model, backend="moec", options={"moec.inner": "aot_eager"})
    for tokens in (T, T + 3, T + 4):
        assert_same(fn, model, torch.randn(tokens, D, dtype=torch.float64))
    assert len(again) == 1  # not once more for another shape
    assert seen
    assert not any(map(markers.borrowed, seen))


def with_another_activation(model):
    model.experts[5].act = F.gelu


def with_another_width(model):
    model.experts[5] = Expert(width=FF + 3)


def with_another_class(model):
    class Doubling(Expert):
        def forward(self, x):
            return 2 * super().forward(x)

    model.experts[5] = Doubling()


def with_a_hook(model):
    model.experts[5].register_forward_hook(lambda module, args, out: out * 3)


def with_an_inner_hook(model):
    model.experts[5].up_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_a_frozen_weight(model):
    model.experts[5].up_proj.weight.requires_grad_(False)


def with_a_bias(model):
    model.experts[5].down_proj = nn.Linear(FF, D)


def with_a_shared_expert(model):
    model.experts[5] = model.experts[4]


def with_a_tied_weight(model):
    model.experts[6].up_proj.weight = model.experts[3].up_proj.weight


def with_a_patched_forward(model):
    model.experts[5].forward = lambda x: x * 0.5


ODD_EXPERTS = [
    with_another_activation, with_another_width, with_another_class, with_a_hook, with_an_inner_hook, with_a_frozen_weight,
    with_a_bias, with_a_shared_expert, with_a_tied_weight, with_a_patched_forward,
]  # fmt: skip


@pytest.mark.parametrize("form", [LitGPT, HuggingFaceV4])
@pytest.mark.parametrize("change", ODD_EXPERTS)
def test_one_expert_unlike_the_others(form, change):
    model = form()
    change(model)
    # A module met twice is guarded to be the same one, or, after a stamp, by its own name: both are complete.
    assert_stamping_changes_nothing(model.double(), guards=change is not with_a_shared_expert)


class OddLoop(Where):
    """`body` sees the loop's number in ways that a stamp could get wrong."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.scale = [1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 3.0]
        self.acts = nn.ModuleList(nn.GELU() if e == 5 else nn.SiLU() for e in range(E))
        self.special = self.experts[6]
        self.seen = 0

    def forward(self, x):
        return self.body(self, x, self.route(x)[1])


def branch_on_number(self, x, ids):
    out = torch.zeros_like(x)
    for e in range(E):
        y = self.experts[e](x)
        if e == 5:
            y = y * 2
        out = out + y
    return out


def number_in_arithmetic(self, x, ids):
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.experts[e](x) * (e // 4)
    return out


def number_in_a_list(self, x, ids):
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.experts[e](x) * self.scale[e]
    return out


def permuted_number(self, x, ids):
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.experts[[0, 1, 2, 5, 4, 3, 7, 6][e]](x)
    return out


def unparametrised_children(self, x, ids):
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + self.acts[e](x)
    return out


def identity_of_module(self, x, ids):
    out = torch.zeros_like(x)
    for expert in self.experts:
        out = out + (expert(x) if expert is not self.special else x)
    return out


def counter(self, x, ids):
    out, n = torch.zeros_like(x), 0
    for expert in self.experts:
        out = out + expert(x) * n
        n += 1
    return out


def attribute_counter(self, x, ids):
    out = torch.zeros_like(x)
    self.seen = 0
    for expert in self.experts:
        self.seen += 1
        out = out + expert(x) * self.seen
    return out


def length_of_list(self, x, ids):
    ys = []
    for expert in self.experts:
        ys.append(expert(x) * (2 if len(ys) == 5 else 1))
    return torch.stack(ys).sum(0)


def element_of_list(self, x, ids):
    ys = [x]
    for expert in self.experts:
        ys.append(expert(ys[-1]))
    return torch.stack(ys).sum(0)


def number_after_the_loop(self, x, ids):
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):  # noqa: B007
        y = expert(x)
        out = out + y
    return out * e + y


def leaves_early(self, x, ids):
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        if e == 6:
            break
        out = out + expert(x)
    return out


def growing_shape(self, x, ids):
    out = x
    for expert in self.experts:
        out = torch.cat([out, expert(x)])
        if out.shape[0] > 6 * T:
            out = out[:T]
    return out


def strings(self, x, ids):
    out = torch.zeros_like(x)
    for name, expert in self.experts.named_children():
        out = out + expert(x) * (2 if name == "5" else 1)
    return out


def one_tensor_many_times(self, x, ids):
    out, other = torch.zeros_like(x), x + 1
    for weight, expert in zip([other, other, other, other, x, other, x, other], self.experts):
        out = out + expert(x) * weight
    return out


def tensors_of_two_shapes(self, x, ids):
    out = torch.zeros_like(x)
    for weight, expert in zip([x, x + 1, x + 2, x + 3, (x + 4)[:, :1], x + 5, x + 6, x + 7], self.experts):
        out = out + (expert(x) * weight if weight.shape[1] == D else expert(x) - weight)
    return out


def two_alternating_bodies(self, x, ids):
    out = torch.zeros_like(x)
    for i, expert in zip([0, 1] * 4, self.experts):
        out = out + expert(x) * i
    return out


def nested_loops(self, x, ids):
    out = torch.zeros_like(x)
    for _ in range(5):
        for expert in self.experts:
            out = out + expert(x)
    return out


def written_in_place(self, x, ids):
    ys = [expert(x) for expert in self.experts]
    for y in ys:
        y.mul_(2)
    ys[-1].add_(1)
    return torch.stack(ys).sum(0)


def swapped_variables(self, x, ids):
    a, b = x, x + 1
    for expert in self.experts:
        a, b = b, expert(a)
    return a - b


ODD_LOOPS = [
    branch_on_number, number_in_arithmetic, number_in_a_list, permuted_number, unparametrised_children, identity_of_module,
    counter, attribute_counter, length_of_list, element_of_list, number_after_the_loop, leaves_early, growing_shape, strings,
    one_tensor_many_times, tensors_of_two_shapes, two_alternating_bodies, nested_loops, written_in_place, swapped_variables,
]  # fmt: skip


@pytest.mark.parametrize("body", ODD_LOOPS)
def test_loops_that_are_not_one_body_repeated(body):
    assert_stamping_changes_nothing(OddLoop(body).double())


def test_a_changed_expert_is_noticed(stamps):
    model = Where().double()
    fn, backend = compiled(model)
    x = torch.randn(T, D, dtype=torch.float64)
    torch.testing.assert_close(fn(x), model(x))
    assert len(stamps) == E - 3
    model.experts[5].act = torch.tanh
    torch.testing.assert_close(fn(x), model(x))
    assert len(backend.graphs) == 2


# -- Numbers that depend on an assumption ------------------------------------------------------------------------------------


class CountsUsedExperts(Layer):
    def forward(self, x):
        _, ids = self.route(x)
        out, used = torch.zeros_like(x), 0
        for e in range(self.num_experts):
            token, _ = torch.where(ids == e)
            if token.numel() == 0:
                continue
            used += 1
            out.index_add_(0, token, self.experts[e](x[token]))
        return out / used


class CountsHitExperts(Layer):
    def forward(self, x):
        _, ids = self.route(x)
        out, used = torch.zeros_like(x), 0
        for e in (torch.bincount(ids.flatten(), minlength=self.num_experts) > 0).nonzero():
            token, _ = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]))
            used += 1
        return out / used


class NumbersHitExperts(Layer):
    def forward(self, x):
        _, ids = self.route(x)
        out = torch.zeros_like(x)
        for i, e in enumerate((torch.bincount(ids.flatten(), minlength=self.num_experts) > 0).nonzero().flatten()):
            token, _ = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * i)
        return out


class RemembersOneExpertsTokens(Layer):
    """What is remembered was there before the loop; whether it is depends on expert 3."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.kept = None

    def forward(self, x):
        weights, ids = self.route(x)
        out, self.kept = torch.zeros_like(x), weights
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            if e == 3:
                self.kept = ids
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out + self.kept.sum()


class Held:
    last = None


class Stream(nn.Module):
    """Layers in a loop; what each one makes is kept in an object that was there before, or in a cell."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(WhereSkippingByNumel() for _ in range(2))

    def forward(self, x):
        held = Held()
        h = x + 1
        scales = {i: h.mean() for i in range(2)}  # before Python 3.12 a comprehension makes `h` a cell
        for i, layer in enumerate(self.layers):
            held.last = h * 2
            h = h + layer(h) * scales[i]
        return h + held.last


def test_a_tensor_made_in_the_loop_may_be_kept():
    model = Stream().double()
    fn, backend = compiled(model)
    assert_same(fn, model, torch.randn(T, D, dtype=torch.float64))
    assert len(backend.graphs) == 1
    assert backend.places[0]


@pytest.mark.parametrize("stamping", [True, False])
@pytest.mark.parametrize("form", [RemembersOneExpertsTokens, CountsUsedExperts, CountsHitExperts, NumbersHitExperts])
@pytest.mark.filterwarnings("ignore:moec. traced again")
def test_python_numbers_that_depend_on_the_routing(form, stamping):
    model = form(skip=(0, 3)).double()
    fn, backend = compiled(model)
    with capture.stamping(stamping):
        assert_same(fn, model, torch.randn(T, D, dtype=torch.float64))
    assert not any(backend.places)


def test_nobody_reads_the_nonzero_of_hits():
    for form in (HuggingFaceV4, HuggingFaceV5, HitFlat, HitList, HitUnique):
        torch._dynamo.reset()
        fn, backend = compiled(form())
        fn(torch.randn(T, D))
        targets = [getattr(node.target, "__name__", node.target) for node in backend.graphs[0].graph.nodes]
        assert not {"nonzero", "unique"} & set(targets)
        assert targets.count("assume_every") == 1
