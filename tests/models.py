"""Tiny models saved in folders, for code that loads a model by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write both as ``--model`` and a ``ModelChoice`` name them; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_small(folder: Path) -> Path:
    """A model whose context holds 128 tokens."""
    return save(folder, tiny.model("llama"), tiny.tokenizer())


def save_endless(folder: Path) -> Path:
    """A model that never stops by itself: no end of turn, and a context without an end in sight."""
    model = tiny.model("llama")
    model.config.max_position_embeddings = 10_000_000
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    return save(folder, model, tiny.tokenizer())
