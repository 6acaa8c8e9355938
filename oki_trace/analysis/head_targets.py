"""What a head looks at: its weights summed by what stands at the positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oki_trace.records import Prompt

# What a head can look at, the more special first: a position counts to the first that fits.
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
# What an earlier reply thought and called is the assistant's, what a tool answered is given.
COUNTED_AS = {
    **{name: name for name in ("system", "user", "assistant", "template")},
    "thinking": "assistant",
    "tool_call": "assistant",
    "tool": "user",
}
_SEGMENTS = {name: HEAD_TARGETS.index(thing) for name, thing in COUNTED_AS.items()}


def shares_of_heads(
    weights: NDArray[np.floating], key_offset: int, prompt: Prompt
) -> NDArray[np.float64]:
    """What each head gives to each of HEAD_TARGETS, and its largest: (layers, heads, targets + 1).

    ``weights`` (layers, heads, keys) looks at the positions from ``key_offset`` on, from the
    last of them, where the newest token stands.
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
