"""A process killed at any moment loses at most the step in flight."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status, TurnEnd
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.owner import Owner, is_dead, this_process
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store import victim
from tests.store.stores import assert_same

VICTIM = Path(__file__).with_name("victim.py")
KILLS = 10


@dataclass
class Told:
    """What a killed process had acknowledged."""

    opened: bool = False
    steps: dict[int, int] = field(default_factory=dict)
    lenses: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    deleting: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)

    def hear(self, line: str) -> None:
        if not line.endswith("\n"):
            return  # killed while it spoke
        what, *numbers = line.split()
        values = [int(number) for number in numbers]
        if what == "open":
            self.opened = True
        elif what == "reply":
            self.steps[values[0]] = self.lenses[values[0]] = 0
        elif what == "steps":
            self.steps[values[0]], self.lenses[values[0]] = values[1:]
        elif what == "end":
            self.ended.add(values[0])
        elif what == "deleting":
            self.deleting.add(values[0])
        else:
            self.deleted.add(values[0])


def killed(file: Path, seed: int, moment: random.Random) -> Told:
    """Let a process write and kill it, at times before it has opened the store."""
    process = subprocess.Popen(
        [sys.executable, str(VICTIM), str(file), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    told = Told()
    assert process.stdout is not None
    with process.stdout as said:
        if moment.random() < 0.2:
            wait = moment.uniform(0.3, 1.5)
        else:
            told.hear(said.readline())
            wait = moment.uniform(0.0, 0.5)
        # Not waiting for something: the moment itself is what is tried.
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        for line in said:
            told.hear(line)
    assert process.wait() == -signal.SIGKILL
    return told


def assert_sound(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def assert_kept(reader: TraceReader, told: Told) -> int:
    """All that was acknowledged is there and whole; returns how many steps were compared."""
    compared = 0
    for message, steps in told.steps.items():
        try:
            seen = reader.message(message)
        except NotFound:
            assert message in told.deleting, "lost"
            continue
        assert message not in told.deleted, "deleted, and back again"
        found = list(reader.iter_steps(message))
        assert steps <= len(found) <= steps + 3, "what was told of, and at most one commit more"
        for step in found:
            written = victim.step_of(message, step.step_index)
            lens = written.lens if step.lens is not None else None
            assert_same(step, replace(written, lens=lens))
            assert lens is not None or step.step_index >= told.lenses[message]
            for tensor in written.tensors:
                read = reader.tensor(message, step.step_index, tensor.name)
                assert read.array.tobytes() == tensor.array.tobytes()
        compared += len(found)
        if message in told.ended:
            assert seen.status is Status.COMPLETE
        else:
            # It may have ended just before it could say so.
            assert seen.status in (Status.INTERRUPTED, Status.COMPLETE)
        assert seen.content == " the" * len(found)
    return compared


def assert_usable(file: Path, last: int | None) -> None:
    """Another process writes at once, and what was cut off ends as interrupted."""
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        cut = last is not None and reader.message(last).status is Status.INTERRUPTED
        marked = writer.mark_interrupted()
        # Or one that was asked for just before it could be told of.
        assert marked == [last] if cut else len(marked) <= 1
        assert writer.mark_interrupted() == []
        if cut and last is not None:
            assert "ended" in (reader.message(last).reason or "")
        conversation = (
            writer.create_conversation("x")
            if last is None
            else reader.message(last).conversation_id
        )
        message = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(message, builders.turn_start())
        writer.append(message, [victim.step_of(message, 0)])
        writer.finish_reply(message, TurnEnd(Status.COMPLETE, " the", "end of turn", 0.1))
        assert reader.message(message).tokens == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 11))]
)
def test_killed_at_random_moments(file: Path, seed: int) -> None:
    moment = random.Random(seed)
    steps = 0
    for number in range(KILLS):
        told = killed(file, 1000 * seed + number, moment)
        # The reader comes first: it has to find all of it without anyone's help.
        if told.opened:
            with TraceReader(file) as reader:
                steps += assert_kept(reader, told)
        if file.exists() and told.opened:
            assert_sound(file)
        # One that was deleted is not its last; one announced but not begun is.
        last = max(told.steps, default=None)
        assert_usable(file, last)
    assert_sound(file)
    with TraceReader(file) as reader:
        assert [str(finding) for finding in Verification(reader)] == []
    print(f"{KILLS} kills, {steps} steps compared, none lost")


def test_a_reply_of_a_living_process_is_left_alone(file: Path) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        conversation = writer.create_conversation("x")
        start = builders.turn_start()
        message = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(message, start)
        assert writer.mark_interrupted() == []
        assert reader.message(message).status is Status.RUNNING


def test_two_processes_do_not_generate_one_reply(file: Path) -> None:
    with TraceWriter(file) as writer:
        conversation = writer.create_conversation("x")
        message = writer.queue_reply(conversation, ModelChoice("m"), Sampling(), CapturePolicy())
        claim_and_wait = (
            "import sys; from oki_trace.store.writing.writer import TraceWriter\n"
            "with TraceWriter(sys.argv[1]) as writer: print(writer.claim_next_reply(), flush=True)"
            "\nsys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", claim_and_wait, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert int(other.stdout.readline()) == message
            with pytest.raises(StoreError, match="by another process"):
                writer.start_reply(message, builders.turn_start())
            other.communicate("")
        writer.start_reply(message, builders.turn_start())


def test_a_worker_that_ended_is_gone(file: Path) -> None:
    script = (
        "import sys; from oki_trace.store.writing.writer import TraceWriter\n"
        "with TraceWriter(sys.argv[1]) as writer: writer.set_worker_state('idle', model_id='m')"
    )
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, timeout=60)
    with TraceReader(file) as reader:
        worker = reader.worker()
    assert worker is not None and worker.state == "gone" and worker.model_id is None


def test_only_what_is_certain_is_called_dead() -> None:
    me = this_process()
    assert not is_dead(str(me))
    assert Owner.parse(str(me)) == me
    assert not is_dead(str(me._replace(host="another-host", pid=1)))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert is_dead(str(me._replace(pid=child.pid, start="")))
    assert not is_dead(str(me._replace(start=""))), "the start is not known everywhere"
    if me.start:
        assert is_dead(str(me._replace(start="1"))), "the number was given to another process"
