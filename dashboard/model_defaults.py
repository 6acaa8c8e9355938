"""What a model's own generation config says of sampling, read without loading the model.

Only to be shown beside an empty field: what holds is worked out when the reply
begins, from the model itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

FILE = "generation_config.json"
SETTINGS = ("top_p", "top_k", "repetition_penalty")
# A real one has a few hundred bytes.
MOST_BYTES = 100_000


def read(model_id: str, models_dir: Path) -> dict[str, float]:
    """The settings of ``SETTINGS`` that the config of a model here names; none where it is not.

    Asks nobody: of a model on the hub, what was fetched before is looked at.
    """
    path = _config_of(model_id, models_dir)
    try:
        if path is None or path.stat().st_size > MOST_BYTES or not path.is_file():
            return {}
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(given, dict):
        return {}
    return {name: float(given[name]) for name in SETTINGS if _is_number(given.get(name))}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _config_of(model_id: str, models_dir: Path) -> Path | None:
    if model_id == "smollm2":
        return models_dir / model_id / FILE
    try:
        folder = Path(model_id).expanduser()
        if folder.is_dir():
            return folder / FILE
    except (OSError, ValueError, RuntimeError):
        return None
    if model_id.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_id, FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
