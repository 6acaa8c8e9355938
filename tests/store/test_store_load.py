"""A writer at full speed and eight reading processes: nobody is blocked, nothing is missed.

How fast it is stands in ``tests/benchmarks/store_load.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from oki_trace.records import Status, TurnEnd
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from tests.store import crowd

READERS = 8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.stress)])
def test_eight_readers_see_every_step_whole(file: Path, count: int) -> None:
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = crowd.begin(writer)
        made = crowd.steps(count)
        # A reader that meets a lock says so among what is wrong; a writer raises.
        with crowd.readers(READERS, str(file), message, count, 0.01) as looking:
            for step in made:
                writer.append(message, [step])
            seen = [crowd.told(process) for process in looking]
        assert [one.wrong for one in seen] == [[]] * READERS
        assert all(one.whole and sorted(one.at) == list(range(count)) for one in seen)
        assert [step.step_index for step in reader.steps(message)] == list(range(count))


def test_a_full_queue_drops_nothing_under_the_eyes_of_readers(file: Path) -> None:
    """Steps handed over faster than they can be written, as by a model that is faster."""
    count = 40
    with TraceWriter(file) as writer, TraceReader(file) as reader:
        message = crowd.begin(writer, start=False)
        recorder = Recorder(writer, message, maxsize=4)
        recorder.start(crowd.START)
        with crowd.readers(2, str(file), message, count, 0.0) as looking:
            for step in crowd.steps(count):
                recorder.step(step)
            recorder.end(TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0))
            assert [crowd.told(process).wrong for process in looking] == [[], []]
        assert reader.message(message).tokens == count
