"""The lens behind the decoder: complete, in order, bounded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from oki_trace.llm.capture.lens_worker import AT_MOST, TOGETHER, LensWorker


def numbers(first: int, count: int) -> list[Any]:
    return list(range(first, first + count))


@pytest.mark.parametrize("aside", [True, False])
@pytest.mark.parametrize("steps", [0, 1, TOGETHER - 1, TOGETHER, 3 * AT_MOST + 1])
def test_every_lens_comes_once_and_in_order(aside: bool, steps: int) -> None:
    sizes: list[int] = []

    def compute(batch: list[Any]) -> list[Any]:
        sizes.append(len(batch))
        return batch

    found: list[Any] = []
    with LensWorker(compute, aside=aside) as lens_worker:
        for step in numbers(0, steps):
            lens_worker.add(step)
            found += lens_worker.ready()
        found += lens_worker.rest()
    assert found == numbers(0, steps)
    assert max(sizes, default=0) <= TOGETHER


def test_it_takes_one_core_and_nobody_waits_for_it() -> None:
    go_on = threading.Event()
    seen: list[tuple[str, int]] = []

    def compute(batch: list[Any]) -> list[Any]:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        assert go_on.wait(10)
        return batch

    with LensWorker(compute, aside=True) as lens_worker:
        for step in numbers(0, 2 * TOGETHER):
            lens_worker.add(step)
            assert lens_worker.ready() == []
        go_on.set()
        assert list(lens_worker.rest()) == numbers(0, 2 * TOGETHER)
    assert seen[0] == ("lens_0", 1)


def test_a_lens_slower_than_the_decoder_makes_it_wait() -> None:
    """Steps hold their tensors: not more than a bounded number of them."""
    most, go_on = AT_MOST + TOGETHER, threading.Event()

    def compute(batch: list[Any]) -> list[Any]:
        assert go_on.wait(10)
        return batch

    with LensWorker(compute, aside=True) as lens_worker:
        given = 0
        for step in numbers(0, most - 1):
            lens_worker.add(step)
            given += len(lens_worker.ready())
        assert given == 0
        go_on.set()
        lens_worker.add(most - 1)
        assert lens_worker.ready() == numbers(0, TOGETHER)
        assert len(list(lens_worker.rest())) == most - TOGETHER


@pytest.mark.parametrize("aside", [True, False])
def test_a_fault_of_the_lens_is_raised_where_the_steps_are_taken(aside: bool) -> None:
    def compute(batch: list[Any]) -> list[Any]:
        raise ZeroDivisionError("a fault")

    with (
        pytest.raises(ZeroDivisionError, match="a fault"),
        LensWorker(compute, aside=aside) as lens_worker,
    ):
        for step in numbers(0, TOGETHER):
            lens_worker.add(step)
            lens_worker.ready()
        list(lens_worker.rest())
