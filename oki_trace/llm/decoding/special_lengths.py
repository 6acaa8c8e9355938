"""Reads from a model's config the lengths beyond which it treats a text differently.

Such a length is that of an attention window, a chunk, a selection of keys or a switch of
the rotary scaling. A check on a shorter text says nothing about a longer one.
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
MARGIN = 3
# Every check covers shorter lengths.
_SHORTEST = 8
# Multiply-adds of a pass over a long text that takes a second or two, on a CPU and elsewhere.
_MAX_OPERATIONS = {"cpu": 2e11}
_MAX_OPERATIONS_ELSEWHERE = 1e13
# The time of attention grows with the square of the tokens.
_MAX_TOKENS = 8200


@dataclass(frozen=True)
class CheckableLengths:
    """``text_length``: tokens of a text beyond all lengths that can be checked; None without any.

    ``unchecked``: the first special length for which a pass would take too long.
    """

    text_length: int | None
    unchecked: int | None


def special_lengths(model: Any) -> list[int]:
    """All within the model's context, in ascending order."""
    config = model.config.get_text_config(decoder=True).to_dict()
    limit = context_length(model) - MARGIN
    return sorted(length for length in _lengths_in(config) if length <= limit)


def checkable_lengths(
    model: Any, blocks: Sequence[nn.Module], device_type: str
) -> CheckableLengths:
    """The special lengths for which a pass over a longer text takes a few seconds at most."""
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    operations = _MAX_OPERATIONS.get(device_type, _MAX_OPERATIONS_ELSEWHERE)
    limit = min(_MAX_TOKENS, operations / (2 * max(parameters, 1)))
    lengths = special_lengths(model)
    checkable = [length for length in lengths if length + MARGIN <= limit]
    unchecked = lengths[len(checkable) :]
    return CheckableLengths(
        checkable[-1] + MARGIN if checkable else None, unchecked[0] if unchecked else None
    )


def _lengths_in(config: Any, name: str = "") -> set[int]:
    if isinstance(config, dict):
        return {n for key, value in config.items() for n in _lengths_in(value, str(key))}
    is_length = isinstance(config, int) and not isinstance(config, bool) and config >= _SHORTEST
    return {config} if is_length and _NAMES.search(name) else set()
