"""The only module that uses undocumented parts of the tokenizers library.

``tests/llm/test_internals.py`` fails for each name that a new version removes or changes.
"""

from __future__ import annotations

import json
from typing import Any


def decoder_types(tokenizer: Any) -> set[str] | None:
    """The types of the decoders in a fast tokenizer's pipeline; None where it has no decoder."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return None if decoder is None else _types(json.loads(decoder.__getstate__()))


def _types(state: dict[str, Any]) -> set[str]:
    return {str(state.get("type"))}.union(*map(_types, state.get("decoders", ())))
