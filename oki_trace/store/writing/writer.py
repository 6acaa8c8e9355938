"""Writes conversations, replies and their steps to a store.

Each method is one atomic transaction that also increments the store's version. Generated
steps are numbered from 0 without a gap, and only a running reply accepts steps. Methods are
thread-safe.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from sqlalchemy import Connection, func, select, update

from oki_trace import records
from oki_trace.errors import NotFound, StoreError
from oki_trace.records import LOGIT, Role, Status
from oki_trace.store.db_errors import translate_errors
from oki_trace.store.digest import PromptDigest, with_lens
from oki_trace.store.disk_reserve import Reserve
from oki_trace.store.file_guard import FileGuard
from oki_trace.store.liveness import Heartbeat, running_replies, this_process
from oki_trace.store.reading import documents
from oki_trace.store.reading.messages import text_so_far
from oki_trace.store.schema import identity, migrate, models
from oki_trace.store.schema.engine import set_checkpoint, writer_engine
from oki_trace.store.schema.identity import Db
from oki_trace.store.writing import lifecycle, message_digest
from oki_trace.store.writing.checkpoint import Checkpointer
from oki_trace.store.writing.rows import StepRows, encode, number

_BUMP_VERSION = update(models.StoreState).values(version=models.StoreState.version + 1)


@dataclass(slots=True)
class _Reply:
    """The state of a reply that this process writes, kept so that a step needs no query."""

    tensors: records.TensorMode
    step_ids: dict[int, int] = field(default_factory=dict)
    # Of the steps whose lens has not been written yet.
    digests: dict[int, bytes | None] = field(default_factory=dict)


class TraceWriter:
    """A store open for writing; it is created or upgraded when needed.

    ``checkpoint=False`` is for a process that submits requests and does not generate.
    Of those that generate, one at a time checkpoints the write-ahead log.
    ``making_room`` is for a caller that deletes: on a full disk it uses up the store's
    reserve to open the store. ``keeps_reserve=False`` is for a temporary store.
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
        self._file_guard = FileGuard(identity.file_of(url))
        self._checkpointer = Checkpointer(identity.file_of(url), wanted=checkpoint)
        self._engine = writer_engine(url, checkpoint=self._checkpointer.elect())
        self._heartbeat = Heartbeat(self._engine)
        self._rows = StepRows(self._engine.dialect)
        self._replies: dict[int, _Reply] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the last one to close checkpoints the log."""
        self._heartbeat.stop()
        self._engine.dispose()
        self._checkpointer.resign()
        self._reserve.restore()
        if self._keeps_reserve:
            self._reserve.keep()

    # ------------------------------------------------------------ conversations

    def create_conversation(self, title: str, *, created_at: dt.datetime | None = None) -> int:
        """Create a conversation; returns its id."""
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

        Raises StoreError when a process is writing to it. One transaction, but on a full
        disk its last steps are deleted first, a few at a time.
        """
        with self.making_room() as low:
            if low:
                self._thin_out(conversation_id)
            with self.write() as connection:
                lifecycle.delete_conversation(connection, conversation_id)

    def delete_branch(self, message_id: int) -> int:
        """Delete a message and all that follow it; returns how many.

        Raises StoreError when one of them is being generated, or none would be left.
        """
        with self.making_room(), self.write() as connection:
            return lifecycle.delete_branch(connection, message_id)

    def add_message(
        self,
        conversation_id: int,
        message: records.ChatMessage,
        *,
        parent_id: int | None = None,
        created_at: dt.datetime | None = None,
        digest: str | None = None,
    ) -> int:
        """Add a complete message; returns its id.

        It follows ``parent_id``, by default the newest message, and with NO_PARENT none.
        ``digest``: see finish_reply.
        """
        with self.write() as connection:
            return lifecycle.add(
                connection,
                conversation_id,
                role=message.role.value,
                content=message.content,
                parent_id=parent_id,
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
        choice: records.ModelChoice,
        sampling: records.Sampling,
        policy: records.CapturePolicy,
        *,
        claim: bool = False,
        created_at: dt.datetime | None = None,
        template: records.TemplateOptions | None = None,
        parent_id: int | None = None,
        branch_of: int | None = None,
        branch_step: int | None = None,
        forced: records.Forced | None = None,
        score_of: int | None = None,
    ) -> int:
        """Queue a reply to the message ``parent_id``, by default the newest; returns its id.

        ``claim``: this process generates it itself, so no worker may take it. ``branch_of``
        and ``branch_step``: the reply that it departs from, and where. ``forced``: the tokens
        of its first steps.
        ``score_of``: the message whose text it scores.
        """
        if claim:
            self._heartbeat.start()
        with self.write() as connection:
            return lifecycle.add(
                connection,
                conversation_id,
                role=Role.ASSISTANT.value,
                content="",
                **(_running() if claim else {"status": Status.QUEUED.value}),
                model_id=choice.model_id,
                choice=documents.to_document(choice),
                sampling=documents.to_document(sampling),
                policy=documents.to_document(policy),
                template=documents.to_document(template or None),
                created_at=created_at or lifecycle.now(),
                parent_id=parent_id,
                branch_of=branch_of,
                branch_step=branch_step,
                forced=documents.to_document(forced),
                score_of=score_of,
            )

    def claim_next_reply(self) -> int | None:
        """Take the oldest queued reply for this process; None when there is none."""
        table = models.Message
        # FOR UPDATE is PostgreSQL's; on SQLite the whole transaction has the lock.
        oldest = (
            select(table.id)
            .where(table.status == Status.QUEUED.value)
            .order_by(table.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._transaction() as connection:
            message_id = connection.execute(oldest).scalar()
            if message_id is None:
                return None
            lifecycle.set_values(connection, message_id, **_running())
            connection.execute(_BUMP_VERSION)
        self._heartbeat.start()
        return message_id

    def start_reply(self, message_id: int, start: records.TurnStart) -> None:
        """Write what is known before the first token: the prompt and the effective settings."""
        self._heartbeat.start()
        prompt = PromptDigest().add(
            start.prompt.token_ids, start.prompt.tokens, start.prompt.segments
        )
        with self.write() as connection:
            lifecycle.require_free(connection, message_id)
            lifecycle.set_values(
                connection,
                message_id,
                **_running(),
                model_id=start.model_id,
                prompt_len=len(start.prompt),
                generation=documents.to_document(start.generation),
                capture=documents.to_document(start.capture),
                prompt=start.prompt.text,
                # Until the reply has ended: its text before its own tokens.
                content=start.prefix_text,
                prefix_len=start.prefix_len or None,
                digest=prompt.hex(),
            )
            self._rows.insert_prompt(connection, message_id, start.prompt)
        self._replies[message_id] = _Reply(start.capture.policy.tensors)

    def append(
        self,
        message_id: int,
        steps: Sequence[records.Step],
        lenses: Sequence[records.Lens] = (),
        *,
        faithful: bool = False,
    ) -> bool:
        """Write steps, and lenses of these or earlier steps; returns whether to stop.

        Generated steps are in order; given ones come in any order, each once. A step's own
        ``lens`` and ``lenses`` are written with it. ``faithful``: tensors are encoded in the
        reply's mode only where that loses no bit. A digest that a step brings along
        was computed when the step was recorded, and is kept.
        """
        reply = self._reply(message_id)
        # Before the transaction, so that other writers do not wait for the encoding.
        encoded = [encode(step, reply.tensors, faithful=faithful) for step in steps]
        generated = [one for one in encoded if one.step.step_index >= 0]
        digests = {one.step.step_index: one.digest for one in generated}
        with self.write() as connection:
            stop = lifecycle.require(connection, message_id, Status.RUNNING)
            for expected, one in enumerate(generated, start=len(reply.step_ids)):
                if one.step.step_index != expected:
                    raise StoreError(
                        f"Step {one.step.step_index} of message {message_id} is out of order: "
                        f"write step {expected} first."
                    )
            by_position = self._rows.insert_steps(connection, message_id, encoded)
            written = {one.step.step_index: by_position[one.step.position] for one in generated}
            of_steps: list[tuple[int, records.Lens, bytes | None]] = [
                (
                    by_position[one.step.position],
                    lens,
                    with_lens(one.digest, lens) if one.step.digest is None else one.digest,
                )
                for one in encoded
                if (lens := one.step.lens) is not None
            ]
            of_steps += (
                (by_position[one.step.position], lens, None)
                for one in encoded
                for lens in one.step.lenses
            )
            known = ChainMap(written, reply.step_ids)
            for lens in lenses:
                if lens.step_index not in known:
                    raise NotFound(
                        f"Message {message_id} has no step {lens.step_index} for its lens: write "
                        "the step first."
                    )
                digest = digests.get(lens.step_index) or reply.digests.get(lens.step_index)
                if digest is not None and lens.name == LOGIT:
                    digest = with_lens(digest, lens)
                of_steps.append((known[lens.step_index], lens, digest))
            self._rows.insert_lenses(connection, of_steps)
        reply.step_ids.update(written)
        reply.digests.update(digests)
        with_lenses = [one.step.step_index for one in generated if one.step.lens is not None]
        later = [lens.step_index for lens in lenses if lens.name == LOGIT]
        for step_index in (*with_lenses, *later):
            reply.digests.pop(step_index, None)
        return stop

    def finish_reply(
        self,
        message_id: int,
        end: records.TurnEnd,
        *,
        tensors_pruned_at: dt.datetime | None = None,
        digest: str | None = None,
    ) -> None:
        """Write how a reply ended; no step follows.

        An imported reply may have been pruned before, and brings the ``digest`` of its
        file, which is kept even if it does not match.
        """
        if end.status.is_live:
            raise StoreError(f"A reply cannot end as {end.status}: use a final status.")
        with self.write() as connection:
            lifecycle.require(connection, message_id, Status.QUEUED, Status.RUNNING)
            if tensors_pruned_at is not None:
                lifecycle.set_values(connection, message_id, tensors_pruned_at=tensors_pruned_at)
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
        self._replies.pop(message_id, None)
        self.become_checkpointer()

    def digest_of(self, message_id: int) -> str:
        """The digest of a message as it is now, whatever digest was recorded."""
        with self._transaction() as connection:
            lifecycle.state_of(connection, message_id)
            return message_digest.compute(connection, message_id)

    def request_stop(self, message_id: int) -> None:
        """Ask the process that generates a reply to stop; a queued reply is stopped at once."""
        with self.write() as connection:
            status, _ = lifecycle.state_of(connection, message_id)
            if status is Status.QUEUED:
                lifecycle.end(connection, message_id, Status.STOPPED, "", "stopped before it began")
            elif status is Status.RUNNING:
                lifecycle.set_values(connection, message_id, stop_requested=True)

    def stop_requested(self, message_id: int) -> bool:
        """Whether a stop was requested. ``append`` returns the same at no further cost."""
        with self._transaction() as connection:
            return lifecycle.state_of(connection, message_id)[1]

    def mark_interrupted(self) -> list[int]:
        """End the running replies whose process is dead; returns their ids."""
        with self._transaction() as connection:
            dead = [row.id for row in running_replies(connection, lock=True).dead]
            for message_id in dead:
                text = text_so_far(connection, message_id)
                reason = lifecycle.PROCESS_ENDED
                lifecycle.end(connection, message_id, Status.INTERRUPTED, text, reason)
            if dead:
                connection.execute(_BUMP_VERSION)
        return dead

    def end_abandoned(self, message_id: int, status: Status, reason: str) -> bool:
        """End a reply whose process was killed; its text is that of its tokens so far.

        Returns whether it was live. A reply that has ended is left as it is.
        """
        with self.write() as connection:
            if not lifecycle.state_of(connection, message_id)[0].is_live:
                return False
            text = text_so_far(connection, message_id)
            lifecycle.end(connection, message_id, status, text, reason)
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
        """Report what this process, which owns a model, is doing; also its heartbeat.

        Only a change increments the version: no viewer needs to read a heartbeat.
        """
        self._heartbeat.start()
        with self._transaction() as connection:
            if lifecycle.report_worker(connection, state, model_id, detail, progress):
                connection.execute(_BUMP_VERSION)

    def become_checkpointer(self) -> None:
        """Checkpoint the write-ahead log from now on, if no process does; see ``finish_reply``."""
        if self._checkpointer.elect():
            with self._transaction() as connection:
                set_checkpoint(connection)

    # --------------------------------------------------- for the store's modules

    @contextmanager
    def making_room(self) -> Iterator[bool]:
        """Around deletions; yields True where they must be done a little at a time.

        On a disk that is nearly full, the log gets the space of the store's reserve.
        """
        low = self._reserve.is_low()
        if low:
            self._reserve.release()
            # What the log holds goes into the file before deletions fill the log up.
            with suppress(StoreError):
                self.truncate_log()
        try:
            yield low
        finally:
            if low:
                self.truncate_log()
                self._reserve.restore()

    def truncate_log(self) -> None:
        """Checkpoint the log and give its space back to the disk."""
        with translate_errors(self._store), self._engine.connect() as connection:
            raw = connection.connection.driver_connection
            if isinstance(raw, sqlite3.Connection):
                # Waits for readers and writers, so two checkpoints never coincide.
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def _thin_out(self, conversation_id: int) -> None:
        """Delete the rows of a conversation, the last first, and truncate the log in between."""
        while True:
            with self.write() as connection:
                more = lifecycle.thin_out(connection, conversation_id)
            self.truncate_log()
            if not more:
                return

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """An atomic write of the store's own modules; it increments the version."""
        with self._transaction() as connection:
            yield connection
            # Last, because on PostgreSQL it holds every other writer until the commit.
            connection.execute(_BUMP_VERSION)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        self._file_guard.require()
        with translate_errors(self._store), self._engine.begin() as connection:
            yield connection

    def _reply(self, message_id: int) -> _Reply:
        """The state of a reply; read from the store when another process began it."""
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
                        models.Step.message_id == message_id, models.Step.step_index.is_not(None)
                    )
                ).all()
            self._replies[message_id] = _Reply(
                capture["policy"]["tensors"],
                {row.step_index: row.id for row in steps},
                {row.step_index: row.digest for row in steps},
            )
        return self._replies[message_id]


def _running() -> dict[str, Any]:
    """The columns of a reply that this process generates."""
    return {
        "status": Status.RUNNING.value,
        "owner": str(this_process()),
        "heartbeat_at": func.now(),
    }
