"""The worker as a real process, commanded and watched through the store."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from oki_trace import queueing, worker
from oki_trace.errors import StoreError
from oki_trace.records import ModelChoice, Status
from oki_trace.store.schema import files
from tests import models, tiny
from tests.served_store import FOREVER, ROOT, ServedStore, serving, store_at
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends processes by signals")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServedStore]:
    with store_at(tmp_path) as store:
        yield store


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStore]:
    """A store with one worker for several tests: torch takes seconds to start."""
    with store_at(tmp_path_factory.mktemp("served")) as store:
        worker.ensure_running(store.db)
        until(store.reader.worker, "the worker's first sign of life")
        yield store
        assert len(store.workers()) == 1, "it has served all of it"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_endless(tmp_path_factory.mktemp("models") / "endless")


def test_a_queued_reply_is_answered(served: ServedStore, small: Path) -> None:
    reply = served.ended(served.ask(small))
    assert (reply.status, reply.reason, reply.tokens) == (Status.COMPLETE, "token limit", 4)
    steps = list(served.reader.iter_steps(reply.id))
    assert all(step.lens is not None and step.attention for step in steps)
    assert served.reader.prompt(reply.id).text == "<s>user: the fox\n<s>assistant: "
    state = served.idle()
    (process,) = served.workers()
    assert (state.pid, state.model_id) == (process.pid, str(small))
    assert state.detail == f"{small} (float32) on cpu"


def test_replies_are_answered_in_the_order_they_were_asked_for(
    served: ServedStore, small: Path
) -> None:
    replies = [served.ask(small) for _ in range(3)]
    assert [served.ended(reply).status for reply in replies] == [Status.COMPLETE] * 3
    steps = [next(served.reader.iter_steps(reply)) for reply in replies]
    assert len({step.token_id for step in steps}) == 1, "the same question, greedily"


def test_asking_again_starts_no_second_worker(served: ServedStore) -> None:
    """Neither from the process that started it nor from another one."""
    (process,) = served.workers()
    for _ in range(3):
        worker.ensure_running(served.db)
    code = (
        "import sys, psutil; from oki_trace import worker; worker.ensure_running(sys.argv[1]); "
        "sys.exit(len(psutil.Process().children()))"
    )
    done = subprocess.run([sys.executable, "-c", code, served.db], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert served.workers() == [process]


def test_a_stop_ends_a_long_reply_and_keeps_it(served: ServedStore, endless: Path) -> None:
    reply = served.ask(endless, FOREVER)
    before = served.under_way(reply)
    assert before.status is Status.RUNNING
    assert served.state().state == "decoding"
    served.writer.request_stop(reply)
    stopped = served.ended(reply)
    assert (stopped.status, stopped.reason) == (Status.STOPPED, "stopped")
    assert stopped.tokens >= before.tokens
    steps = list(served.reader.iter_steps(reply))
    assert [step.step_index for step in steps] == list(range(stopped.tokens))
    assert all(step.lens is not None for step in steps)


def test_a_model_that_cannot_be_loaded_fails_its_reply_alone(
    served: ServedStore, small: Path
) -> None:
    bad, good = served.ask("./no/such/model"), served.ask(small)
    failed = served.ended(bad)
    assert failed.status is Status.FAILED
    assert failed.reason is not None and "There is no ./no/such/model here" in failed.reason
    assert served.ended(good).status is Status.COMPLETE
    log = worker.lock_path(served.db).with_suffix(".log").read_text()
    assert f"message {bad} failed: There is no ./no/such/model here" in log
    assert "Traceback" not in log


def test_a_prompt_that_does_not_fit_fails_its_reply_alone(served: ServedStore, small: Path) -> None:
    choice = ModelChoice(str(small))
    request = queueing.ReplyRequest(queueing.new_messages("word " * 200), choice)
    _, bad = queueing.submit(served.writer, request)
    failed = served.ended(bad)
    assert failed.reason is not None and "context holds 128" in failed.reason
    assert served.ended(served.ask(small)).status is Status.COMPLETE


def _mute(model: Any, tokenizer: Any) -> None:
    model.generation_config.suppress_tokens = list(range(tiny.VOCABULARY))


def _not_a_number(model: Any, tokenizer: Any) -> None:
    model.lm_head.weight.data.fill_(float("nan"))


def _no_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('never') }}"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_mute, "suppression of 300 tokens left no token to choose"),
        (_not_a_number, "logits are not finite at step 0"),
        (_no_template, "chat template refused the messages: never"),
    ],
)
def test_a_model_that_is_broken_fails_its_reply_alone(
    served: ServedStore,
    small: Path,
    tmp_path: Path,
    break_it: Callable[[Any, Any], None],
    reason: str,
) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    break_it(model, tokenizer)
    folder = models.save(tmp_path / "broken", model, tokenizer)
    failed = served.ended(served.ask(folder))
    assert (failed.status, failed.tokens) == (Status.FAILED, 0)
    assert failed.reason is not None and reason in failed.reason
    assert served.ended(served.ask(small)).status is Status.COMPLETE
    log = worker.lock_path(served.db).with_suffix(".log").read_text()
    assert f"message {failed.id} failed: {failed.reason}" in log
    assert "Traceback" not in log


def test_a_conversation_deleted_meanwhile_does_not_end_the_worker(
    served: ServedStore, small: Path, endless: Path
) -> None:
    reply = served.under_way(served.ask(endless, FOREVER))
    with pytest.raises(StoreError, match="stop it first"):
        served.writer.delete_conversation(reply.conversation_id)
    # Another program does not ask.
    with closing(sqlite3.connect(served.db)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM conversation WHERE id = ?", (reply.conversation_id,))
        connection.commit()
    assert served.ended(served.ask(small)).status is Status.COMPLETE


def test_what_it_leaves_stands_beside_the_store(served: ServedStore) -> None:
    """Not in the folder it was started from: so all who use a store find its worker."""
    lock = worker.lock_path(served.db)
    assert lock == Path(served.db + ".worker.lock") and lock.is_file()
    assert lock.with_suffix(".log").is_file()
    (process,) = served.workers()
    # The address of a store may hold a password, and a command line is for all to see.
    assert served.db not in " ".join(process.cmdline())


def test_its_log_is_for_its_user_alone(served: ServedStore) -> None:
    log = worker.lock_path(served.db).with_suffix(".log")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_others_could_read_is_theirs_no_more(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "worker.log"
        worker._private(path).close()
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        path.write_text("kept\n")
        with worker._private(path) as output:
            output.write(b"and more\n")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "kept\nand more\n"


def test_folders_made_for_a_server_s_worker_are_for_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "a" / "worker.lock"
    monkeypatch.setattr(worker, "lock_path", lambda db: made)
    before = os.umask(0)
    try:
        # No server: it ends by itself, and says so in its log.
        worker.ensure_running("postgresql://nobody@127.0.0.1:9/nothing")
    finally:
        os.umask(before)
    worker._started.pop(made).wait(timeout=60)
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert "the server does not answer" in made.with_suffix(".log").read_text()


def test_a_long_vacuum_does_not_end_it(
    store: ServedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its signs of life nor its search for work: both are tried again."""
    monkeypatch.setattr(files, "_BUSY_SECONDS", 0.05)
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.1)
    with serving(store) as thread:
        until(store.reader.worker, "its first sign of life")
        with closing(sqlite3.connect(store.db, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            until(lambda: "not written" in caplog.text, "a sign of life that was not written")
            # Let it see that something has changed; it looks for work, and waits for the store.
            connection.execute("UPDATE store_state SET version = version + 1")
            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            caplog.clear()
            until(lambda: "not written" in caplog.text, "another sign of life that was not written")
            connection.execute("ROLLBACK")
        reply = store.ask("no/such-model")
        ended = store.ended(reply)
        assert (ended.status, thread.is_alive()) == (Status.FAILED, True)


def test_one_store_has_one_lock_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("store.db", "./store.db", str(tmp_path / "store.db"), f"sqlite:///{tmp_path}/store.db")
    assert {worker.lock_path(name) for name in names} == {tmp_path / "store.db.worker.lock"}
    remote = worker.lock_path("postgresql://me:secret@host/traces")
    assert remote.parent == tmp_path / "data", "a server has no folder"
    assert remote != worker.lock_path("postgresql://me:secret@host/others")
    assert "secret" not in str(remote)


def test_no_module_of_the_folder_it_is_started_from_is_run(
    store: ServedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may have put a ``torch.py`` beside a model."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("torch", "psutil", "json"):
        (folder / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit")
    monkeypatch.chdir(folder)
    worker.ensure_running(store.db)
    ended = store.ended(store.ask("./no/such/model"))
    assert ended.reason is not None and "There is no ./no/such/model here" in ended.reason
    assert not (folder / "ran").exists()


def test_of_two_started_at_once_one_leaves(store: ServedStore) -> None:
    """Two processes may both find no worker there, and start one."""
    command = [sys.executable, "-m", "oki_trace.worker", "--parent", str(os.getpid())]
    environment = {**os.environ, "OKI_TRACE_DB": store.db}
    started = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(2)]
    try:
        left = until(lambda: [p for p in started if p.poll() is not None], "one to leave")
        state = until(store.reader.worker, "the other to say it is there")
        (stayed,) = [p for p in started if p not in left]
        assert [p.returncode for p in left] == [0]
        assert (state.pid, stayed.poll()) == (stayed.pid, None)
        stayed.terminate()
        assert stayed.wait(timeout=60) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()


ASK_AND_LEAVE = """
import sys
from oki_trace import queueing, worker
from oki_trace.records import ModelChoice, Sampling
from oki_trace.store.writing.writer import TraceWriter

db, model = sys.argv[1:]
with TraceWriter(db, checkpoint=False) as writer:
    messages = queueing.new_messages("the fox")
    request = queueing.ReplyRequest(messages, ModelChoice(model), Sampling(max_new_tokens=4))
    queueing.submit(writer, request)
worker.ensure_running(db)
"""


def test_it_follows_its_parent_once_nothing_waits(store: ServedStore, small: Path) -> None:
    # Not waited for, so that it stays as a zombie: gone all the same.
    with subprocess.Popen([sys.executable, "-c", ASK_AND_LEAVE, store.db, small], cwd=ROOT):
        until(store.reader.worker, "the worker's first sign of life")
        until(lambda: store.state().state == "gone", "the worker to leave")
        assert store.workers() == []
    (conversation,) = store.reader.conversations()
    reply = store.reader.messages(conversation.id)[-1]
    assert (reply.status, reply.tokens) == (Status.COMPLETE, 4), "what was asked for came first"


def test_killed_in_the_middle_and_started_again(
    store: ServedStore, small: Path, endless: Path
) -> None:
    cut = store.ask(endless, FOREVER)
    worker.ensure_running(store.db)
    before = store.under_way(cut)
    (killed,) = store.workers()
    killed.kill()
    killed.wait(timeout=30)
    # Said by the reader alone: nobody has written anything since. The process that held the
    # model ends with the worker's.
    until(lambda: not store.reader.message(cut).status.is_live, "its model to be gone")
    seen = store.reader.message(cut)
    assert seen.status is Status.INTERRUPTED
    assert seen.tokens >= before.tokens and seen.content
    assert store.state().state == "gone"

    following = store.ask(small)
    worker.ensure_running(store.db)
    assert store.ended(following).status is Status.COMPLETE
    (second,) = store.workers()
    assert second.pid != killed.pid
    assert store.reader.message(cut).status is Status.INTERRUPTED
    assert "ended" in (store.reader.message(cut).reason or "")

    # Asked to leave, it ends the reply under way in good order; what waits goes on waiting.
    last, waiting = store.ask(endless, FOREVER), store.ask(small)
    store.under_way(last)
    second.terminate()
    assert second.wait(timeout=60) == 0
    assert store.reader.message(last).status is Status.STOPPED
    assert store.reader.message(waiting).status is Status.QUEUED
