"""A tiny random model of each causal model type: one set of sizes, and a few of their own.

Configs name the same size differently (``n_embd``, ``d_model``), so the
generic set holds all the names. What a type needs beyond it stands in
``SETTINGS``; a value of ``LEAVE`` takes a generic one away.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 300
LAYERS = 3
WINDOW = 6
"""Keys a sliding or chunked layer sees: fewer than a prompt of these tests has."""

TOO_BIG = 20_000_000
LEAVE = object()

GENERIC: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Larger than the default, so that the logits differ and ties do not happen.
    "initializer_range": 0.3,
    "init_std": 0.3,
    "is_decoder": True,
}

# Sizes that only some families read; the others ignore them.
GENERIC |= {
    # latent attention (MLA), and its indexer
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 128,
    "index_head_dim": 8,
    "index_n_heads": 4,
    # state space and linear attention
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}

TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "vision_output_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim"), 32),
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 8,
}
"""The image or audio part of a model that has one: as small as it goes, for it is not run."""

MIXED = ["linear_attention", "linear_attention", "full_attention"]
FULL_HEADS = {"num_key_value_heads": 4}

DOTS3_NOTE = {
    **FULL_HEADS,
    "head_dim": 16,
    "shared_experts_intermediate_size": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
QWEN4_EXP = {
    "layer_types": MIXED,
    "hc_lowrank": 8,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 128,
    "indexer_compress_ratio": 4,
}

SETTINGS: dict[str, dict[str, Any]] = {
    # Latent attention has as many key heads as query heads.
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        FULL_HEADS,
    ),
    # Hybrids, whose cache needs a layer with attention.
    "bailing_hybrid": {"layer_types": MIXED, **FULL_HEADS},
    "granitemoehybrid": {"layer_types": MIXED},
    "kimi_linear": {"layer_types": MIXED, **FULL_HEADS},
    "qwen3_5": {"text_config": {"layer_types": MIXED}},
    "qwen3_5_moe": {"text_config": {"layer_types": MIXED}},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_5_text": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
    "big_bird": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 32},
        "decoder_config": {
            "vocab_size": VOCABULARY,
            "hidden_size_global": 32,
            "num_hidden_layers": LAYERS,
        },
        "patcher_config": {"vocab_size": VOCABULARY},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v4": {"compress_rates": {"heavily_compressed_attention": 4}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS3_NOTE,
        "vision_config": {
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4": {
        "text_config": {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
        }
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "moshi": {"sliding_window": LEAVE},  # its cache cuts at the window, its attention does not
    "prophetnet": {"num_hidden_layers": LEAVE, "num_encoder_layers": 3, "num_decoder_layers": 3},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"]},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""The settings of a type besides the generic sizes."""


_DRAFTS = "drafts for a larger model, and needs its keys and values"
_AUDIO = "speaks audio codes, not text; AutoModelForCausalLM cannot build it from its own config"

NOT_BUILT = {
    "gemma3n": "its image part needs the timm package; its text part is gemma3n_text",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}
"""Why a type is not built here."""


def build(model_type: str, **changes: Any) -> Any:
    """A tiny model of ``model_type`` in evaluation mode, the same each time.

    ``changes`` are settings beyond its own. Raises whatever transformers raises
    when it cannot be built so.
    """
    config = CONFIG_MAPPING[model_type](**{**_arguments(model_type), **changes})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > TOO_BIG:
        raise ValueError(f"{parameters:,} parameters: give it smaller sizes in SETTINGS")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Random models end their replies at random.
    model.generation_config.eos_token_id = None
    return model


def _arguments(model_type: str) -> dict[str, Any]:
    """The arguments of the config: the generic sizes it accepts, then its own settings."""
    made_by = CONFIG_MAPPING[model_type]
    own = SETTINGS.get(model_type, {})
    arguments = _known(GENERIC, made_by)
    for part in made_by.sub_configs:
        default = getattr(made_by(), part, None)
        if default is not None:
            is_text = part in ("text_config", "decoder")
            arguments[part] = _known(GENERIC if is_text else TOWER, type(default))
    for name, value in own.items():
        if value is LEAVE:
            arguments.pop(name, None)
        elif name in made_by.sub_configs:
            arguments[name] = {**arguments[name], **value}
        else:
            arguments[name] = value
    return arguments


def _known(sizes: dict[str, Any], made_by: type[Any]) -> dict[str, Any]:
    """Those a config declares: others would stay on it, and be found there by the cache."""
    names = {f.name for f in fields(made_by)} | set(made_by.attribute_map)
    return {name: value for name, value in sizes.items() if name in names}
