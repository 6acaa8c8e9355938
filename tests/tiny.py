"""Tiny random models, one per family, and a small real tokenizer: built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 300
LAYERS = 3
WINDOW = 6

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer that can encode any text."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Larger than the default, so that the logits differ and ties do not happen.
    "initializer_range": 0.4,
}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2))


def _gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.4,
    )
    return GPT2LMHeadModel(config)


def _neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON))


def _qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**_COMMON, num_key_value_heads=2))


def _gemma2() -> Any:
    return Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=WINDOW,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=8,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
}


def model(family: str, seed: int = 0) -> Any:
    """A tiny model of this family with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def final_norm_and_head(built: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The family's own final norm, head and what comes after, written out by hand."""
    if isinstance(built, GPT2LMHeadModel):
        return lambda h: built.lm_head(built.transformer.ln_f(h))
    if isinstance(built, GPTNeoXForCausalLM):
        head = built.get_output_embeddings()
        return lambda h: head(built.gpt_neox.final_layer_norm(h))
    if isinstance(built, Gemma2ForCausalLM):
        cap = built.config.final_logit_softcapping
        return lambda h: torch.tanh(built.lm_head(built.model.norm(h)) / cap) * cap
    return lambda h: built.lm_head(built.model.norm(h))
