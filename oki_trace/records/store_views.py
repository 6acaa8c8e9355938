"""What a store gives back: conversations, messages, and views over many steps."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from oki_trace.records.request import (
    CapturePolicy,
    ModelChoice,
    Part,
    Role,
    Sampling,
    Status,
    TemplateOptions,
)
from oki_trace.records.trace import (
    CaptureReport,
    FloatArray,
    Generation,
    IntArray,
    ReplyChecks,
    surprisal_of,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a list shows it.

    ``damage``: what in it or its messages makes no sense; None in a store that is whole.
    """

    id: int
    title: str
    created_at: dt.datetime
    updated_at: dt.datetime
    messages: int
    tokens: int
    status: Status
    model_ids: tuple[str, ...]
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationFilter:
    """Which conversations are wanted; None: any.

    ``model_id`` answered in it, ``status`` is that of its last message, and it
    was changed at ``since`` or later, and before ``until``.
    """

    model_id: str | None = None
    status: Status | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class ConversationTotals:
    """What a conversation's replies took: ``timed_tokens`` in ``seconds``, and in the store."""

    timed_tokens: int
    seconds: float
    tensor_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """None when no reply's time is known."""
        return self.timed_tokens / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message. All but the first seven and the last are of assistant messages only.

    ``content`` of a reply is its answer; ``parts`` are all of it, empty where they are
    not known. ``template``: what its chat template was given beside the messages.
    ``tool_name``: the tool whose answer a tool message holds.

    ``tensors_pruned_at``: when its full tensors were thrown away to save room;
    None when that never happened. ``digest`` says what it was when it ended
    (``store.digest``): None before that, "" when it was recorded without one.
    ``damage``: what is stored of it and makes no sense; its status is "failed" then.
    """

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
    tensors_pruned_at: dt.datetime | None = None
    checks: ReplyChecks | None = None
    parts: tuple[Part, ...] = ()
    template: TemplateOptions | None = None
    tool_name: str | None = None
    digest: str | None = None
    damage: str | None = None

    @property
    def lens_check(self) -> float | None:
        """The largest |Δlogprob| of the lens at the last layer: at load, or in this reply."""
        found = [c.lens for c in (self.checks,) if c is not None and c.lens is not None]
        if self.capture is not None and self.capture.lens_check is not None:
            found.append(self.capture.lens_check)
        return max(found, default=None)

    @property
    def lens_draft(self) -> float | None:
        """The largest |Δprob| that a drafted lens made: at load, or in this reply."""
        if self.capture is None or self.capture.lens_draft is None:
            return None
        here = self.checks.draft if self.checks is not None else None
        return max(self.capture.lens_draft, here or 0.0)


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What a reply's strip of tokens needs of each step: no children are read.

    ``greedy_id`` is what would have been said without a draw; None when plainly greedy.
    """

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
    greedy_id: int | None = None

    @property
    def surprisal(self) -> float:
        """-log prob of the token, in nats; never below 0."""
        return surprisal_of(self.logprob)


@dataclass(frozen=True, slots=True, eq=False)
class LensGrid:
    """The Logit Lens over many steps of one reply: S steps by L+1 layers.

    ``step_index`` (S,), rising; steps whose lens is not there are left out. All
    others are (S, L+1), column l being layer l. ``top`` says which of
    ``tokens``, each of which stands there once, is the layer's most likely
    one, ``top_id`` its id and ``top_prob`` its probability; the rest is as in
    ``Lens``.
    """

    step_index: IntArray
    tokens: tuple[str, ...]
    top: IntArray
    top_id: IntArray
    top_prob: FloatArray
    entropy: FloatArray
    chosen_rank: IntArray
    chosen_prob: FloatArray
    kl: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPoints:
    """Where one layer looked in many steps of one reply, heads averaged.

    Three arrays of one length (N,), by step and then by weight: the most
    attended ``position`` s of each ``step_index`` and their ``weight`` s.
    """

    step_index: IntArray
    position: IntArray
    weight: FloatArray


@dataclass(frozen=True, slots=True)
class ReplySize:
    """What a reply takes in the store: so many tokens, and the bytes of their full tensors."""

    created_at: dt.datetime
    tokens: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """The state of a store, for ``oki-trace info`` and the explorer.

    ``bytes`` is what the store takes on disk now. Of it ``log_bytes`` are the
    write-ahead log, which is no data but repeats some of it until it is folded
    in, and ``free_bytes`` are room left by what was deleted, which is used
    again or given back by ``oki-trace vacuum``; both are 0 on PostgreSQL.
    ``tensor_bytes`` are the full tensors, of ``tensor_steps`` steps;
    ``row_bytes`` is the rest of the data.
    """

    url: str
    schema: str
    bytes: int
    conversations: int
    messages: int
    steps: int
    tensor_bytes: int
    tensor_steps: int = 0
    row_bytes: int = 0
    log_bytes: int = 0
    free_bytes: int = 0

    @property
    def row_bytes_per_token(self) -> float:
        """What a token's rows take; 0 when there is no token."""
        return self.row_bytes / self.steps if self.steps else 0.0

    @property
    def tensor_bytes_per_token(self) -> float:
        """What the full tensors of a token that has them take; 0 when none has."""
        return self.tensor_bytes / self.tensor_steps if self.tensor_steps else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Data alone: neither the log nor free room."""
        return (self.row_bytes + self.tensor_bytes) / self.steps if self.steps else 0.0


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
