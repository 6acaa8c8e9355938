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

import datetime as dt
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from oki_trace.errors import UsageError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

TensorMode = Literal["exact", "half", "none"]
Segment = Literal["system", "user", "assistant", "template"]


class Role(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Status(StrEnum):
    """Where a message is in its life. User and system messages are born complete."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_live(self) -> bool:
        """Whether more steps may still come."""
        return self in (Status.QUEUED, Status.RUNNING)


# ---------------------------------------------------------------- what is asked


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(f"{sentence}.")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is picked, in the terms of transformers' ``generate()``.

    ``temperature`` of None or 0 is greedy. The others, when None, are left to
    the model's own generation config.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 0, "max_new_tokens must be 0 or more")
        _require(
            self.temperature is None or 0 <= self.temperature < 100, "temperature must be 0 to 100"
        )
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1")
        _require(self.top_k is None or self.top_k >= 0, "top_k must be 0 (off) or more")
        _require(
            self.repetition_penalty is None or self.repetition_penalty > 0,
            "repetition_penalty must be above 0 (1 is off)",
        )
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed must be 0 to 2^63 - 1")

    @property
    def is_greedy(self) -> bool:
        return not self.temperature


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """What is kept of every step.

    ``topk_*`` are numbers of entries: of the next-token distribution, of
    attended positions a layer, of tokens a lens layer. ``tensors``: "exact"
    keeps the full tensors in the model's own dtype, "half" as 16-bit floats,
    "none" keeps the rows alone.
    """

    topk_logits: int = 10
    topk_evidence: int = 10
    topk_lens: int = 5
    tensors: TensorMode = "half"

    def __post_init__(self) -> None:
        for name in ("topk_logits", "topk_evidence", "topk_lens"):
            _require(1 <= getattr(self, name) <= 1000, f"{name} must be 1 to 1000")
        modes = get_args(TensorMode)
        _require(self.tensors in modes, f"tensors must be one of {', '.join(modes)}")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, and how it is to be loaded."""

    model_id: str
    use_4bit: bool = False
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, as a chat template takes it."""

    role: Role
    content: str


# ---------------------------------------------------------------- what is seen


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model was given: the text, and a token a position.

    ``segments`` says where each token comes from: a message of that role, or
    the chat template around them.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """The sampling settings in force, the model's own generation config applied."""

    do_sample: bool
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What could be captured of this model, how, and how far it was checked.

    ``lens_check`` is the largest |Δlogprob| between the lens at the last layer
    and the model's own logits, ``attention_check`` the largest |Δweight|
    between the captured attention and the model's eager attention; both from
    a short forward when the model was loaded. None: not available, and
    ``lens_reason`` or ``evidence_provenance`` says why.
    """

    policy: CapturePolicy
    layers: int
    width: int
    dtype: str
    device: str
    quantization: str | None
    evidence_provenance: str
    attention_layers: tuple[int, ...]
    attention_check: float | None
    logit_lens_available: bool
    lens_reason: str | None
    lens_check: float | None
    versions: str


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The k most likely tokens of one distribution, rank 1 first; arrays of shape (k,).

    ``sampled_probs`` are the probabilities after temperature, top-k, top-p and
    penalties: 0 for a token they removed; None when decoding was greedy.
    """

    token_ids: IntArray
    tokens: tuple[str, ...]
    logits: FloatArray
    probs: FloatArray
    sampled_probs: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """Where one layer looked from the newest position, heads averaged.

    ``positions`` and ``weights`` (k,), the most attended first. ``missing`` is
    what the kept weights of the whole row leave of 1: the share of a learned
    sink, where the model has one.
    """

    layer: int
    positions: IntArray
    weights: FloatArray
    missing: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """The Logit Lens of one step (nostalgebraist, 2020): a row a layer, 0 to L.

    ``token_ids``, ``logits``, ``probs``: (L+1, k), rank 1 first; ``tokens``
    likewise. ``entropy``, ``chosen_rank``, ``chosen_prob``, ``kl``: (L+1,),
    ``kl`` being KL(model's own distribution ‖ this layer's), in nats.
    """

    step_index: int
    token_ids: IntArray
    tokens: tuple[tuple[str, ...], ...]
    logits: FloatArray
    probs: FloatArray
    entropy: FloatArray
    chosen_rank: IntArray
    chosen_prob: FloatArray
    kl: FloatArray

    @property
    def settle_layer(self) -> int | None:
        """The first layer from which the chosen token stays on top; None if it never does."""
        behind = np.flatnonzero(self.chosen_rank != 1)
        first = int(behind[-1]) + 1 if behind.size else 0
        return first if first < len(self.chosen_rank) else None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A full tensor of one step.

    ``logits`` (vocab,); ``hidden_states`` (L+1, width); ``attentions``
    (layers with attention, heads, keys), where ``layers`` holds the true layer
    numbers and ``key_offset`` the position of the first key. A layer with a
    shorter window or fewer heads is padded with zeros, so that column c is
    position ``key_offset + c`` in every layer. ``dtype`` is the model's own;
    bfloat16, which NumPy lacks, is held as its bits in uint16.
    """

    name: Literal["logits", "hidden_states", "attentions"]
    array: NDArray[np.generic]
    dtype: str
    layers: tuple[int, ...] = ()
    key_offset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One generated token, and what was seen when it was chosen.

    ``margin`` is the probability of rank 1 less that of rank 2. ``token_bytes``
    are the token's own bytes, which may be half a UTF-8 character.
    ``sampled_prob`` is its probability after the sampling settings, None when
    greedy. ``lens`` trails its step by a few steps while a reply is running.
    """

    step_index: int
    position: int
    token_id: int
    token: str
    token_bytes: bytes
    is_special: bool
    logit: float
    prob: float
    logprob: float
    entropy: float
    rank: int
    margin: float
    sampled_prob: float | None
    elapsed_ms: float
    topk: Candidates
    attention: tuple[LayerAttention, ...] = ()
    lens: Lens | None = None
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def surprisal(self) -> float:
        """-log prob of the chosen token, in nats."""
        return -self.logprob

    @property
    def evidence(self) -> LayerAttention | None:
        """The attention of the final layer that has any."""
        return self.attention[-1] if self.attention else None


@dataclass(frozen=True, slots=True)
class TurnStart:
    """What is known of a reply before its first token."""

    model_id: str
    prompt: Prompt
    generation: Generation
    capture: CaptureReport


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a reply ended. ``reason``: which stop it was, or what failed."""

    status: Status
    output: str
    reason: str
    seconds: float


# ---------------------------------------------------------------- what is stored


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a list shows it."""

    id: int
    title: str
    created_at: dt.datetime
    updated_at: dt.datetime
    messages: int
    tokens: int
    status: Status
    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message. All but the first six are of assistant messages only."""

    id: int
    conversation_id: int
    position: int
    role: Role
    content: str
    status: Status
    created_at: dt.datetime
    model_id: str | None = None
    prompt_len: int | None = None
    choice: ModelChoice | None = None
    sampling: Sampling | None = None
    policy: CapturePolicy | None = None
    generation: Generation | None = None
    capture: CaptureReport | None = None
    reason: str | None = None
    seconds: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What a reply's strip of tokens needs of each step: no children are read."""

    id: int
    step_index: int
    position: int
    token_id: int
    token: str
    token_bytes: bytes
    is_special: bool
    prob: float
    logprob: float
    entropy: float
    rank: int
    margin: float
    settle_layer: int | None


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """The state of a store, for ``oki-trace info`` and the explorer."""

    url: str
    schema: str
    bytes: int
    conversations: int
    messages: int
    steps: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What the process that owns the model is doing.

    ``state``: "starting", "idle", "loading", "decoding", "failed" or "gone".
    ``progress`` is 0 to 1 while loading, None when unknown.
    """

    state: str
    model_id: str | None
    detail: str
    progress: float | None
    pid: int | None
    updated_at: dt.datetime | None
