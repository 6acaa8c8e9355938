"""Sampling defaults and chat-template arguments from a model's files, without loading it.

The sidebar shows them; a reply takes its settings from the loaded model.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

FILE = "generation_config.json"
SETTINGS = ("top_p", "top_k", "repetition_penalty")
# A real file has a few hundred bytes.
MOST_BYTES = 100_000
# Common arguments of chat templates, which have a field of their own.
SWITCHES = ("enable_thinking", "reasoning_effort")
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
# A tokenizer's configuration names every token that was added.
MOST_TEMPLATE_BYTES = 4_000_000


def sampling_defaults(model_id: str, models_dir: Path) -> dict[str, float]:
    """Those of ``SETTINGS`` that the model's generation config sets; empty without a local one.

    Makes no request: of a model on the hub, it reads the local cache.
    """
    try:
        config = json.loads(_text_of(model_id, models_dir, FILE, MOST_BYTES))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    return {name: float(config[name]) for name in SETTINGS if _is_number(config.get(name))}


def template_switches(model_id: str, models_dir: Path) -> tuple[str, ...]:
    """Those of ``SWITCHES`` that the model's chat template reads; empty without a local one."""
    for name in TEMPLATES:
        text = _text_of(model_id, models_dir, name, MOST_TEMPLATE_BYTES)
        if found := tuple(switch for switch in SWITCHES if re.search(rf"\b{switch}\b", text)):
            return found
    return ()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text_of(model_id: str, models_dir: Path, name: str, most_bytes: int) -> str:
    """The text of a model's file; empty where it cannot be read."""
    path = _file_of(model_id, models_dir, name)
    try:
        if path is not None and path.is_file() and path.stat().st_size <= most_bytes:
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    return ""


def _file_of(model_id: str, models_dir: Path, name: str) -> Path | None:
    if model_id == "smollm2":
        return models_dir / model_id / name
    try:
        folder = Path(model_id).expanduser()
        if folder.is_dir():
            return folder / name
    except (OSError, ValueError, RuntimeError):
        return None
    if model_id.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model_id, name)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
