"""The MoE families of transformers, as data: a model class, and what to change in its config so that it is small.

COMMON changes every config by the names of its fields, which the families share; what a family needs beyond that is in FAMILIES.
Each folder of transformers whose modeling file speaks of experts is there or in NOT_BUILT; `build.scan` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

E, K, LAYERS, BATCH, SEQ = 8, 2, 2, 2, 10

# Field of a config -> its value; fields that a config does not have are left out. Widths are multiples of 8, as torch's grouped
# GEMM wants rows of 16 bytes.
COMMON: Mapping[str, object] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 512,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    # experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_routed_experts": E,
    "num_experts_per_tok": K,
    "num_experts_per_token": K,
    "top_k_experts": K,
    "moe_topk": K,
    "moe_k": K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse"] * LAYERS,
    "num_dense_layers": 0,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "use_mamba_kernels": False,
}


@dataclass(frozen=True)
class Family:
    """`model`: class name, else the smallest text model of the folder. `dispatch`: what the modules that send tokens to experts
    are called, "name Class", as a pattern; each that runs is an MoE layer. `inputs`: the argument that takes hidden states
    [BATCH, SEQ, D], where the model takes no ids. `flags`: one that takes a zero or one for each token. `config`: beyond COMMON.
    """

    model: str = ""
    dispatch: str = r"Experts$"
    inputs: str = ""
    flags: str = ""
    config: Mapping[str, object] = field(default_factory=dict)


_HEADS = {"num_key_value_heads": 4}  # latent attention expands keys and values to all heads
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ERNIE_VL = {"moe_intermediate_size": [16, 8], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}

FAMILIES: Mapping[str, Family] = {
    "afmoe": Family(),
    "aria": Family(),
    "axk1": Family(config=_HEADS),
    "axk2": Family(config=_HEADS),
    "cohere2_moe": Family(),
    "dbrx": Family(
        config={
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": E, "moe_top_k": K, "hidden_size": 32},
            "rope_parameters": _ROPE,
        }
    ),
    "deepseek_ocr2": Family(config=_HEADS | {"mlp_layer_types": ["sparse"] * LAYERS}),
    "deepseek_v2": Family(config=_HEADS),
    "deepseek_v3": Family(config=_HEADS),
    "deepseek_v32": Family(config=_HEADS),
    "deepseek_v4": Family(config={"mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion_gemma": Family(),
    # the layer alone: in transformers 5.17 DogeDecoderLayer does not unpack the tuple that DogeCDMoE returns
    "doge": Family(
        model="DogeCDMoE",
        dispatch=r"CDMoE$",
        inputs="hidden_states",
        config={"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    "dots1": Family(),
    "ernie4_5_moe": Family(config={"moe_layer_start_index": 0}),
    "ernie4_5_vl_moe": Family(config=_ERNIE_VL),
    "ernie4_5_vl_moe:vision": Family(flags="moe_mm_token_type_ids", config=_ERNIE_VL),
    "exaone_moe": Family(),
    "flex_olmo": Family(),
    "gemma4": Family(
        config={
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(config=_HEADS),
    "glm4v_moe": Family(config={"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}),
    "glm5_next": Family(
        config=_HEADS
        | {
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        }
    ),
    "glm_moe_dsa": Family(config=_HEADS),
    "gpt_oss": Family(),
    "granitemoe": Family(),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family(),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family(),
    "hy_v3": Family(),
    "hy_v4": Family(config=_HEADS),
    "inkling": Family(dispatch=r"InklingExperts$"),
    "jamba": Family(config={"expert_layer_period": 1, "expert_layer_offset": 0}),
    "jetmoe": Family(dispatch=r"mlp.output_linear |experts.(input|output)_linear "),
    "kimi_linear": Family(config=_HEADS | {"linear_head_dim": 8, "linear_num_heads": 4}),
    "laguna": Family(),
    "lfm2_moe": Family(config={"layer_types": ["conv", "full_attention"]}),
    "llama4": Family(dispatch=r"TextMoe$"),
    "longcat_flash": Family(
        config={
            "num_layers": 1,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "zero_expert_num": 4,
            "n_routed_experts": E,
            "num_key_value_heads": 4,
        }
    ),
    "mellum": Family(),
    "mimo_v2_flash": Family(),
    "minimax": Family(),
    "minimax_m2": Family(),
    "minimax_m3_vl": Family(),
    "mistral4": Family(config=_HEADS),
    "mixtral": Family(),
    "nemotron_h": Family(
        config={"layers_block_type": ["mamba", "moe", "attention", "moe"], "moe_shared_expert_intermediate_size": 24}
    ),
    "nllb_moe": Family(
        dispatch=r"SparseMLP$",
        config={
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "pad_token_id": 1,
        },
    ),
    "olmoe": Family(),
    "openai_privacy_filter": Family(),
    "phimoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_5_moe": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_omni_moe": Family(),
    "qwen3_omni_moe:talker": Family(
        model="Qwen3OmniMoeTalkerModel", inputs="inputs_embeds", config={"shared_expert_intermediate_size": 24}
    ),
    "qwen3_vl_moe": Family(),
    "qwen4_exp": Family(),
    "solar_open": Family(),
    "step3p7": Family(config={"pad_token_id": 1, "share_expert_dim": 16}),
    "switch_transformers": Family(
        dispatch=r"SparseMLP$",
        config={
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "pad_token_id": 0,
        },
    ),
    "vitpose_backbone": Family(
        model="VitPoseBackbone",
        dispatch=r"NaiveMoe$",
        config={"num_experts": 4, "image_size": [32, 32], "part_features": 8},
    ),
    "zaya": Family(config={"num_experts_per_tok": 1, "router_hidden_size": 16}),
}

# folder -> why it is not in the zoo, though its modeling file speaks of experts
NOT_BUILT: Mapping[str, str] = {
    "bamba": "has no MoE: `num_experts` is the constant 1, left over from Jamba, and the layers are dense",
    "pi0": "has no MoE: its one `action expert` is a second transformer beside the first",
}
