"""The tables of the store as SQLAlchemy models.

The migrations create the schema; a test checks that these models agree with it. Short
columns come before long ones, because SQLite reads a row from its start and follows the
overflow pages of a long text only when a query needs them.

Conversations, messages, steps, tensors and workers have ids that are never reused, so a
link stays valid. The children of a step, which have many rows, are clustered by step:
the rows of one step are one short range of a B-tree and need no other index.

A measured number may be NULL: SQLite has no NaN, so NaN is NULL on both engines and NaN
again in the records. Infinities are stored: the logit of a token that the model rules
out is -inf.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from oki_trace.records import LOGIT
from oki_trace.store.schema.column_types import BigId, ModelText, UtcTime


class Base(DeclarativeBase):
    """Every constraint has a name, because a migration can drop only a named one."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: sa.Integer,
        float: sa.Double,
        bytes: sa.LargeBinary,
        bool: sa.Boolean,
        dt.datetime: UtcTime,
        dict[str, Any]: sa.JSON(none_as_null=True),
        list[int]: sa.JSON(none_as_null=True),
        list[dict[str, Any]]: sa.JSON(none_as_null=True),
    }


_NEVER_REUSED = {"sqlite_autoincrement": True}
_CLUSTERED = {"sqlite_with_rowid": False}


def _child_of(parent: str) -> sa.ForeignKey:
    return sa.ForeignKey(parent, ondelete="CASCADE")


