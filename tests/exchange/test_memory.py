"""A reply of any length is written and read in the same memory: measured, on ten thousand steps.

``python -m pytest -m stress -s tests/exchange`` prints the figures. What Python
itself holds is watched in every run, on 400 steps, in ``test_formats.py``.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.writer import TraceWriter
from tests import builders

SHORT, LONG = 100, 10_000
VOCABULARY = 32_000  # 64 kB of logits a step, in 16 bits

_MEASURED = r"""
import re, sys
from pathlib import Path
from oki_trace.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended
# Not getrusage: what it tells begins with the size of the process that started this one.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def fill(db: Path, steps: int) -> Path:
    """A store with one reply of so many steps, each with a lens and full tensors."""
    rng = np.random.default_rng(0)
    pool = [
        builders.step(0, rng, layers=6, width=256, vocab=VOCABULARY, with_lens=True)
        for _ in range(20)
    ]
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("long")
        writer.add_message(conversation, ChatMessage(Role.USER, "Go on."))
        reply = writer.queue_reply(
            conversation, ModelChoice("m"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start("half", layers=6))
        for start in range(0, steps, 50):
            batch = []
            for index in range(start, start + 50):
                one = pool[index % len(pool)]
                assert one.lens is not None
                lens = replace(one.lens, step_index=index)
                # Tensors of its own, or they would be packed away to nothing.
                full = builders.tensors(rng, layers=6, width=256, vocab=VOCABULARY)
                placed = replace(one, step_index=index, position=6 + index, lens=lens)
                batch.append(replace(placed, tensors=full))
            writer.append(reply, batch)
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "token limit", 1.0))
    return db


def peak_bytes(*arguments: object) -> int:
    """The most memory that a command held at once, of all kinds, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_ten_thousand_steps_take_the_memory_of_a_hundred(tmp_path: Path) -> None:
    stores = {steps: fill(tmp_path / f"{steps}.db", steps) for steps in (SHORT, LONG)}
    for format, more in (
        ("json", ["--tensors"]),
        ("jsonl", ["--tensors"]),
        ("parquet", []),
        ("trace-v1", []),
    ):
        peaks = {}
        for steps, db in stores.items():
            target = tmp_path / f"{steps}.{format}"
            command = ["export", "-c", 1, "--format", format, *more, "-o", target, "--db", db]
            peaks[f"export of {steps}"] = peak_bytes(*command)
            if format != "trace-v1":
                into = tmp_path / f"{steps}-{format}.db"
                peaks[f"import of {steps}"] = peak_bytes("import", target, "--db", into)
                into.unlink()
        print(format, {name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()})
        for verb in ("export", "import"):
            if format != "trace-v1" or verb == "export":
                short, long = (peaks[f"{verb} of {steps}"] for steps in (SHORT, LONG))
                # Parquet holds 32 MB of tensors at a time, twice while it packs them.
                assert long < short + 200_000_000, f"{verb} of {format}"
