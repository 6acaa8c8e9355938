"""A process killed at any moment loses at most the step in flight."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import builders
import pytest

from oki_trace.errors import StoreError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status
from oki_trace.store.owner import Owner, is_dead, this_process
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter

WRITE_FOREVER = """
import sys
import numpy as np
import builders
from oki_trace.records import CapturePolicy, ModelChoice, Sampling
from oki_trace.store.writer import TraceWriter

rng = np.random.default_rng(0)
with TraceWriter(sys.argv[1]) as writer:
    conversation = writer.create_conversation("x")
    choice = ModelChoice("m")
    message = writer.queue_reply(conversation, choice, Sampling(), CapturePolicy(), claim=True)
    writer.start_reply(message, builders.turn_start())
    for index in range(1_000_000):
        writer.append(message, [builders.step(index, rng, with_lens=True, vocab=5000)])
        print(message, index, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_while_writing(file: Path, seed: int) -> None:
    steps = random.Random(seed).randint(1, 60)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    told = -1
    message = 0
    for line in process.stdout:
        message, told = map(int, line.split())
        if told >= steps:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split("\n")
    complete = [line for line in rest if line.count(" ") == 1]
    if complete:
        told = max(told, int(complete[-1].split()[1]))
    process.stdout.close()
    process.wait()

    with TraceReader(file) as reader:
        found = list(reader.iter_steps(message))
        assert len(found) in (told + 1, told + 2), "all that was told of, and at most one more"
        for step in found:
            assert len(step.topk.tokens) == 10 and step.lens is not None
            for name in reader.tensor_names(message, step.step_index):
                reader.tensor(message, step.step_index, name)
        seen = reader.message(message)
        assert seen.status is Status.INTERRUPTED
        assert seen.content == " the" * len(found)
        assert reader.conversations()[0].status is Status.INTERRUPTED
        with TraceWriter(file) as writer:
            assert writer.mark_interrupted() == [message]
            assert writer.mark_interrupted() == []
        assert reader.message(message).content == seen.content
        assert "ended" in (reader.message(message).reason or "")
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


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
            "import sys; from oki_trace.store.writer import TraceWriter\n"
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
        "import sys; from oki_trace.store.writer import TraceWriter\n"
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
