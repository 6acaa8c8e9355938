"""Records that only a store returns: conversations, messages, and views over many steps."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from oki_trace.records.request import (
    CapturePolicy,
    Forced,
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
    Origin,
    ReplyChecks,
    surprisal_of,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, with the totals of its messages.

    ``damage``: the impossible values in it or its messages; None in an intact store.
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
    """Conditions on conversations; None: no condition.

    ``model_id`` generated a reply in it, ``status`` is that of its last message, and its
    last change was at ``since`` or later, and before ``until``.
    """

    model_id: str | None = None
    status: Status | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class ConversationTotals:
    """The time and space of a conversation's replies: ``timed_tokens`` took ``seconds``."""

    timed_tokens: int
    seconds: float
    tensor_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """None when no reply's time is known."""
        return self.timed_tokens / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message. Most fields after ``created_at`` belong to assistant messages only.

    The ``content`` of a reply is its answer; ``parts`` are all of it, empty where they
    are not known. ``template``: what its chat template got in addition to the messages.
    ``tool_name``: the tool whose result a tool message holds.

    ``parent_id``: the message that it follows; None for the first. A reply that departs from
    another has ``branch_of``, that reply, which may be gone since, and ``branch_step``, the
    step from which on it differs. ``prefix_len`` tokens at the end of its prompt are the
    beginning of the reply. ``forced``: what the user chose for its first steps.
    ``score_of``: the message whose text was scored, in this store; it may be gone since.
    ``tensors_pruned_at``: when its full tensors were pruned; None: never. ``digest``
    covers the message as it ended (see ``store.digest``): None before that, "" if it was
    recorded by a program without digests. ``readings`` counts the readings by lenses that
    were added or removed after it had ended. ``damage``: the impossible values in its row;
    its status is then "failed".
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
    score_of: int | None = None
    parent_id: int | None = None
    branch_of: int | None = None
    branch_step: int | None = None
    prefix_len: int = 0
    forced: Forced | None = None
    tensors_pruned_at: dt.datetime | None = None
    checks: ReplyChecks | None = None
    parts: tuple[Part, ...] = ()
    template: TemplateOptions | None = None
    tool_name: str | None = None
    digest: str | None = None
    readings: int = 0
    damage: str | None = None

    @property
    def is_score(self) -> bool:
        """Whether the message is a scored text: nothing was to be generated."""
        settings = self.generation or self.sampling
        return settings is not None and settings.max_new_tokens == 0

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
    """A step in brief, without its candidates, attention and lens; see ``Step``.

    ``greedy_id`` is the token that greedy decoding would have chosen; None when decoding
    was plainly greedy.
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
    origin: Origin = "sampled"

    @property
    def surprisal(self) -> float:
        """-log prob of the token, in nats; never below 0."""
        return surprisal_of(self.logprob)


@dataclass(frozen=True, slots=True, eq=False)
class LensGrid:
    """A lens over many steps of one reply: S steps by n layers.

    ``step_index`` (S,), ascending, has the steps that the lens has read, or the positions of
    given tokens. ``layers`` (n,) are the layers of the columns; None: all, 0 to L. The others
    are (S, n). ``top`` is the index in
    ``tokens``, which are distinct, of the layer's most likely token, ``top_id`` its id and
    ``top_prob`` its probability; the rest is as in ``Lens``.
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
    layers: IntArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPoints:
    """The attention of one layer in many steps of one reply, averaged over heads.

    Three arrays (N,), ordered by step and then by weight: the most attended positions of
    each ``step_index`` and their weights. Of given tokens, ``step_index`` has the positions.
    """

    step_index: IntArray
    position: IntArray
    weight: FloatArray


@dataclass(frozen=True, slots=True)
class ReplySize:
    """The size of a reply in the store: its tokens, and the bytes of their full tensors."""

    created_at: dt.datetime
    tokens: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """The state of a store, for ``oki-trace info`` and the explorer.

    ``bytes`` is the size of the store on disk. It includes ``log_bytes``, the write-ahead
    log, which repeats some data until the next checkpoint, and ``free_bytes``, space of
    deleted rows that the store reuses and ``oki-trace vacuum`` gives back; both are 0 on
    PostgreSQL. ``tensor_bytes`` are the full tensors of ``tensor_steps`` steps,
    ``row_bytes`` the rest of the data.
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
        """The size of a token's rows; 0 when there is no token."""
        return self.row_bytes / self.steps if self.steps else 0.0

    @property
    def tensor_bytes_per_token(self) -> float:
        """The size of the full tensors of a token that has some; 0 when none has."""
        return self.tensor_bytes / self.tensor_steps if self.tensor_steps else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Data only, without the log and free space."""
        return (self.row_bytes + self.tensor_bytes) / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The state of the process that owns the model.

    ``state``: "starting", "idle", "loading", "decoding", "failed" or "gone".
    ``progress`` is 0 to 1 while loading, None when unknown.
    """

    state: str
    model_id: str | None
    detail: str
    progress: float | None
    pid: int | None
    updated_at: dt.datetime | None
