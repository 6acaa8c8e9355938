"""The plain frozen records that the packages exchange.

``llm`` makes them, ``store`` writes and reads them, and the explorer and the exports use
them. They contain Python scalars, strings and NumPy arrays, never a torch tensor or an
ORM row, so each package can be used and tested without the others.

Terms: layer 0 is the embedding output, layer l the residual stream after block l, layer
L (the last) the model's own distribution. ``position`` is the absolute index of a token
in the sequence that the model sees. ``rank`` counts from 1. ``prob`` is the model's own
probability, before any sampling setting. Log-probabilities and entropies are in nats.
"""

from __future__ import annotations

from oki_trace.records.request import (
    LOGIT,
    NO_PARENT,
    CapturePolicy,
    ChatMessage,
    Forced,
    ModelChoice,
    Part,
    PartKind,
    PromptTrace,
    Role,
    Sampling,
    Status,
    TemplateOptions,
    TensorMode,
    is_lens_name,
    is_too_deep,
    require_lens_name,
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
    LayerRouting,
    Lens,
    Origin,
    Prompt,
    ReplyChecks,
    Segment,
    Step,
    TensorRecord,
    TurnEnd,
    TurnStart,
)

__all__ = [
    "LOGIT",
    "NO_PARENT",
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
    "Forced",
    "Generation",
    "IntArray",
    "LayerAttention",
    "LayerRouting",
    "Lens",
    "LensGrid",
    "Message",
    "ModelChoice",
    "Origin",
    "Part",
    "PartKind",
    "Prompt",
    "PromptTrace",
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
    "TensorMode",
    "TensorRecord",
    "TurnEnd",
    "TurnStart",
    "WorkerState",
    "is_lens_name",
    "is_too_deep",
    "require_lens_name",
]
