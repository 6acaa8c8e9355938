"""A process on another machine is judged by its signs of life, and by the server's clock."""

from __future__ import annotations

import datetime as dt

import pytest
from sqlalchemy import func, select, update

from oki_trace.errors import StoreError
from oki_trace.records import Status
from oki_trace.store import heartbeat
from oki_trace.store.heartbeat import BEAT_SECONDS, SILENCE_SECONDS
from oki_trace.store.owner import this_process
from oki_trace.store.schema import models
from tests.store.stores import Store
from tests.waiting import until

ELSEWHERE = str(this_process()._replace(host="another-host"))


def silent_for(store: Store, message: int, seconds: float | None) -> None:
    """Make the reply another machine's, which last gave a sign so long ago."""
    at = None if seconds is None else func.now() - dt.timedelta(seconds=seconds)
    with store.writer.write() as connection:
        connection.execute(
            update(models.Message)
            .where(models.Message.id == message)
            .values(owner=ELSEWHERE, seen_at=at)
        )


def seen_at(store: Store, message: int) -> dt.datetime:
    query = select(models.Message.seen_at).where(models.Message.id == message)
    (found,) = store.reader.rows(query)[0]
    assert isinstance(found, dt.datetime)
    return found


@pytest.mark.postgresql
@pytest.mark.parametrize("db", ["postgresql"], indirect=True)
class TestOnAServer:
    def test_silence_means_interrupted_to_everyone(self, store: Store) -> None:
        conversation, message = store.reply()
        silent_for(store, message, SILENCE_SECONDS - 5)
        assert store.reader.message(message).status is Status.RUNNING
        assert store.writer.mark_interrupted() == []
        with pytest.raises(StoreError, match="being generated"):
            store.writer.delete_conversation(conversation)
        silent_for(store, message, SILENCE_SECONDS + 5)
        assert store.reader.message(message).status is Status.INTERRUPTED
        assert store.reader.conversation(conversation).status is Status.INTERRUPTED
        assert store.writer.mark_interrupted() == [message]
        assert store.writer.mark_interrupted() == []

    def test_one_that_never_gave_a_sign_is_not_judged(self, store: Store) -> None:
        _, message = store.reply()
        silent_for(store, message, None)
        assert store.reader.message(message).status is Status.RUNNING
        assert store.writer.mark_interrupted() == []

    def test_one_of_this_machine_is_asked_for_directly(self, store: Store) -> None:
        _, message = store.reply()
        with store.writer.write() as connection:
            long_ago = func.now() - dt.timedelta(days=1)
            connection.execute(update(models.Message).values(seen_at=long_ago))
        assert store.reader.message(message).status is Status.RUNNING

    def test_signs_are_given_while_a_reply_is_written(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert BEAT_SECONDS * 3 < SILENCE_SECONDS, "one may be late, and one lost"
        monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
        _, message = store.reply()
        first, version = seen_at(store, message), store.reader.version()
        until(lambda: seen_at(store, message) > first, "a later sign of life")
        assert store.reader.version() == version, "a sign of life is news to nobody"

    def test_a_worker_elsewhere_is_gone_when_silent(self, store: Store) -> None:
        store.writer.set_worker_state("idle", model_id="m")
        for silence, state in ((SILENCE_SECONDS - 5, "idle"), (SILENCE_SECONDS + 5, "gone")):
            with store.writer.write() as connection:
                at = func.now() - dt.timedelta(seconds=silence)
                connection.execute(update(models.Worker).values(owner=ELSEWHERE, heartbeat=at))
            worker = store.reader.worker()
            assert worker is not None and worker.state == state


@pytest.mark.parametrize("db", ["sqlite"], indirect=True)
def test_a_file_needs_no_signs(store: Store) -> None:
    store.reply()
    assert store.writer._heartbeat._thread is None
