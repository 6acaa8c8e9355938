"""The queue between decoding and the store: nothing dropped, nothing swallowed."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from oki_trace.errors import StoreError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

DONE = TurnEnd(Status.COMPLETE, "said", "end of sequence", 0.5)


def asked(writer: TraceWriter) -> int:
    conversation = writer.create_conversation("x")
    return writer.queue_reply(
        conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
    )


def test_everything_handed_over_is_written(file: Path, rng: np.random.Generator) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = asked(writer)
        recorder = Recorder(writer, message, maxsize=2)
        recorder.start(builders.turn_start())
        for index in range(40):
            recorder.step(builders.step(index, rng))
            if index >= 3:
                recorder.lens(builders.lens(index - 3, rng))
        recorder.end(DONE)
        steps = list(reader.iter_steps(message))
        assert [step.step_index for step in steps] == list(range(40))
        assert [step.lens is not None for step in steps] == [True] * 37 + [False] * 3
        assert reader.message(message).status is Status.COMPLETE


def test_a_full_queue_makes_the_caller_wait(file: Path, rng: np.random.Generator) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = asked(writer)
        recorder = Recorder(writer, message, maxsize=1)
        recorder.start(builders.turn_start())
        handed_over: list[int] = []

        def decode() -> None:
            for index in range(8):
                recorder.step(builders.step(index, rng))
                handed_over.append(index)

        decoding = threading.Thread(target=decode)
        # While another holds the one connection, the recorder cannot write.
        with writer._transaction():
            decoding.start()
            decoding.join(timeout=0.3)
            assert decoding.is_alive() and len(handed_over) < 8
        decoding.join()
        recorder.end(DONE)
        assert len(reader.steps(message)) == 8


def test_a_stop_is_known_without_asking_the_store(file: Path, rng: np.random.Generator) -> None:
    with TraceWriter(file) as writer:
        message = asked(writer)
        recorder = Recorder(writer, message)
        recorder.start(builders.turn_start())
        assert recorder.stop_requested is False
        writer.request_stop(message)
        recorder.step(builders.step(0, rng))
        recorder.end(dataclasses.replace(DONE, status=Status.STOPPED))
        assert recorder.stop_requested is True


def test_a_failure_is_raised_at_the_next_call(file: Path, rng: np.random.Generator) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = asked(writer)
        recorder = Recorder(writer, message, maxsize=1)
        recorder.start(builders.turn_start())
        recorder.step(builders.step(0, rng))
        gap = builders.step(5, rng)
        with pytest.raises(StoreError, match="out of order"):
            for _ in range(100):
                recorder.step(gap)
        recorder.end(dataclasses.replace(DONE, status=Status.FAILED))
        ended = reader.message(message)
        assert ended.status is Status.FAILED and "out of order" in (ended.reason or "")
        assert len(reader.steps(message)) == 1


def test_a_failure_nobody_has_heard_of_is_raised_at_the_end(
    file: Path, rng: np.random.Generator
) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = asked(writer)
        recorder = Recorder(writer, message)
        recorder.start(builders.turn_start())
        broken = dataclasses.replace(builders.step(0, rng), token_bytes="not bytes")  # type: ignore[arg-type]
        recorder.step(broken)
        with pytest.raises(StoreError):
            recorder.end(DONE)
        assert reader.message(message).status is Status.FAILED
        with pytest.raises(StoreError, match="between start and end"):
            Recorder(writer, message).step(builders.step(0, rng))


def test_no_thread_is_left(file: Path) -> None:
    before = threading.active_count()
    with TraceWriter(file) as writer:
        recorder = Recorder(writer, asked(writer))
        recorder.start(builders.turn_start())
        recorder.end(DONE)
        assert threading.active_count() == before
