"""One writer at full speed and many readers that poll: what each of them sees, and when.

Readers are processes: ``python crowd.py STORE MESSAGE STEPS PAUSE NICE WHOLE`` polls
the version number, reads the new steps at every change, with WHOLE the newest of
them with its children, and prints what it found wrong and when it saw each step.
All clocks are one: the machine's monotonic clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from oki_trace.errors import OkiTraceError
from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Step
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

LAYERS = 30
PROMPT = 100
START = builders.turn_start("half", PROMPT, LAYERS)
TENSORS = ["attentions", "hidden_states", "logits"]


def steps(count: int) -> list[Step]:
    """Steps as large as those of SmolLM2; a few are made, and come again and again."""
    rng = np.random.default_rng(3)
    made = [
        builders.step(
            index,
            rng,
            prompt_len=PROMPT,
            layers=LAYERS,
            heads=9,
            width=576,
            vocab=49_152,
            topk_attention=10,
            with_lens=True,
        )
        for index in range(16)
    ]
    turned = [(index, made[index % len(made)]) for index in range(count)]
    return [
        replace(
            step,
            step_index=index,
            position=PROMPT + index,
            lens=step.lens and replace(step.lens, step_index=index),
        )
        for index, step in turned
    ]


def begin(writer: TraceWriter, *, start: bool = True) -> int:
    """A reply that takes steps, once it was started; returns its id."""
    message = writer.queue_reply(
        writer.create_conversation("x"),
        ModelChoice("m"),
        Sampling(),
        CapturePolicy(tensors="half"),
        claim=True,
    )
    if start:
        writer.start_reply(message, START)
    return message


def faults(step: Step, names: list[str]) -> Iterator[str]:
    """What the step lacks of what belongs to it."""
    if len(step.topk.tokens) != 10:
        yield f"step {step.step_index}: {len(step.topk.tokens)} candidates"
    if [len(layer.positions) for layer in step.attention] != [10] * LAYERS:
        yield f"step {step.step_index}: attention of {len(step.attention)} layers"
    if step.lens is None or step.lens.token_ids.shape != (LAYERS + 1, 5):
        yield f"step {step.step_index}: no whole lens"
    if names != TENSORS:
        yield f"step {step.step_index}: tensors {names}"


@dataclass
class Seen:
    """What one reader saw: when each step was first there, and what was wrong."""

    at: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    whole: int = 0
    polls: int = 0


def watch(db: str, message: int, count: int, pause: float, *, whole: bool) -> Seen:
    """Look until all ``count`` steps were seen."""
    found = Seen()
    version = -1
    with TraceReader(db) as reader:
        print("ready", flush=True)
        while len(found.at) < count:
            found.polls += 1
            now = reader.version()
            if now == version:
                time.sleep(pause)
                continue
            with reader.snapshot() as page:
                version = page.version()
                new = page.steps(message, since=len(found.at) - 1)
                seen_at = time.monotonic_ns()
                if new and whole:
                    index = new[-1].step_index
                    step = page.step(message, index)
                    names = page.tensor_names(message, index)
                    found.wrong += faults(step, names)
                    found.whole += 1
            expected = range(len(found.at), len(found.at) + len(new))
            if [step.step_index for step in new] != list(expected):
                found.wrong.append(f"a gap after step {len(found.at) - 1}")
            found.at |= {step.step_index: seen_at for step in new}
            time.sleep(pause)
    return found


@contextmanager
def readers(
    count: int,
    db: str,
    message: int,
    of: int,
    pause: float,
    *,
    nice: int = 0,
    whole: bool = True,
) -> Iterator[list[subprocess.Popen[str]]]:
    """So many reader processes, all of them looking already; ``nice`` yields the processor."""
    command = [sys.executable, __file__, db]
    command += [str(value) for value in (message, of, pause, nice, int(whole))]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(count)
    ]
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()
            if one.stdout is not None:
                one.stdout.close()


def told(process: subprocess.Popen[str]) -> Seen:
    """What a reader saw, once it has seen all."""
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    return Seen({int(k): v for k, v in said["at"].items()}, *said["rest"])


def main() -> None:
    db, message, count, pause, nice, whole = sys.argv[1:]
    if int(nice):
        os.nice(int(nice))
    try:
        seen = watch(db, int(message), int(count), float(pause), whole=bool(int(whole)))
    except OkiTraceError as error:
        seen = Seen(wrong=[str(error)])
    print(json.dumps({"at": seen.at, "rest": [seen.wrong, seen.whole, seen.polls]}), flush=True)


if __name__ == "__main__":
    main()
