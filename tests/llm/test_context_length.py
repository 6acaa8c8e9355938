"""The context length by a model's config; YaRN as model cards enable it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from oki_trace.api import run_traced
from oki_trace.errors import CaptureError
from oki_trace.llm.decoding.generation import context_length
from oki_trace.llm.loading.load import load
from oki_trace.records import ModelChoice
from tests import models, tiny
from tests.llm.loading import edit_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_yarn_lengthens_the_context(tmp_path: Path, name: str) -> None:
    """The config keeps the unscaled length, as in model cards."""
    folder = models.save(tmp_path, tiny.model("llama"), tiny.tokenizer())
    changes = {"max_position_embeddings": 32, "rope_parameters": None, name: YARN}
    edit_config(folder, **changes)
    loaded = load(ModelChoice(str(folder)))
    model: Any = loaded.model
    assert model.config.max_position_embeddings == 32
    assert context_length(model) == 128
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the fox jumps over the lazy dog"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model.generation_config.eos_token_id = None
    wanted = model.generate(**ids, max_new_tokens=40, do_sample=False)
    _, trace = run_traced(
        "the fox jumps over the lazy dog",
        max_new_tokens=40,
        model=model,
        tokenizer=loaded.tokenizer,
    )
    assert trace["prompt_len"] + len(trace["steps"]) > 2 * 32
    assert [s["chosen_id"] for s in trace["steps"]] == wanted[0, trace["prompt_len"] :].tolist()
    with pytest.raises(CaptureError, match="context holds 128"):
        run_traced("dog " * 200, model=model, tokenizer=loaded.tokenizer)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 64),
        # Set in training: the length is the scaled one already.
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        ({"rope_type": "linear", "factor": 8.0}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 32,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            64,
        ),
    ],
    ids=["default", "yarn", "linear", "llama3"],
)
def test_other_scalings_have_the_config_s_length(rope: dict[str, Any], length: int) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        vocab_size=10,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    assert context_length(LlamaForCausalLM(config)) == length
