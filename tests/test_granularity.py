"""Granularity: the table of open models, every MoE config of transformers, modules, and errors that say what to change."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib
import inspect
import pkgutil

import pytest
import torch
import transformers
from torch import nn

import moec
from moec.errors import GranularityError, MoecError
from moec.granularity import ExpertShape
from moec.granularity.configs import shapes_in_config
from moec.granularity.modules import shapes_in_weights

from . import hf, layers

# shared/research/law.md, section 5: class, (d, d_expert, experts, k, shared experts), and as printed there the paper's G, 2d/d_e,
# d/d_e and the active width over d
OPEN_MODELS = {
    "Mixtral-8x7B": ("MixtralConfig", (4096, 14336, 8, 2, 0), ("1.14", "0.57", "0.29", "7.0")),
    "gpt-oss-20b": ("GptOssConfig", (2880, 2880, 32, 4, 0), ("4", "2", "1", "4.0")),
    "gpt-oss-120b": ("GptOssConfig", (2880, 2880, 128, 4, 0), ("4", "2", "1", "4.0")),
    "OLMoE": ("OlmoeConfig", (2048, 1024, 64, 8, 0), ("8", "4", "2", "4.0")),
    "Moonlight": ("DeepseekV3Config", (2048, 1408, 64, 6, 2), ("5.8", "2.9", "1.5", "5.5")),
    "DeepSeek-V2-Lite": ("DeepseekV2Config", (2048, 1408, 64, 6, 2), ("5.8", "2.9", "1.5", "5.5")),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", (2048, 768, 128, 8, 0), ("10.7", "5.3", "2.7", "3.0")),
    "Qwen3-235B": ("Qwen3MoeConfig", (4096, 1536, 128, 8, 0), ("10.7", "5.3", "2.7", "3.0")),
    "GLM-4.5": ("Glm4MoeConfig", (5120, 1536, 160, 8, 1), ("13.3", "6.7", "3.3", "2.7")),
    "GLM-4.5-Air": ("Glm4MoeConfig", (4096, 1408, 128, 8, 1), ("11.6", "5.8", "2.9", "3.1")),
    "MiniMax-M2": ("MiniMaxM2Config", (3072, 1536, 256, 8, 0), ("8", "4", "2", "4.0")),
    "GLM-5": ("GlmMoeDsaConfig", (6144, 2048, 256, 8, 1), ("12", "6", "3", "3.0")),
    "DeepSeek-V3": ("DeepseekV3Config", (7168, 2048, 256, 8, 1), ("14", "7", "3.5", "2.6")),
    "Kimi-K2": ("DeepseekV3Config", (7168, 2048, 384, 8, 1), ("14", "7", "3.5", "2.6")),
    "Qwen3-Next-80B": ("Qwen3NextConfig", (2048, 512, 512, 10, 1), ("16", "8", "4", "2.75")),
    "Qwen3.5-35B-A3B": ("Qwen3_5MoeTextConfig", (2048, 512, 256, 8, 1), ("16", "8", "4", "2.25")),
    "Ling-mini-beta": ("dict", (2048, 384, 384, 12, 1), ("21.3", "10.7", "5.3", "2.4")),
}
NAMES = {
    "MixtralConfig": ("intermediate_size", "num_local_experts", None),
    "GptOssConfig": ("intermediate_size", "num_local_experts", None),
    "OlmoeConfig": ("intermediate_size", "num_experts", None),
    "DeepseekV3Config": ("moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
    "DeepseekV2Config": ("moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
    "Qwen3MoeConfig": ("moe_intermediate_size", "num_experts", None),
    "Glm4MoeConfig": ("moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
    "MiniMaxM2Config": ("intermediate_size", "num_local_experts", None),
    "GlmMoeDsaConfig": ("moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
    "Qwen3NextConfig": ("moe_intermediate_size", "num_experts", "shared_expert_intermediate_size"),
    "Qwen3_5MoeTextConfig": ("moe_intermediate_size", "num_experts", "shared_expert_intermediate_size"),
    "dict": ("moe_intermediate_size", "num_experts", "num_shared_experts"),
}


@pytest.mark.parametrize("model", OPEN_MODELS)
def test_open_models(model: str) -> None:
    kind, (d, d_expert, experts, k, shared), printed = OPEN_MODELS[model]
    width, count, shared_name = NAMES[kind]
    sizes = {"hidden_size": d, width: d_expert, count: experts, "num_experts_per_tok": k}
    if shared_name is not None:
        sizes[shared_name] = shared * d_expert if shared_name.endswith("size") else shared
    config = sizes if kind == "dict" else getattr(transformers, kind)(**sizes)
    (shape,) = moec.granularity_of(config)
    assert (shape.d_model, shape.d_expert, shape.num_experts, shape.top_k) == (d, d_expert, experts, k)
    assert (shape.shared, shape.gated, shape.d_ff) == (shared * d_expert, True, None)
    got = (shape.granularity, shape.granularity_el, shape.granularity_sonic, shape.active_width)
    for number, text in zip(got, printed):
        digits = len(text.partition(".")[2])
        assert number == pytest.approx(float(text), abs=0.51 * 10**-digits), (got, printed)


def moe_configs() -> dict[str, transformers.PreTrainedConfig]:
    """Every config of transformers, with its default sizes, whose source speaks of experts."""
    found = {}
    for module in pkgutil.iter_modules(transformers.models.__path__):
        if not module.ispkg:
            continue
        name = f"transformers.models.{module.name}.configuration_{module.name}"
        if importlib.util.find_spec(name) is None:
            continue
        source = inspect.getsource(loaded := importlib.import_module(name))
        if "num_experts" not in source and "n_routed_experts" not in source and "num_local_experts" not in source:
            continue
        for kind in vars(loaded).values():
            if isinstance(kind, type) and kind.__module__ == name and hasattr(kind, "model_type"):
                found[kind.__name__] = kind()
    return found


def test_configs_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """Most can be read; those that cannot are named, and are dense by default or leave a size to the checkpoint."""
    read, unread = {}, {}
    for name, config in moe_configs().items():
        try:
            read[name] = moec.granularity_of(config)
        except GranularityError as error:
            unread[name] = str(error)
    with capsys.disabled():
        print(f"\n{len(read)} configs read; not read: {', '.join(unread)}")
    assert len(read) >= 60
    missing = {name for name, told in unread.items() if "does not tell" in told}
    assert missing == {"DeepseekOcr2TextConfig", "DeepseekOcr2Config", "DeepseekV2Config"}, "their top-k has no default"
    assert all("moec.granularity_of(config, top_k=...)" in unread[name] for name in missing)
    assert not {name for name in set(unread) - missing if "has no experts" not in unread[name]}
    for name in missing:
        assert moec.granularity_of(moe_configs()[name] if name in read else getattr(transformers, name)(), top_k=6)


TINY = {"num_hidden_layers": 2, "vocab_size": 32}


@pytest.mark.parametrize(
    "name",
    ["MixtralModel", "Qwen2MoeModel", "Glm4MoeModel", "GptOssModel", "MiniMaxM2Model", "Llama4TextModel", "PhimoeModel",
     "Ernie4_5_MoeModel", "NemotronHModel", "DeepseekV3Model", "JambaModel", "GraniteMoeModel"],
)  # fmt: skip
def test_two_witnesses(name: str) -> None:
    """What the config says is what the weights of the model say, on the meta device."""
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class._from_config(model_class.config_class())
    assert moec.granularity_of(model) == tuple(dict.fromkeys(shapes_in_weights(model, {})))
    assert moec.granularity_of(model) == moec.granularity_of(model.config)


def test_configs_inside_configs() -> None:
    assert moec.granularity_of(transformers.Llama4Config()) == moec.granularity_of(transformers.Llama4TextConfig())
    omni = moec.granularity_of(transformers.Qwen3OmniMoeConfig())
    assert [(s.d_model, s.d_expert) for s in omni] == [(2048, 768), (1024, 384)], "the thinker's and the talker's"
    dbrx = transformers.DbrxConfig(
        d_model=6144, ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}
    )
    assert moec.granularity_of(dbrx) == (ExpertShape(6144, 10752, 16, 4),)
    ernie = moec.granularity_of(transformers.Ernie4_5_VLMoeTextConfig())
    assert [s.d_expert for s in ernie] == [1536, 512], "experts for text and for images"


def test_lists_by_layer() -> None:
    """Layers that differ give one shape each, dense layers none."""
    config = {"hidden_size": 64, "moe_intermediate_size": 16, "num_experts": [1, 8, 8, 16], "moe_topk": [1, 2, 2, 4]}
    assert moec.granularity_of(config) == (ExpertShape(64, 16, 8, 2), ExpertShape(64, 16, 16, 4))


def test_missing_and_ambiguous() -> None:
    sizes = {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    assert moec.granularity_of(sizes) == (ExpertShape(64, 16, 8, 2),)
    for name, keyword in (
        ("hidden_size", "d_model"),
        ("moe_intermediate_size", "d_expert"),
        ("num_experts_per_tok", "top_k"),
    ):
        less = {k: v for k, v in sizes.items() if k != name}
        with pytest.raises(GranularityError, match=rf"does not tell {keyword}.*{name}.*{keyword}=\.\.\."):
            moec.granularity_of(less)
        assert moec.granularity_of(less, **{keyword: sizes[name]}) == moec.granularity_of(sizes)
    with pytest.raises(GranularityError, match="num_local_experts=4 and num_experts=8.*num_experts=8"):
        moec.granularity_of({**sizes, "num_local_experts": 4})
    with pytest.raises(GranularityError, match="has no experts"):
        moec.granularity_of({"hidden_size": 64, "intermediate_size": 256})
    with pytest.raises(GranularityError, match="LlamaConfig has no experts"):
        moec.granularity_of(transformers.LlamaConfig())
    with pytest.raises(GranularityError, match="Linear has no experts"):
        moec.granularity_of(nn.Linear(2, 2))


def test_keywords_take_precedence() -> None:
    (shape,) = moec.granularity_of(transformers.OlmoeConfig(), d_ff=5504, shared=64, gated=False, top_k=4)
    assert (shape.d_ff, shape.shared, shape.gated, shape.top_k) == (5504, 64, False, 4)
    assert shape.granularity == 5504 / shape.d_expert


def test_layers_of_moec() -> None:
    fine = moec.nn.MoE(d_model=16, d_ff=64, expansion=2, granularity=8, shared_experts=2)
    coarse = moec.nn.MoE(d_model=16, d_ff=64, expansion=2, granularity=2, gated=True)
    assert moec.granularity_of(nn.Sequential(fine, coarse, fine)) == (
        ExpertShape(16, 8, 16, 8, shared=16, gated=False, d_ff=64),
        ExpertShape(16, 32, 4, 2, gated=True, d_ff=64),
    )


def test_declared_modules() -> None:
    model = hf.build("qwen3_moe")
    assert moec.granularity_of(model) == (ExpertShape(40, 24, 8, 3),)
    moec.declare(model.model.layers[0].mlp, granularity=8)
    moec.declare(model.model.layers[1].mlp, d_ff=72)
    assert moec.granularity_of(model) == (ExpertShape(40, 24, 8, 3, d_ff=192), ExpertShape(40, 24, 8, 3, d_ff=72))
    assert [s.granularity for s in moec.granularity_of(model)] == [8, 3]


@pytest.mark.parametrize("idiom", ["static_where", "hit_stacked", "one_hot", "grouped_mm"])
def test_weights_alone(idiom: str) -> None:
    """No config: stacks or lists of modules, and the router that says which side is the model's."""
    layer = layers.build(idiom)
    (shape,) = moec.granularity_of(nn.Sequential(nn.Linear(3, layers.D), layer))
    assert (shape.d_model, shape.d_expert, shape.num_experts, shape.top_k) == (layers.D, layers.F, layers.E, layers.K)


