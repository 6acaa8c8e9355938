"""A real model that says what a test wants: its next token depends on the position alone.

A GPT-2 whose blocks add nothing: the residual stream is the position's own vector,
and the head gives the scripted token of that position the largest logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

WIDTH = 512


def model(tokenizer: Any, script: dict[int, str], positions: int = 1024) -> Any:
    """A model that goes on with ``script[n]`` after a prompt of n tokens, and then ends."""
    vocabulary, eos = len(tokenizer), tokenizer.eos_token_id
    built = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos,
        )
    )
    said: dict[int, int] = {}
    for start, text in script.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said.update(enumerate(ids, start=start - 1))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(positions, WIDTH, generator=generator)
    # The same at every position: what the model says where nothing is scripted.
    vectors[:, 0] = 4.0
    with torch.no_grad():
        built.transformer.wte.weight.zero_()
        built.transformer.wpe.weight.copy_(vectors)
        built.lm_head.weight.zero_()
        built.lm_head.weight[eos, 0] = 60.0
        for position, token_id in said.items():
            built.lm_head.weight[token_id, 1:] += vectors[position, 1:]
        for block in built.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    return built.eval()


def save(folder: Path, tokenizer: Any, script: dict[int, str]) -> Path:
    """The same as a folder that any command loads."""
    model(tokenizer, script).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
