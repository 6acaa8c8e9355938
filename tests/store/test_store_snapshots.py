"""What a reader sees while a writer writes, on every engine."""

from __future__ import annotations

import threading

import numpy as np

from oki_trace.store.reading.reader import TraceReader
from tests import builders
from tests.store.stores import Store


def test_a_step_is_never_seen_without_its_children(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    steps = [builders.step(i, rng, with_lens=True) for i in range(60)]
    done = threading.Event()
    faults: list[str] = []

    def look() -> None:
        with TraceReader(store.db) as reader:
            last = False
            while not last:
                last = done.is_set()
                for step in reader.iter_steps(message):
                    if not (len(step.topk.tokens) == 10 and len(step.attention) == 3):
                        faults.append(f"step {step.step_index} is incomplete")
                    if step.lens is None or len(step.lens.tokens) != 4:
                        faults.append(f"step {step.step_index} has half a lens")

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in steps:
        store.writer.append(message, [step])
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(store.reader.steps(message)) == 60


def test_all_that_a_snapshot_reads_is_of_one_instant(
    store: Store, rng: np.random.Generator
) -> None:
    _, message = store.reply()
    store.writer.append(message, [builders.step(0, rng)])
    with store.reader.snapshot() as page:
        before = page.version()
        store.writer.append(message, [builders.step(1, rng)])
        assert page.version() == before
        assert len(page.steps(message)) == 1
    assert len(store.reader.steps(message)) == 2