def test_a_list_of_equal_blocks_is_not_experts() -> None:
    block = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
    assert shapes_in_weights(nn.ModuleList([block, nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))]), {}) == []
    assert shapes_in_config(transformers.LlamaConfig(), {}) == []


def test_conventions() -> None:
    shape = ExpertShape(d_model=768, d_expert=192, num_experts=64, top_k=16, shared=384)
    assert (shape.granularity, shape.granularity_el, shape.granularity_sonic) == (16, 8, 4)
    assert shape.granularity_matched == pytest.approx(8 / 3 * 4)
    assert (shape.active_width, shape.activation_ratio, shape.expansion_rate) == (4.5, 0.25, 4)
    paper = ExpertShape.of_granularity(d_model=512, d_ff=2048, expansion=8, granularity=16)
    assert (paper.num_experts, paper.d_expert, paper.top_k, paper.granularity) == (128, 128, 16, 16)
    assert (paper.active_width, paper.expansion_rate) == (4, 8)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"top_k": 9}, "lower top_k to at most 8"),
        ({"d_expert": 0}, "d_expert is a whole number of at least 1, not 0"),
        ({"d_model": 2.5}, "d_model is a whole number"),
        ({"shared": -1}, "shared is a whole number of at least 0"),
        ({"num_experts": True}, "num_experts is a whole number"),
    ],
)
def test_impossible_sizes(sizes: dict[str, object], says: str) -> None:
    with pytest.raises(GranularityError, match=says):
        ExpertShape(**{"d_model": 16, "d_expert": 8, "num_experts": 8, "top_k": 2, **sizes})


def test_errors_that_say_what_to_change() -> None:
    with pytest.raises(
        GranularityError, match="granularity=12 does not divide d_ff=64; the nearest that do are 4, 8, 16"
    ):
        ExpertShape.of_granularity(16, 64, 2, 12)
    with pytest.raises(MoecError, match="give the number of experts that a token visits"):
        _ = ExpertShape(16, 8, 8, None).active_width
