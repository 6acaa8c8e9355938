"""Makes the golden store of the newest revision: ``python -m tests.store.golden.build``.

It is written as any store is, and kept packed beside this file, under the name of
its revision. One that was released is never built again: it stands for the
stores that people have.
"""

from __future__ import annotations

import datetime as dt
import gzip
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Forced,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TensorMode,
    TurnEnd,
)
from oki_trace.store.maintenance.vacuum import vacuum
from oki_trace.store.schema import migrate
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

FOLDER = Path(__file__).resolve().parent
MODES: tuple[TensorMode, ...] = ("exact", "half", "compact", "none")
STEPS = 3
WHEN = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


def fill(path: Path) -> None:
    """A conversation with a reply in each tensor mode, one cut short, a branch; an empty one.

    The branch has a step that is read by several lenses, of a model with experts.
    """
    rng = np.random.default_rng(11)
    with TraceWriter(path) as writer:
        conversation = writer.create_conversation("What is gold? 🙂", created_at=WHEN)
        for mode in MODES:
            writer.add_message(conversation, ChatMessage(Role.USER, f"and {mode}?"))
            reply = writer.queue_reply(
                conversation,
                ModelChoice("tiny/model"),
                Sampling(max_new_tokens=STEPS, temperature=0.7, seed=3),
                CapturePolicy(tensors=mode),
                claim=True,
            )
            writer.start_reply(reply, builders.turn_start(mode))
            writer.append(reply, [builders.coherent_step(i, rng) for i in range(STEPS)])
            status = Status.STOPPED if mode == "none" else Status.COMPLETE
            writer.finish_reply(reply, TurnEnd(status, " the" * STEPS, "token limit", 0.5))
        branch = writer.queue_reply(
            conversation,
            ModelChoice("tiny/model"),
            Sampling(max_new_tokens=STEPS),
            CapturePolicy(tensors="none"),
            claim=True,
            parent_id=reply - 1,
            branch_of=reply,
            branch_step=2,
            forced=Forced((7,)),
        )
        writer.start_reply(branch, replace(builders.turn_start("none"), prefix_len=2))
        forced = replace(builders.coherent_step(0, rng), origin="forced")
        sampled = builders.read_by(builders.coherent_step(1, rng), rng)
        writer.append(branch, [forced, sampled])
        writer.finish_reply(branch, TurnEnd(Status.COMPLETE, " the" * 4, "token limit", 0.5))
        writer.create_conversation("empty", created_at=WHEN)
        writer.set_worker_state("idle", model_id="tiny/model")
    vacuum(path)


def golden(revision: str) -> Path:
    return FOLDER / f"{revision}.db.gz"


def unpack(revision: str, path: Path) -> None:
    """Put the golden store of this revision at ``path``."""
    path.write_bytes(gzip.decompress(golden(revision).read_bytes()))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.db"
        fill(path)
        packed = gzip.compress(path.read_bytes(), 9, mtime=0)
    golden(migrate.head()).write_bytes(packed)
    print(f"{golden(migrate.head())}: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
