"""The plain frozen records that cross rooms.

The model side makes them, the store keeps them, and the explorer and the
exports read them back: the same shapes in both directions. They hold Python
scalars, strings and NumPy arrays, never a torch tensor or an ORM row, so that
each room can be used and tested without the others.

Words, as everywhere in the project: layer 0 is the embedding output, layer l
the residual stream after block l, layer L (the last) the model's own
distribution. ``position`` is a token's absolute index in the sequence the
model saw. ``rank`` counts from 1. ``prob`` is the model's own probability,
before any sampling setting. Log-probabilities and entropies are in nats.
"""

from __future__ import annotations

from oki_trace.records.request import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Part,
    PartKind,
    Role,
    Sampling,
    Status,
    TemplateOptions,
    TensorMode,
    is_too_deep,
)
from oki_trace.records.store_views import (
    AttentionPoints,
    Conversation,
    ConversationFilter,
    ConversationTotals,
    LensGrid,
    Message,
    ReplySize,
    StepSummary,
    StoreInfo,
    WorkerState,
)
from oki_trace.records.trace import (
    Candidates,
    CaptureReport,
    Contender,
    Decision,
    Effect,
    FloatArray,
    Generation,
    IntArray,
    LayerAttention,
    Lens,
    Prompt,
    ReplyChecks,
    Segment,
    Step,
    Tensor,
    TurnEnd,
    TurnStart,
)

__all__ = [
    "AttentionPoints",
    "Candidates",
    "CapturePolicy",
    "CaptureReport",
    "ChatMessage",
    "Contender",
    "Conversation",
    "ConversationFilter",
    "ConversationTotals",
    "Decision",
    "Effect",
    "FloatArray",
    "Generation",
    "IntArray",
    "LayerAttention",
    "Lens",
    "LensGrid",
    "Message",
    "ModelChoice",
    "Part",
    "PartKind",
    "Prompt",
    "ReplyChecks",
    "ReplySize",
    "Role",
    "Sampling",
    "Segment",
    "Status",
    "Step",
    "StepSummary",
    "StoreInfo",
    "TemplateOptions",
    "Tensor",
    "TensorMode",
    "TurnEnd",
    "TurnStart",
    "WorkerState",
    "is_too_deep",
]