class StoreState(Base):
    """One row: the version, which grows with every write, so that viewers poll only it."""

    __tablename__ = "store_state"
    __table_args__ = (sa.CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(sa.BigInteger)


class Conversation(Base):
    """``updated_at`` changes when a message is added or ends, not with every step.

    ``uid`` is the same in every copy of a conversation, whatever its id.
    """

    __tablename__ = "conversation"
    __table_args__ = (sa.Index(None, "updated_at", "id"), sa.UniqueConstraint("uid"), _NEVER_REUSED)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    title: Mapped[str] = mapped_column(ModelText)
    created_at: Mapped[dt.datetime]
    updated_at: Mapped[dt.datetime]
    uid: Mapped[str] = mapped_column(sa.String(32), default=lambda: uuid.uuid4().hex)


class Message(Base):
    """A message; most columns after ``created_at`` belong to assistant messages.

    ``owner`` names the process that generates a running reply; ``heartbeat_at`` is the
    time of its last heartbeat by the server's clock, on PostgreSQL only.
    ``parent_id``: the message that this one follows; NULL for the first. ``branch_of`` and
    ``branch_step``: the reply that this one departs from, and the step from which on it
    differs; that reply may be gone since. ``prefix_len``: the tokens at the end of its prompt
    that are the beginning of the reply. ``forced``: the tokens or the text that the user chose
    for its first steps.
    ``score_of``: the message of this store whose text was scored; it may be gone since.
    ``tensors_pruned_at``: when the full tensors were pruned. ``readings`` counts the readings
    by lenses that were added or removed after the message had ended. ``digest`` covers the
    message as it ended, and until then its prompt only; it is empty if a version without
    digests recorded the message.
    """

    __tablename__ = "message"
    __table_args__ = (
        sa.UniqueConstraint("conversation_id", "position"),
        # A worker looks for queued replies many times per second.
        sa.Index(None, "status", "id"),
        _NEVER_REUSED,
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    conversation_id: Mapped[int] = mapped_column(BigId, _child_of("conversation.id"))
    position: Mapped[int]
    role: Mapped[str] = mapped_column(sa.String(16))
    status: Mapped[str] = mapped_column(sa.String(16))
    created_at: Mapped[dt.datetime]
    model_id: Mapped[str | None] = mapped_column(ModelText)
    prompt_len: Mapped[int | None]
    owner: Mapped[str | None] = mapped_column(sa.Text)
    heartbeat_at: Mapped[dt.datetime | None]
    stop_requested: Mapped[bool]
    parent_id: Mapped[int | None] = mapped_column(BigId)
    branch_of: Mapped[int | None] = mapped_column(BigId)
    branch_step: Mapped[int | None]
    prefix_len: Mapped[int | None]
    score_of: Mapped[int | None] = mapped_column(BigId)
    tensors_pruned_at: Mapped[dt.datetime | None]
    seconds: Mapped[float | None]
    reason: Mapped[str | None] = mapped_column(ModelText)
    choice: Mapped[dict[str, Any] | None]
    sampling: Mapped[dict[str, Any] | None]
    policy: Mapped[dict[str, Any] | None]
    generation: Mapped[dict[str, Any] | None]
    capture: Mapped[dict[str, Any] | None]
    content: Mapped[str] = mapped_column(ModelText)
    prompt: Mapped[str | None] = mapped_column(ModelText)
    parts: Mapped[list[dict[str, Any]] | None]
    template: Mapped[dict[str, Any] | None]
    forced: Mapped[dict[str, Any] | None]
    tool_name: Mapped[str | None] = mapped_column(ModelText)
    checks: Mapped[dict[str, Any] | None]
    digest: Mapped[str | None] = mapped_column(sa.String(64))
    readings: Mapped[int] = mapped_column(server_default="0")


class PromptToken(Base):
    """A token of a reply's prompt; ``segment`` says which part of the prompt it belongs to."""

    __tablename__ = "prompt_token"
    __table_args__ = _CLUSTERED

    message_id: Mapped[int] = mapped_column(BigId, _child_of("message.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token_id: Mapped[int]
    token: Mapped[str] = mapped_column(ModelText)
    segment: Mapped[str] = mapped_column(sa.String(16))


class Step(Base):
    """A token of a reply or of a traced prompt, with the model's prediction at its position.

    ``origin`` says where the token came from: sampled, forced or given. ``step_index``
    counts the generated tokens of a reply and is NULL for a given token.
    ``settle_layer`` is written with the step's Logit Lens.
    ``decision`` explains the choice of the token, ``greedy_id`` is the token that greedy
    decoding would have chosen; both NULL when decoding was plainly greedy.
    ``tensor_bytes`` is the stored size of the step's tensors, so that a total need not
    read their table. ``digest`` covers the recorded step and its Logit Lens,
    ``tensor_digest`` its tensors, which may have been pruned since.
    """

    __tablename__ = "step"
    __table_args__ = (
        sa.UniqueConstraint("message_id", "step_index"),
        sa.UniqueConstraint("message_id", "position"),
        _NEVER_REUSED,
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    message_id: Mapped[int] = mapped_column(BigId, _child_of("message.id"))
    step_index: Mapped[int | None]
    origin: Mapped[str] = mapped_column(sa.String(8), server_default="sampled")
    position: Mapped[int]
    token_id: Mapped[int]
    token: Mapped[str] = mapped_column(ModelText)
    token_bytes: Mapped[bytes]
    is_special: Mapped[bool]
    logit: Mapped[float | None]
    prob: Mapped[float | None]
    logprob: Mapped[float | None]
    entropy: Mapped[float | None]
    rank: Mapped[int]
    margin: Mapped[float | None]
    sampled_prob: Mapped[float | None]
    elapsed_ms: Mapped[float | None]
    settle_layer: Mapped[int | None]
    tensor_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    greedy_id: Mapped[int | None]
    decision: Mapped[dict[str, Any] | None]
    digest: Mapped[bytes | None]
    tensor_digest: Mapped[bytes | None]


class StepChild(Base):
    """A table of the rows of steps, clustered by step."""

    __abstract__ = True
    __table_args__ = _CLUSTERED

    step_id: Mapped[int] = mapped_column(
        BigId, _child_of("step.id"), primary_key=True, sort_order=-1
    )


class TopkEntry(StepChild):
    """A candidate for the next token.

    ``sampled_prob``: the probability after the sampling settings. ``noise``: the Gumbel
    noise of the draw.
    """

    __tablename__ = "topk_entry"

    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token_id: Mapped[int]
    token: Mapped[str] = mapped_column(ModelText)
    logit: Mapped[float | None]
    prob: Mapped[float | None]
    sampled_prob: Mapped[float | None]
    noise: Mapped[float | None]


class AttentionLayer(StepChild):
    """The attention of a layer; ``missing`` is 1 minus the sum of all weights."""

    __tablename__ = "attention_layer"

    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    missing: Mapped[float | None]


class AttentionEntry(StepChild):
    """A position that a layer attended to from the newest position, averaged over heads."""

    __tablename__ = "attention_entry"

    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    position: Mapped[int]
    weight: Mapped[float | None]


# Ordered by its bytes on both engines.
_LENS_NAME = sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql")


class LensLayer(StepChild):
    """A lens at a layer, over the whole vocabulary.

    ``lens`` is ``logit``, or the name of an installed lens, which may not read every layer.
    """

    __tablename__ = "lens_layer"

    lens: Mapped[str] = mapped_column(_LENS_NAME, primary_key=True, server_default=LOGIT)
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    entropy: Mapped[float | None]
    chosen_rank: Mapped[int]
    chosen_prob: Mapped[float | None]
    kl: Mapped[float | None]


class LensEntry(StepChild):
    """One of the most likely tokens of a lens at a layer."""

    __tablename__ = "lens_entry"

    lens: Mapped[str] = mapped_column(_LENS_NAME, primary_key=True, server_default=LOGIT)
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token_id: Mapped[int]
    token: Mapped[str] = mapped_column(ModelText)
    logit: Mapped[float | None]
    prob: Mapped[float | None]


class RouterEntry(StepChild):
    """An expert that the router of a layer chose, the largest weight first."""

    __tablename__ = "router_entry"

    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    expert: Mapped[int]
    weight: Mapped[float | None]


class Tensor(Base):
    """A full tensor, encoded; ``data`` is the last column, because it is long."""

    __tablename__ = "tensor"
    __table_args__ = (sa.UniqueConstraint("step_id", "name"), _NEVER_REUSED)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    step_id: Mapped[int] = mapped_column(BigId, _child_of("step.id"))
    name: Mapped[str] = mapped_column(sa.String(32))
    dtype: Mapped[str] = mapped_column(sa.String(16))
    shape: Mapped[list[int]]
    layers: Mapped[list[int]]
    key_offset: Mapped[int]
    codec: Mapped[str] = mapped_column(sa.String(16))
    checksum: Mapped[str] = mapped_column(sa.String(32))
    raw_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    data: Mapped[bytes]


class Worker(Base):
    """A process that owns a model and generates queued replies."""

    __tablename__ = "worker"
    __table_args__ = (sa.UniqueConstraint("owner"), _NEVER_REUSED)

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    owner: Mapped[str] = mapped_column(sa.Text)
    host: Mapped[str] = mapped_column(sa.Text)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(sa.String(16))
    model_id: Mapped[str | None] = mapped_column(ModelText)
    detail: Mapped[str] = mapped_column(ModelText)
    progress: Mapped[float | None]
    heartbeat_at: Mapped[dt.datetime]


# The children of a step, in the order in which they are copied and read.
STEP_CHILDREN: tuple[type[Base], ...] = (
    TopkEntry,
    AttentionLayer,
    AttentionEntry,
    LensLayer,
    LensEntry,
    RouterEntry,
)
