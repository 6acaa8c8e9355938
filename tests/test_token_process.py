"""The process that splits a typed text into tokens, with the real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dashboard import data
from oki_trace import child_process
from oki_trace.errors import ModelError


def ask(model: str, text: str) -> Any:
    process = child_process.start("oki_trace.token_process")
    output, _ = process.communicate(json.dumps({"model": model, "text": text}).encode(), 120)
    return json.loads(output)


def test_a_text_is_split_as_the_model_does(smollm2_dir: Path) -> None:
    text = " Lyon, né à 東京 🙂"
    ids = AutoTokenizer.from_pretrained(smollm2_dir)(text, add_special_tokens=False)["input_ids"]
    found = ask(str(smollm2_dir), text)
    assert [number for number, _ in found] == ids
    assert found[0][1] == " L" or found[0][1].startswith(" L")


@pytest.mark.parametrize("text", ["", "x"])
def test_what_cannot_be_split_is_said_in_a_sentence(
    tmp_path: Path, smollm2_dir: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = str(tmp_path) if text else str(smollm2_dir)
    reason = ask(model, text)["error"]
    assert reason.endswith(".") and "\n" not in reason
    with pytest.raises(ModelError):
        data.typed_tokens(model, text)
