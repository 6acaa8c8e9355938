"""Models of images and text, loaded by folder and traced for their text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from oki_trace.api import run_traced
from oki_trace.llm.loading.load import LoadedForText, load
from oki_trace.records import ModelChoice
from tests import models, tiny
from tests.llm.loading import refusal

TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Rotary embeddings by time, height and width; a text has the same in all three.
BY_SENSE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
DEEP: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}


def _both(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": {**TEXT, **text}, "vision_config": vision, **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "mistral3": _both(
        {"model_type": "mistral", "head_dim": 8},
        {"model_type": "pixtral", "head_dim": 16, **VISION},
        image_token_index=10,
    ),
    "qwen2_5_vl": _both({"rope_parameters": BY_SENSE}, DEEP, image_token_id=10, video_token_id=11),
    "qwen3_vl": _both(
        {"rope_parameters": BY_SENSE, "head_dim": 8},
        {**DEEP, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        image_token_id=10,
        video_token_id=11,
    ),
    "glm4v": _both(
        {"rope_parameters": {**BY_SENSE, "partial_rotary_factor": 1.0}},
        {**DEEP, "image_size": 32},
        image_token_id=10,
        video_token_id=11,
    ),
    "lfm2_vl": _both(
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
        {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
        image_token_id=10,
    ),
    "internvl": _both(
        {"model_type": "qwen2"},
        {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=10,
    ),
    "smolvlm": _both({"model_type": "llama", "head_dim": 8}, VISION, image_token_id=10),
    "kimi_k25": {"text_config": {"model_type": "deepseek_v3", **TEXT, **LATENT}},
}


def _saved(kind: str, folder: Path) -> Path:
    config = CONFIG_MAPPING[kind](**CONFIGS[kind])
    torch.manual_seed(0)
    made: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = made(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that the logits differ
    return models.save(folder, model, tiny.tokenizer())


@pytest.mark.parametrize("kind", CONFIGS)
def test_its_text_is_traced_as_it_generates(kind: str, tmp_path: Path) -> None:
    folder = _saved(kind, tmp_path)
    with pytest.warns(LoadedForText, match="for text only"):
        loaded = load(ModelChoice(str(folder)))
    assert loaded.text_only
    assert "for text only" in loaded.description
    turn = [{"role": "user", "content": "the fox"}]
    generate: Callable[..., Any] = loaded.model.generate
    ids = loaded.tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    wanted = generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    _, trace = run_traced(
        "the fox", max_new_tokens=6, model=loaded.model, tokenizer=loaded.tokenizer
    )
    assert [step["chosen_id"] for step in trace["steps"]] == wanted.tolist()
    assert trace["capture"]["lens_check"] < 1e-4
    assert trace["checks"]["lens"] < 1e-4
    assert any("for text only" in note for note in trace["checks"]["notes"])
    assert all(len(step["logit_lens"]) == tiny.LAYERS + 1 for step in trace["steps"])


def test_an_encoder_decoder_is_refused_still(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["florence2"]()
    config.architectures = ["Florence2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert "is an encoder-decoder model" in refusal(tmp_path)
