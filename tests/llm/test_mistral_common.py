"""Checkpoints with mistral-common's tokenizer: read by transformers' own code, or refused."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.tokenization_mistral_common import MistralCommonBackend

from oki_trace.api import run_traced
from oki_trace.errors import CaptureError
from oki_trace.llm.loading.load import PlainPrompts, load
from oki_trace.records import ModelChoice
from tests import tiny
from tests.llm.loading import llama_config, write_tokenizer

SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
}
SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def write_tekken(folder: Path) -> None:
    """A tiny vocabulary in mistral-common's own format: every byte, and a few pairs."""
    pieces = [bytes([i]) for i in range(256)] + [b"th", b"fo"]
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
        for i, p in enumerate(pieces)
    ]
    specials = [
        {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(SPECIALS)
    ]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + len(SPECIALS),
        "default_num_special_tokens": len(SPECIALS),
        "version": "v7",
    }
    content = {"config": config, "vocab": vocabulary, "special_tokens": specials}
    (folder / "tekken.json").write_text(json.dumps(content))


def test_tekken_json_alone_is_enough(tmp_path: Path) -> None:
    config = MistralConfig(
        **{k: v for k, v in llama_config().to_dict().items() if k in SIZES}, eos_token_id=2
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    write_tekken(tmp_path)
    with pytest.warns(PlainPrompts, match="has no chat template, so its prompts are plain"):
        loaded = load(ModelChoice(str(tmp_path)))
    assert not isinstance(loaded.tokenizer, MistralCommonBackend)
    _, trace = run_traced(
        "the fox", max_new_tokens=4, model=loaded.model, tokenizer=loaded.tokenizer
    )
    assert "".join(trace["prompt_tokens"]) == trace["prompt"]
    assert "USER: the fox" in trace["prompt"]
    assert len(trace["steps"]) > 0


def test_tokenizer_json_takes_precedence(tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    write_tekken(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainPrompts)
        loaded = load(ModelChoice(str(tmp_path)))
    assert not isinstance(loaded.tokenizer, MistralCommonBackend)
    assert "[INST]" not in loaded.tokenizer.get_vocab()


def test_its_tokenizer_object_is_refused_with_a_fix() -> None:
    handed_in = object.__new__(MistralCommonBackend)  # its package need not be here
    with pytest.raises(CaptureError, match="mistral_format=False"):
        run_traced("the fox", model=tiny.model("llama"), tokenizer=handed_in)
