"""Readers and writers within one process, while other processes come, go and are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

import pytest

from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.store import neighbours

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="killed as Linux kills")

# Each process is forked from one that has imported everything and has no store open.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.store.neighbours"])


@dataclass
class Neighbour:
    """A process, and what it reported so far."""

    process: ForkServerProcess
    connection: Connection
    said: list[tuple[object, ...]] = field(default_factory=list)

    def hear(self, timeout: float = 0.0) -> None:
        with suppress(EOFError, OSError):
            while self.connection.poll(timeout):
                self.said.append(self.connection.recv())

    def hear_until(self, word: str) -> tuple[object, ...]:
        while True:
            found = next((what for what in self.said if what[0] in (word, "fault")), None)
            if found is not None:
                assert found[0] == word, found[1]
                return found
            assert wait([self.connection], 120), f"no {word}"
            self.said.append(self.connection.recv())

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.hear()
        self.connection.close()


@contextmanager
def started(
    target: Callable[[str, int, Connection], None], db: Path, seed: int
) -> Iterator[Neighbour]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=target, args=(str(db), seed, theirs), daemon=True)
    process.start()
    theirs.close()
    neighbour = Neighbour(process, ours)
    try:
        yield neighbour
    finally:
        neighbour.kill()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.stress)])
def test_nothing_is_lost_beside_an_explorer(
    file: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server that the processes are forked from imports by this path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # They would run this process's main module, which may be a page that another test drew.
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    with TraceWriter(file) as writer:
        writer.create_conversation("the first")
    moment = random.Random(rounds)
    made: list[object] = []
    kills = 0
    with started(neighbours.explorer, file, 1) as one, started(neighbours.explorer, file, 2) as two:
        explorers = (one, two)
        for explorer in explorers:
            explorer.hear_until("ready")
        number = 0
        while number < rounds:
            with started(neighbours.worker, file, number) as worker:
                worker.hear_until("ready")
                for _ in range(10):
                    number += 1
                    with started(neighbours.visitor, file, number) as visitor:
                        if moment.random() < 0.3:
                            # Not waiting for something: the moment itself is what is tried.
                            visitor.process.join(moment.uniform(0.0, 0.05))
                            kills += visitor.process.is_alive()
                            visitor.kill()
                        else:
                            visitor.hear_until("done")
                    assert [what for what in visitor.said if what[0] == "fault"] == []
            kills += 1  # the worker
            for explorer in explorers:
                explorer.hear()
                assert [what for what in explorer.said if what[0] == "fault"] == []
            if number % 100 == 0 or number >= rounds:
                with started(neighbours.check, file, 0) as check:
                    assert check.hear_until("found") == ("found", [])
        for explorer in explorers:
            explorer.connection.send("enough")
            explorer.hear_until("ended")
            made += [what[1] for what in explorer.said if what[0] == "made"]
    assert made
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with TraceReader(file) as reader:
        kept = {c.title for c in reader.conversations(neighbours.KEPT, limit=10**6)}
    assert set(made) <= kept, "a conversation that was committed is lost"
    print(f"{number} visits, {kills} kills, {len(made)} conversations kept, none lost")
