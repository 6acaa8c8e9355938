"""The decoder thread yields every item once and in order, within bounds, on its own cores."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pytest
import torch

from oki_trace.llm.decoding.decoder_thread import STEPS_AHEAD, iterate_in_thread


@pytest.fixture(autouse=True)
def _two_cores() -> Iterator[None]:
    before, others = torch.get_num_threads(), set(threading.enumerate())
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the number of threads is put back"
    torch.set_num_threads(before)
    # A reply that another test has not taken to its end may still wait in a thread of its own.
    new = set(threading.enumerate()) - others
    assert not any(thread.name == "decoder" for thread in new)


def numbers(count: int) -> Generator[int]:
    yield from range(count)


@pytest.mark.parametrize("count", [0, 1, 2, STEPS_AHEAD, 5 * STEPS_AHEAD + 1])
def test_every_item_comes_once_and_in_order(count: int) -> None:
    with iterate_in_thread(numbers(count)) as items:
        assert list(items) == list(range(count))
        assert list(items) == []


def test_the_decoder_waits_when_nobody_takes_what_it_made() -> None:
    made = []
    full = threading.Event()

    def many() -> Generator[int]:
        for number in range(100):
            made.append(number)
            if number == STEPS_AHEAD + 1:
                full.set()
            yield number

    with iterate_in_thread(many()) as items:
        assert full.wait(10)
        # The first, those in the queue, and one that waits for a free slot.
        assert len(made) == 1 + STEPS_AHEAD + 1
        assert list(items) == list(range(100))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_what_is_not_taken_is_dropped_and_the_generator_ends(taken: int) -> None:
    ended = threading.Event()

    def endless() -> Generator[int]:
        try:
            yield from iter(int, 1)
        finally:
            ended.set()

    with iterate_in_thread(endless()) as items:
        for _ in range(taken):
            next(items)
    assert ended.is_set()


def test_a_fault_is_raised_after_the_items_before_it() -> None:
    def broken() -> Generator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("a fault")

    with iterate_in_thread(broken()) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(ZeroDivisionError, match="a fault"):
            next(items)
        assert list(items) == []


def test_a_fault_in_the_prompt_is_raised_at_once() -> None:
    def broken() -> Generator[int]:
        raise ZeroDivisionError("a fault")
        yield

    with pytest.raises(ZeroDivisionError, match="a fault"), iterate_in_thread(broken()):
        pytest.fail("there is nothing to iterate over")


def test_the_prompt_is_for_every_core_and_its_callers_thread_the_steps_for_all_but_one() -> None:
    seen: list[tuple[str, int]] = []

    def counting() -> Generator[int]:
        for number in range(3):
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            yield number

    with iterate_in_thread(counting()) as items:
        assert torch.get_num_threads() == 1
        assert list(items) == [0, 1, 2]
    here = threading.current_thread().name
    assert seen == [(here, 2), ("decoder", 1), ("decoder", 1)]
