"""Writing a store: conversations, replies and their steps.

Each method is one atomic transaction, which also increments the store's version. Steps are
numbered from 0 without a gap, and only a running reply takes any. Methods are thread-safe.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, func, select, update

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Lens,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
    TemplateOptions,
    TensorMode,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.digest import PromptDigest, of_step, with_lens
from oki_trace.store.disk_reserve import Reserve
from oki_trace.store.file_guard import Presence
from oki_trace.store.heartbeat import LIFE, Heartbeat, is_gone
from oki_trace.store.owner import this_process
from oki_trace.store.reading import documents
from oki_trace.store.schema import identity, migrate, models
from oki_trace.store.schema.engine import set_checkpoint, writer_engine
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing import closing, lifecycle
from oki_trace.store.writing.checkpoint import Checkpointer
from oki_trace.store.writing.rows import StepRows, encode_all, number

_LIVE = (Status.QUEUED, Status.RUNNING)

_BUMP = update(models.StoreState).values(version=models.StoreState.version + 1)


@dataclass(slots=True)
class _Reply:
    """What this process knows of a reply it writes, so that a step needs no look-up."""

    tensors: TensorMode
    step_ids: dict[int, int] = field(default_factory=dict)
    # Of the steps whose lens has not come yet.
    digests: dict[int, bytes | None] = field(default_factory=dict)


class TraceWriter:
    """A store open for writing; made, or brought up to date, when needed.

    ``checkpoint=False`` is for a process that submits requests and does not
    generate. Of those that do, one at a time folds the write-ahead log into the
    file, whoever else asks to. ``making_room`` is for one that is to throw things
    away: on a full disk it takes the store's reserve to open the store. Any other
    sees that there is one, but for a store that is soon thrown away.
    """

    def __init__(
        self,
        db: Db,
        *,
        checkpoint: bool = True,
        making_room: bool = False,
        keeps_reserve: bool = True,
    ) -> None:
        url = identity.address(db)
        self._store = identity.shown(url)
        self._reserve = Reserve(identity.file_of(url))
        self._keeps_reserve = keeps_reserve
        if making_room and self._reserve.is_low():
            self._reserve.release()
        migrate.ensure(url)
        self._presence = Presence(identity.file_of(url))
        self._checkpointer = Checkpointer(identity.file_of(url), wanted=checkpoint)
        self._engine = writer_engine(url, checkpoint=self._checkpointer.elect())
        self._heartbeat = Heartbeat(self._engine)
        self._rows = StepRows(self._engine.dialect)
        self._replies: dict[int, _Reply] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back; the last one to close folds the log into the file."""
        self._heartbeat.stop()
        self._engine.dispose()
        self._checkpointer.resign()
        self._reserve.restore()
        if self._keeps_reserve:
            self._reserve.keep()

    # ------------------------------------------------------------ conversations

    def create_conversation(self, title: str, *, created_at: dt.datetime | None = None) -> int:
        """Begin a conversation; returns its id."""
        now = created_at or lifecycle.now()
        with self.write() as connection:
            return lifecycle.new_row(
                connection, models.Conversation, title=title, created_at=now, updated_at=now
            )

    def rename_conversation(self, conversation_id: int, title: str) -> None:
        with self.write() as connection:
            lifecycle.touch(connection, conversation_id, title=title)

    def delete_conversation(self, conversation_id: int) -> None:
        """Delete it with all its messages, steps and tensors.

        Raises StoreError when a process is writing to it. At once; on a full disk
        its last steps go first, a few at a time.
        """
        with self.making_room() as low:
            if low:
                self._thin_out(conversation_id)
            with self.write() as connection:
                lifecycle.delete_conversation(connection, conversation_id)

    def add_message(
        self,
        conversation_id: int,
        message: ChatMessage,
        *,
        created_at: dt.datetime | None = None,
        digest: str | None = None,
    ) -> int:
        """Add a message that is complete as it is; returns its id. ``digest``: see finish_reply."""
        with self.write() as connection:
            return lifecycle.add(
                connection,
                conversation_id,
                role=message.role.value,
                content=message.content,
                parts=documents.part_documents(message.parts),
                tool_name=message.tool_name,
                status=Status.COMPLETE.value,
                created_at=created_at or lifecycle.now(),
                recorded=digest,
            )

    # ------------------------------------------------------------------ replies

    def queue_reply(
        self,
        conversation_id: int,
        choice: ModelChoice,
        sampling: Sampling,
        policy: CapturePolicy,
        *,
        claim: bool = False,
        created_at: dt.datetime | None = None,
        template: TemplateOptions | None = None,
    ) -> int:
        """Ask for a reply to the conversation so far; returns its id.

        ``claim``: this process will generate it itself, so no worker may take it.
        """
        if claim:
            self._heartbeat.start()
        with self.write() as connection:
            return lifecycle.add(
                connection,
                conversation_id,
                role=Role.ASSISTANT.value,
                content="",
                status=(Status.RUNNING if claim else Status.QUEUED).value,
                owner=str(this_process()) if claim else None,
                seen_at=func.now() if claim else None,
                model_id=choice.model_id,
                choice=documents.to_document(choice),
                sampling=documents.to_document(sampling),
                policy=documents.to_document(policy),
                template=documents.to_document(template or None),
                created_at=created_at or lifecycle.now(),
            )

    def claim_next_reply(self) -> int | None:
        """Take the oldest queued reply for this process; None when there is none."""
        table = models.Message
        with self._transaction() as connection:
            # FOR UPDATE is PostgreSQL's; on SQLite the whole transaction has the lock.
            message_id = connection.execute(
                select(table.id)
                .where(table.status == Status.QUEUED.value)
                .order_by(table.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            ).scalar()
            if message_id is None:
                return None
            connection.execute(
                update(table)
                .where(table.id == message_id)
                .values(status=Status.RUNNING.value, owner=str(this_process()), seen_at=func.now())
            )
            connection.execute(_BUMP)
        self._heartbeat.start()
        return message_id

    def start_reply(self, message_id: int, start: TurnStart) -> None:
        """Write what is known before the first token: the prompt and the settings in force."""
        self._heartbeat.start()
        prompt = PromptDigest().add(
            start.prompt.token_ids, start.prompt.tokens, start.prompt.segments
        )
        with self.write() as connection:
            owner = lifecycle.take(connection, message_id)
            connection.execute(
                update(models.Message)
                .where(models.Message.id == message_id)
                .values(
                    status=Status.RUNNING.value,
                    owner=owner,
                    seen_at=func.now(),
                    model_id=start.model_id,
                    prompt_len=len(start.prompt),
                    generation=documents.to_document(start.generation),
                    capture=documents.to_document(start.capture),
                    prompt=start.prompt.text,
                    digest=prompt.hex(),
                )
            )
            self._rows.insert_prompt(connection, message_id, start.prompt)
        self._replies[message_id] = _Reply(start.capture.policy.tensors)

    def append(
        self,
        message_id: int,
        steps: Sequence[Step],
        lenses: Sequence[Lens] = (),
        *,
        faithful: bool = False,
    ) -> bool:
        """Write steps, and lenses of these or earlier steps; returns whether to stop.

        A step's own ``lens``, when it has one, is written with it. ``faithful``:
        tensors are kept in the reply's mode only where every bit comes back. A
        digest that a step brings with it is what was recorded, and is kept.
        """
        reply = self._reply(message_id)
        # Before the transaction: other writers need not wait for the encoding.
        encoded = [encode_all(step, reply.tensors, faithful=faithful) for step in steps]
        ready = [step.lens for step in steps if step.lens is not None] + list(lenses)
        digests = {step.step_index: step.digest or of_step(step) for step in steps}
        both = {
            step.step_index: (digests[step.step_index], tensor_digest)
            for step, (_, tensor_digest) in zip(steps, encoded, strict=True)
        }
        brought = {step.step_index for step in steps if step.digest is not None}
        with self.write() as connection:
            stop = lifecycle.require(connection, message_id, Status.RUNNING)
            first = len(reply.step_ids)
            for number, step in enumerate(steps, start=first):
                if step.step_index != number:
                    raise StoreError(
                        f"Step {step.step_index} of message {message_id} is out of order: write "
                        f"step {number} first."
                    )
            written = self._rows.insert_steps(
                connection, message_id, steps, [rows for rows, _ in encoded], both
            )
            known = ChainMap(written, reply.step_ids)
            of_steps = []
            for lens in ready:
                if lens.step_index not in known:
                    raise NotFound(
                        f"Message {message_id} has no step {lens.step_index} for its lens: write "
                        "the step first."
                    )
                digest = digests.get(lens.step_index) or reply.digests.get(lens.step_index)
                if digest is not None and lens.step_index not in brought:
                    digest = with_lens(digest, lens)
                of_steps.append((known[lens.step_index], lens, digest))
            self._rows.insert_lenses(connection, of_steps)
        reply.step_ids.update(written)
        reply.digests.update(digests)
        for lens in ready:
            reply.digests.pop(lens.step_index, None)
        return stop

    def finish_reply(
        self,
        message_id: int,
        end: TurnEnd,
        *,
        tensors_pruned_at: dt.datetime | None = None,
        digest: str | None = None,
    ) -> None:
        """Write how a reply ended; no step follows.

        An imported one may have been pruned before, and brings the ``digest`` that
        its file gives it, which is kept whether or not it is still true.
        """
        if end.status.is_live:
            raise StoreError(f"A reply cannot end as {end.status}: give it a status that is final.")
        with self.write() as connection:
            lifecycle.require(connection, message_id, *_LIVE)
            lifecycle.end(
                connection,
                message_id,
                end.status,
                end.output,
                end.reason,
                number(end.seconds),
                digest,
                checks=documents.to_document(end.checks),
                parts=documents.part_documents(end.parts),
            )
            if tensors_pruned_at is not None:
                connection.execute(
                    update(models.Message)
                    .where(models.Message.id == message_id)
                    .values(tensors_pruned_at=tensors_pruned_at)
                )
        self._replies.pop(message_id, None)
        self.become_checkpointer()

    def digest_of(self, message_id: int) -> str:
        """The digest of a message as it is now, whatever was recorded."""
        with self._transaction() as connection:
            lifecycle.state_of(connection, message_id)
            return closing.closing_digest(connection, message_id)

    def request_stop(self, message_id: int) -> None:
        """Ask whoever generates a reply to stop; one that nobody has begun is stopped at once."""
        with self.write() as connection:
            status, _ = lifecycle.state_of(connection, message_id)
            if status is Status.QUEUED:
                lifecycle.end(
                    connection, message_id, Status.STOPPED, "", "stopped before it began", None
                )
            elif status is Status.RUNNING:
                connection.execute(
                    update(models.Message)
                    .where(models.Message.id == message_id)
                    .values(stop_requested=True)
                )

    def stop_requested(self, message_id: int) -> bool:
        """Whether a stop was asked for. ``append`` tells the same at no further cost."""
        with self._transaction() as connection:
            return lifecycle.state_of(connection, message_id)[1]

    def mark_interrupted(self) -> list[int]:
        """End the running replies whose process is gone; returns their ids."""
        table = models.Message
        with self._transaction() as connection:
            running = connection.execute(
                select(table.id, *LIFE)
                .where(table.status == Status.RUNNING.value)
                .order_by(table.id)
                .with_for_update()
            ).all()
            dead = [row.id for row in running if is_gone(row)]
            for message_id in dead:
                said = lifecycle.text_so_far(connection, message_id)
                lifecycle.end(
                    connection,
                    message_id,
                    Status.INTERRUPTED,
                    said,
                    lifecycle.PROCESS_ENDED,
                    None,
                )
            if dead:
                connection.execute(_BUMP)
        return dead

    def end_abandoned(self, message_id: int, status: Status, reason: str) -> bool:
        """End a reply whose process was ended from outside; its text is what its tokens say.

        Returns whether it was live. Nothing is done to one that has ended.
        """
        with self.write() as connection:
            if not lifecycle.state_of(connection, message_id)[0].is_live:
                return False
            said = lifecycle.text_so_far(connection, message_id)
            lifecycle.end(connection, message_id, status, said, reason, None)
        return True

    # ------------------------------------------------------------------- worker

    def set_worker_state(
        self,
        state: str,
        *,
        model_id: str | None = None,
        detail: str = "",
        progress: float | None = None,
    ) -> None:
        """Say what this process, which owns a model, is doing; also its sign of life.

        Only a change counts the version up: a viewer need not look at a heartbeat.
        """
        self._heartbeat.start()
        with self._transaction() as connection:
            if lifecycle.report_worker(connection, state, model_id, detail, progress):
                connection.execute(_BUMP)

    def become_checkpointer(self) -> None:
        """Fold the write-ahead log from now on, if no process does; done when a reply ends."""
        if self._checkpointer.elect():
            with self._transaction() as connection:
                set_checkpoint(connection)

    # ------------------------------------------------------------------- within

    @contextmanager
    def making_room(self) -> Iterator[bool]:
        """What throws things away: True where it is to be done a little at a time.

        On a disk that is nearly full the log has the room of the store's reserve.
        """
        low = self._reserve.is_low()
        if low:
            self._reserve.release()
        try:
            yield low
        finally:
            if low:
                self.fold()
                self._reserve.restore()

    def fold(self) -> None:
        """Fold the log into the file, so that it takes no more room than it has."""
        with translate_errors(self._store), self._engine.connect() as connection:
            raw = connection.connection.driver_connection
            if isinstance(raw, sqlite3.Connection):
                # Waits for readers and writers, so it never meets another checkpoint.
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def _thin_out(self, conversation_id: int) -> None:
        """Delete what hangs on a conversation, the last first, and fold the log in between."""
        while True:
            with self.write() as connection:
                more = lifecycle.thin_out(connection, conversation_id)
            self.fold()
            if not more:
                return

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One write of the store's own modules: atomic, and counted."""
        with self._transaction() as connection:
            yield connection
            # Last, because on PostgreSQL it holds every other writer until the commit.
            connection.execute(_BUMP)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        self._presence.require()
        with translate_errors(self._store), self._engine.begin() as connection:
            yield connection

    def _reply(self, message_id: int) -> _Reply:
        """What is known of a reply; read back when another process began it."""
        if message_id not in self._replies:
            with self._transaction() as connection:
                capture = connection.execute(
                    select(models.Message.capture).where(models.Message.id == message_id)
                ).scalar()
                if capture is None:
                    lifecycle.state_of(connection, message_id)
                    raise StoreError(
                        f"Message {message_id} has not been started: call start_reply first."
                    )
                steps = connection.execute(
                    select(models.Step.step_index, models.Step.id, models.Step.digest).where(
                        models.Step.message_id == message_id
                    )
                ).all()
            self._replies[message_id] = _Reply(
                capture["policy"]["tensors"],
                {row.step_index: row.id for row in steps},
                {row.step_index: row.digest for row in steps},
            )
        return self._replies[message_id]
