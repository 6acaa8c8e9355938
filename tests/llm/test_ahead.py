"""Decoding ahead: everything once and in order, bounded, and polite with the cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

import pytest
import torch

from oki_trace.llm.ahead import STEPS_AHEAD, Ahead, one_core

Asked = Callable[[], bool]


def numbers(count: int) -> Generator[int]:
    yield from range(count)


@pytest.mark.parametrize("count", [0, 1, STEPS_AHEAD, 5 * STEPS_AHEAD + 1])
def test_every_item_comes_once_and_in_order(count: int) -> None:
    ahead = Ahead(lambda _: numbers(count), (1, 1))
    assert list(ahead) == list(range(count))
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


def test_the_decoder_waits_when_nobody_takes_what_it_made() -> None:
    made = []
    full = threading.Event()

    def many(_: Asked) -> Generator[int]:
        for number in range(100):
            made.append(number)
            if number == STEPS_AHEAD:
                full.set()
            yield number

    ahead = Ahead(many, (1, 1))
    assert full.wait(10)
    # One more than fits may be made, and then waits to be put in.
    assert len(made) == STEPS_AHEAD + 1
    assert list(ahead) == list(range(100))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_generator_in_its_own_thread(taken: int) -> None:
    ended: list[str] = []

    def endless(_: Asked) -> Generator[int]:
        try:
            yield from iter(int, 1)
        finally:
            ended.append(threading.current_thread().name)

    ahead = Ahead(endless, (1, 1))
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert ended == ["decoder"]
    ahead.close()
    assert list(ahead) == []
    assert not any(thread.name == "decoder" for thread in threading.enumerate())


def test_the_generator_is_told_that_nobody_waits_any_more() -> None:
    begun = threading.Event()

    def long(abandoned: Asked) -> Generator[int]:
        begun.set()
        while not abandoned():
            threading.Event().wait(0.001)
        raise RuntimeError("nobody sees this")
        yield

    ahead = Ahead(long, (1, 1))
    assert begun.wait(10)
    ahead.close()
    assert list(ahead) == []


def test_a_fault_is_raised_after_the_items_before_it() -> None:
    def broken(_: Asked) -> Generator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("a fault")

    ahead = Ahead(broken, (1, 1))
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="a fault"):
        next(ahead)
    assert list(ahead) == []
    ahead.close()


def test_the_prompt_may_use_every_core_and_the_steps_all_but_one() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def counting(_: Asked) -> Generator[int]:
        for number in range(3):
            seen.append(torch.get_num_threads())
            yield number

    torch.set_num_threads(2)
    try:
        with one_core() as cores:
            assert (cores, torch.get_num_threads()) == (2, 1)
            assert list(Ahead(counting, (cores, cores - 1))) == [0, 1, 2]
        assert seen == [2, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
