"""Installed lenses: an independent reference in plain torch, and the refusals of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from oki_trace.api import run_traced, score_traced
from oki_trace.errors import CaptureError, ModelError, UsageError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.lenses import library
from oki_trace.llm.lenses.files import read_lens
from oki_trace.llm.lenses.transport import unembedding_hash

WIDTH = 32


@pytest.fixture(autouse=True)
def _own_lenses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lenses are installed for this test alone."""
    folder = tmp_path / "lenses"
    monkeypatch.setattr(library, "lenses_dir", lambda: folder)


def jacobian_file(path: Path, width: int, layers: int, seed: int = 1, **more: Any) -> Path:
    """A random Jacobian lens of a model with so many blocks."""
    generator = torch.Generator().manual_seed(seed)
    maps = {
        layer: (torch.eye(width) + torch.randn(width, width, generator=generator) / width).half()
        for layer in range(layers - 1)
    }
    content = {"J": maps, "source_layers": [*maps], "n_prompts": 10, "d_model": width}
    torch.save(content | more, path)
    return path


def tuned_folder(
    folder: Path, width: int, layers: int, seed: int = 2, scale: float = 1.0, **config: Any
) -> Path:
    """A random Tuned Lens of a model with so many blocks; ``scale`` 0 maps nothing."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    settings = {
        "base_model_name_or_path": "tiny",
        "d_model": width,
        "num_hidden_layers": layers,
        "bias": True,
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    content = {}
    for layer in range(layers):
        weight = torch.randn(width, width, generator=generator) / width
        content[f"{layer}.weight"] = weight * scale
        content[f"{layer}.bias"] = torch.randn(width, generator=generator) * scale / 10
    torch.save(content, folder / "params.pt")
    return folder


def _mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _cohere() -> Any:
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            logit_scale=0.25,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _mamba() -> Any:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=WIDTH,
            state_size=8,
            num_hidden_layers=3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
