"""A reply of any length is written and read in constant memory.

The memory of Python objects is checked in every run, on short replies; that of
the whole process is measured by ``python -m pytest -m stress -s tests/exchange``, on
a hundred, a thousand and ten thousand steps.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.exchange.inline import import_inline as import_path

STEPS = (100, 1_000, 10_000)
VOCABULARY = 32_000  # 64 kB of logits a step, in 16 bits

_MEASURED = r"""
import re, sys
from pathlib import Path
from oki_trace.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended
# Not getrusage: its peak includes the size of the parent before exec.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def fill(db: Path, steps: int, *, small: bool = False) -> Path:
    """A store with one reply of so many steps, each with a lens and full tensors.

    ``small``: with tensors of some numbers and next to no rows.
    """
    layers, width, vocab = (1, 8, 20) if small else (6, 256, VOCABULARY)
    rng = np.random.default_rng(0)
    pool = [
        builders.step(
            0, rng, layers=layers, width=width, vocab=vocab, topk=2 if small else 10, with_lens=True
        )
        for _ in range(20)
    ]
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("long")
        writer.add_message(conversation, ChatMessage(Role.USER, "Go on."))
        reply = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start("half", layers=layers))
        for start in range(0, steps, 50):
            batch = []
            for index in range(start, start + 50):
                one = pool[index % len(pool)]
                assert one.lens is not None
                lens = replace(one.lens, step_index=index)
                # Tensors of its own, or they would be packed away to nothing.
                full = builders.tensors(rng, layers=layers, width=width, vocab=vocab)
                placed = replace(one, step_index=index, position=6 + index, lens=lens)
                batch.append(replace(placed, tensors=full))
            writer.append(reply, batch)
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "token limit", 1.0))
    return db


def peak_bytes(*arguments: object) -> int:
    """The peak memory of a command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def held(work: Callable[[], object]) -> int:
    """The peak of Python's memory above that at the start."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stores with a reply of 100 steps and of 800."""
    folder = tmp_path_factory.mktemp("replies")
    return tuple(fill(folder / f"{n}.db", n, small=True) for n in (100, 800))


@pytest.mark.parametrize(
    ("format", "most"), [(Format.JSON, 2_000_000), (Format.PARQUET, 4_000_000)]
)
def test_eight_times_the_steps_are_held_in_the_same_memory(
    format: Format, most: int, replies: tuple[Path, Path], tmp_path: Path
) -> None:
    """``most``, in bytes: what a batch may hold that the shorter reply does not fill."""
    with_tensors = format is not Format.PARQUET  # which always has them
    out, back = [], []
    for place, db in enumerate((replies[0], *replies)):  # the first one warms up
        target, into = tmp_path / f"{place}.{format}", tmp_path / f"{place}.db"
        with TraceReader(db) as reader:
            write = partial(export, reader, 1, format, target, sys.stdout, tensors=with_tensors)
            out.append(held(write))
        back.append(held(partial(import_path, target, into)))
    assert out[2] < out[1] + most, out
    assert back[2] < back[1] + most, back


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_ten_thousand_steps_take_the_memory_of_a_thousand(tmp_path: Path) -> None:
    stores = {steps: fill(tmp_path / f"{steps}.db", steps) for steps in STEPS}
    for format, more in (
        ("json", ["--tensors"]),
        ("jsonl", ["--tensors"]),
        ("parquet", []),
        ("trace-v1", []),
    ):
        peaks: dict[tuple[str, int], int] = {}
        for steps, db in stores.items():
            target = tmp_path / f"{steps}.{format}"
            command = ["export", "-c", 1, "--format", format, *more, "-o", target, "--db", db]
            peaks["export", steps] = peak_bytes(*command)
            if format != "trace-v1":
                into = tmp_path / f"{steps}-{format}.db"
                peaks["import", steps] = peak_bytes("import", target, "--db", into)
                into.unlink()
        print(format, *(f"{verb} of {n}: {peak / 1e6:.0f} MB" for (verb, n), peak in peaks.items()))
        for (verb, steps), peak in peaks.items():
            # From a hundred to a thousand SQLite's own caches fill: 16 MB to read, 32 to write.
            assert steps == STEPS[0] or peak < peaks[verb, STEPS[0]] + 60_000_000, (format, verb)
            assert steps != STEPS[2] or peak < peaks[verb, STEPS[1]] + 25_000_000, (format, verb)
