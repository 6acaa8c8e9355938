"""Computes the weight that each attention head puts on each kind of position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oki_trace.records import Prompt

# The more specific first: a position counts to the first that fits.
HEAD_TARGETS = (
    "first token",
    "itself",
    "token before",
    "system",
    "user",
    "assistant",
    "template",
    "reply",
)
# Thinking and tool calls of earlier replies count to the assistant, answers of tools to the user.
COUNTED_AS = {
    **{name: name for name in ("system", "user", "assistant", "template")},
    "thinking": "assistant",
    "tool_call": "assistant",
    "tool": "user",
}
_SEGMENTS = {name: HEAD_TARGETS.index(target) for name, target in COUNTED_AS.items()}


def shares_of_heads(
    weights: NDArray[np.floating], key_offset: int, prompt: Prompt
) -> NDArray[np.float64]:
    """Each head's weight on each of HEAD_TARGETS, and its largest: (layers, heads, targets + 1).

    ``weights`` (layers, heads, keys) are of the newest token, which is the last of the keys; the
    first key is at position ``key_offset``.
    """
    positions = key_offset + np.arange(weights.shape[-1])
    newest = key_offset + weights.shape[-1] - 1
    kind = np.full(len(positions), HEAD_TARGETS.index("reply"))
    segments = np.array([_SEGMENTS[name] for name in prompt.segments], dtype=np.int64)
    inside = positions < len(segments)
    kind[inside] = segments[positions[inside]]
    kind[positions == newest - 1] = HEAD_TARGETS.index("token before")
    kind[positions == newest] = HEAD_TARGETS.index("itself")
    kind[positions == 0] = 0
    sums = weights.astype(np.float64) @ np.eye(len(HEAD_TARGETS))[kind]
    return np.concatenate([sums, weights.max(axis=-1, keepdims=True)], axis=-1)
