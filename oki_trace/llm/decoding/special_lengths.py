"""The lengths of a text at which a model begins to treat it otherwise, by its config.

A window, a chunk, a choice among keys, a rotary scaling that switches: what was
checked on a shorter text says nothing of a longer one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from oki_trace.llm.decoding.generation import context_length

_NAMES = re.compile("window(?!_layers)|chunk|block_size|index_topk|local_att|original_max_position")
# Tokens of a text beyond a special length.
BEYOND = 3
# Shorter ones are covered by any check.
_SHORTEST = 8
# The multiply-adds of a pass over a long text, on a CPU and elsewhere: a second or two.
_MOST_OPERATIONS = {"cpu": 2e11}
_MOST_OPERATIONS_ELSEWHERE = 1e13
# Attention takes longer with the square of them.
_MOST_TOKENS = 8200


@dataclass(frozen=True)
class Checkable:
    """``length``: tokens of a text beyond all lengths that can be tried here; None without any.

    ``left_out``: the first length that cannot, as a pass would take too long.
    """

    length: int | None
    left_out: int | None


def special_lengths(model: Any) -> list[int]:
    """All of them within the model's context, in order."""
    config = model.config.get_text_config(decoder=True).to_dict()
    most = context_length(model) - BEYOND
    return sorted(length for length in _named(config) if length <= most)


def checkable(model: Any, blocks: Sequence[nn.Module], device: str) -> Checkable:
    """Those that a pass of this model over a longer text can be made for in a few seconds."""
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    operations = _MOST_OPERATIONS.get(device, _MOST_OPERATIONS_ELSEWHERE)
    most = min(_MOST_TOKENS, operations / (2 * max(parameters, 1)))
    lengths = special_lengths(model)
    tried = [length for length in lengths if length + BEYOND <= most]
    left_out = lengths[len(tried) :]
    return Checkable(
        tried[-1] + BEYOND if tried else None,
        left_out[0] if left_out else None,
    )


def _named(config: Any, name: str = "") -> set[int]:
    if isinstance(config, dict):
        return {n for key, value in config.items() for n in _named(value, str(key))}
    is_length = isinstance(config, int) and not isinstance(config, bool) and config >= _SHORTEST
    return {config} if is_length and _NAMES.search(name) else set()
