"""Processes that share a store, as an explorer, its worker and a terminal do.

``explorer`` keeps a reader and a writer open and makes others beside them, which come
and go within the process; ``worker`` writes replies and checkpoints; ``visitor`` opens
the store, does one thing, and ends or is killed. Each gets the store's path and a
connection to report to, and looks at nothing but the store.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from oki_trace.errors import NotFound, StoreBusy, StoreError
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.maintenance import prune
from oki_trace.store.maintenance.vacuum import vacuum
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

KEPT = "kept"
# Between two things that a thread of an explorer does: the processor is for all.
PAUSE_S = 0.02


def read_all(reader: TraceReader) -> int:
    """Read every step of the newest conversations; returns how many."""
    count = 0
    for conversation in reader.conversations(limit=3):
        try:
            for message in reader.messages(conversation.id):
                count += sum(1 for _ in reader.iter_steps(message.id))
        except NotFound:  # deleted meanwhile
            continue
    return count


def explorer(db: str, seed: int, report: Connection) -> None:
    """Report ("made", title) for each conversation that was committed, and every fault."""
    stopping = threading.Event()
    reader, writer = TraceReader(db), TraceWriter(db, checkpoint=False)
    log = Path(f"{db}-wal").stat().st_ino
    speaking = threading.Lock()

    def say(*what: object) -> None:
        with speaking:
            report.send(what)

    def repeat(work: Callable[[random.Random], None], number: int) -> None:
        moment = random.Random(seed * 10 + number)
        while not stopping.is_set():
            try:
                work(moment)
                if Path(f"{db}-wal").stat().st_ino != log:
                    say("fault", "the log was deleted under the explorer")
                    return
            except StoreBusy:
                continue
            except BaseException:
                say("fault", traceback.format_exc())
                return
            stopping.wait(PAUSE_S)

    def poll(moment: random.Random) -> None:
        reader.version()
        read_all(reader)

    def look(moment: random.Random) -> None:
        with TraceReader(db) as other:
            read_all(other)

    def write(moment: random.Random) -> None:
        title = f"{KEPT} {seed} {moment.getrandbits(60)}"
        if moment.random() < 0.5:
            writer.create_conversation(title)
        else:
            with TraceWriter(db, checkpoint=False) as other:
                other.create_conversation(title)
        say("made", title)

    works = (poll, look, look, write)
    threads = [
        threading.Thread(target=repeat, args=(work, number)) for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    say("ready")
    report.recv()  # until the test has seen enough
    stopping.set()
    for thread in threads:
        thread.join()
    reader.close()
    writer.close()
    say("ended")


def worker(db: str, seed: int, report: Connection) -> None:
    """Write replies and checkpoint, until killed."""
    rng = np.random.default_rng(seed)
    with TraceWriter(db) as writer:
        report.send(("ready",))
        while True:
            try:
                writer.mark_interrupted()
                conversation = writer.create_conversation("a reply")
                writer.add_message(conversation, ChatMessage(Role.USER, "and then?"))
                message = writer.queue_reply(
                    conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
                )
                writer.start_reply(message, builders.turn_start("half"))
                for index in range(6):
                    writer.append(message, [builders.coherent_step(index, rng)])
                writer.finish_reply(message, TurnEnd(Status.COMPLETE, " the" * 6, "limit", 0.1))
                if conversation % 3 == 0:
                    writer.delete_conversation(conversation)
            except StoreBusy:
                continue


def visitor(db: str, seed: int, report: Connection) -> None:
    """Do one thing that a command does."""
    moment = random.Random(seed)
    try:
        _visits(db, moment)[moment.choices(range(7), [4, 4, 4, 2, 4, 4, 1])[0]]()
    except StoreBusy:
        pass
    except StoreError as error:
        # A vacuum is refused while a reply is generated.
        if "being generated" not in str(error):
            report.send(("fault", traceback.format_exc()))
            return
    except BaseException:
        report.send(("fault", traceback.format_exc()))
        return
    report.send(("done",))


def _visits(db: str, moment: random.Random) -> list[Callable[[], object]]:
    def rename() -> None:
        with TraceWriter(db, checkpoint=False) as writer:
            writer.rename_conversation(1, f"title {moment.random()}")

    def show() -> None:
        with TraceReader(db) as reader:
            read_all(reader)

    def make_room() -> None:
        with TraceReader(db) as reader, TraceWriter(db, checkpoint=False) as writer:
            prune.prune(writer, prune.plan(reader, max_bytes=200_000))

    def fold() -> None:
        with TraceWriter(db) as writer:
            writer.create_conversation("a visit")
            time.sleep(moment.random() / 50)

    return [rename, rename, show, make_room, fold, lambda: migrate.ensure(db), lambda: vacuum(db)]


def check(db: str, seed: int, report: Connection) -> None:
    """What SQLite and ``verify`` find wrong, while the others go on."""
    with TraceReader(db) as reader:
        report.send(("found", [str(finding) for finding in Verification(reader)]))
