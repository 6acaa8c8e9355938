"""What a model's own files say of sampling and of its chat template, read without loading it.

Only to be shown beside a field, or to show a field at all: what holds is worked out
when the reply begins, from the model itself.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

FILE = "generation_config.json"
SETTINGS = ("top_p", "top_k", "repetition_penalty")
# A real one has a few hundred bytes.
MOST_BYTES = 100_000
# Arguments that many chat templates read, and that have a field of their own.
SWITCHES = ("enable_thinking", "reasoning_effort")
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
# A tokenizer's configuration names every token that was added.
MOST_TEMPLATE_BYTES = 4_000_000


def read(model_id: str, models_dir: Path) -> dict[str, float]:
    """The settings of ``SETTINGS`` that the config of a model here names; none where it is not.

    Asks nobody: of a model on the hub, what was fetched before is looked at.
    """
    path = _file_of(model_id, models_dir, FILE)
    try:
        if path is None or path.stat().st_size > MOST_BYTES or not path.is_file():
            return {}
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(given, dict):
        return {}
    return {name: float(given[name]) for name in SETTINGS if _is_number(given.get(name))}


def switches(model_id: str, models_dir: Path) -> tuple[str, ...]:
    """Those of ``SWITCHES`` that the chat template of a model here reads."""
    for name in TEMPLATES:
        path = _file_of(model_id, models_dir, name)
        try:
            if path is None or not path.is_file() or path.stat().st_size > MOST_TEMPLATE_BYTES:
                continue
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if found := tuple(switch for switch in SWITCHES if re.search(rf"\b{switch}\b", text)):
            return found
    return ()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        found = try_to_load_from_cache(model_id, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
