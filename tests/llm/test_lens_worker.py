"""The lens behind the decoder: complete, in order, bounded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from oki_trace.llm.capture.lens_worker import BATCH_STEPS, MAX_WAITING, LensWorker


def numbers(first: int, count: int) -> list[Any]:
    return list(range(first, first + count))


@pytest.mark.parametrize("in_thread", [True, False])
@pytest.mark.parametrize("steps", [0, 1, BATCH_STEPS - 1, BATCH_STEPS, 3 * MAX_WAITING + 1])
def test_every_lens_comes_once_and_in_order(in_thread: bool, steps: int) -> None:
    sizes: list[int] = []

    def compute(batch: list[Any]) -> list[Any]:
        sizes.append(len(batch))
        return batch

    found: list[Any] = []
    with LensWorker(compute, in_thread=in_thread) as lens_worker:
        for step in numbers(0, steps):
            lens_worker.add(step)
            found += lens_worker.poll()
        found += lens_worker.drain()
    assert found == numbers(0, steps)
    assert max(sizes, default=0) <= BATCH_STEPS


def test_it_takes_one_core_and_nobody_waits_for_it() -> None:
    go_on = threading.Event()
    seen: list[tuple[str, int]] = []

    def compute(batch: list[Any]) -> list[Any]:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        assert go_on.wait(10)
        return batch

    with LensWorker(compute, in_thread=True) as lens_worker:
        for step in numbers(0, 2 * BATCH_STEPS):
            lens_worker.add(step)
            assert lens_worker.poll() == []
        go_on.set()
        assert list(lens_worker.drain()) == numbers(0, 2 * BATCH_STEPS)
    assert seen[0] == ("lens_0", 1)


def test_a_lens_slower_than_the_decoder_makes_it_wait() -> None:
    """Steps keep their tensors in memory, so their number is bounded."""
    most, go_on = MAX_WAITING + BATCH_STEPS, threading.Event()

    def compute(batch: list[Any]) -> list[Any]:
        assert go_on.wait(10)
        return batch

    with LensWorker(compute, in_thread=True) as lens_worker:
        given = 0
        for step in numbers(0, most - 1):
            lens_worker.add(step)
            given += len(lens_worker.poll())
        assert given == 0
        go_on.set()
        lens_worker.add(most - 1)
        assert lens_worker.poll() == numbers(0, BATCH_STEPS)
        assert len(list(lens_worker.drain())) == most - BATCH_STEPS


@pytest.mark.parametrize("in_thread", [True, False])
def test_a_fault_of_the_lens_is_raised_where_the_steps_are_taken(in_thread: bool) -> None:
    def compute(batch: list[Any]) -> list[Any]:
        raise ZeroDivisionError("a fault")

    with (
        pytest.raises(ZeroDivisionError, match="a fault"),
        LensWorker(compute, in_thread=in_thread) as lens_worker,
    ):
        for step in numbers(0, BATCH_STEPS):
            lens_worker.add(step)
            lens_worker.poll()
        list(lens_worker.drain())
