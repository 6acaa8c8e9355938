"""The lens behind the decoder: complete, in order, bounded, and polite with the cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from oki_trace.llm import trailing
from oki_trace.llm.trailing import AT_MOST, BATCH, TOGETHER, TrailingLens


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the number of threads is put back"
    torch.set_num_threads(before)


def numbers(first: int, count: int) -> list[Any]:
    return list(range(first, first + count))


@pytest.mark.parametrize("aside", [True, False])
@pytest.mark.parametrize("steps", [0, 1, BATCH - 1, BATCH, 3 * BATCH + 5])
def test_every_lens_comes_once_and_in_order(aside: bool, steps: int) -> None:
    sizes: list[int] = []

    def compute(batch: list[Any]) -> list[Any]:
        sizes.append(len(batch))
        return batch

    found: list[Any] = []
    with TrailingLens(compute, aside=aside) as lens:
        for step in numbers(0, steps):
            lens.add(step)
            found += lens.ready()
        found += lens.rest()
    assert found == numbers(0, steps)
    assert max(sizes, default=0) <= TOGETHER


def test_a_core_is_lent_while_a_batch_is_computed_and_no_longer() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def compute(batch: list[Any]) -> list[Any]:
        begun.set()
        assert torch.get_num_threads() == 1
        assert go_on.wait(10)
        return batch

    with TrailingLens(compute, aside=True) as lens:
        for step in numbers(0, BATCH):
            assert lens.decoder_has_all_cores
            assert torch.get_num_threads() == 2
            lens.add(step)
            assert lens.ready() == []
        assert begun.wait(10)
        assert not lens.decoder_has_all_cores
        assert torch.get_num_threads() == 1
        go_on.set()
        assert list(lens.rest()) == numbers(0, BATCH)
        assert torch.get_num_threads() == 2


def test_where_cores_are_many_one_stays_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trailing, "MANY_CORES", 2)
    with TrailingLens(lambda batch: batch, aside=True) as lens:  # type: ignore[arg-type,return-value]
        found: list[Any] = []
        for step in numbers(0, 2 * BATCH):
            lens.add(step)
            found += lens.ready()
        assert not lens.decoder_has_all_cores
        assert torch.get_num_threads() == 1
        found += lens.rest()
    assert found == numbers(0, 2 * BATCH)


def test_a_lens_slower_than_the_decoder_makes_it_wait() -> None:
    """Steps hold their tensors: not more than a bounded number of them."""
    most, go_on = AT_MOST + BATCH, threading.Event()

    def compute(batch: list[Any]) -> list[Any]:
        assert go_on.wait(10)
        return batch

    with TrailingLens(compute, aside=True) as lens:
        given = 0
        for step in numbers(0, most - 1):
            lens.add(step)
            given += len(lens.ready())
        assert given == 0
        go_on.set()
        lens.add(most - 1)
        assert lens.ready() == numbers(0, BATCH)
        assert len(list(lens.rest())) == most - BATCH


def test_a_fault_of_the_lens_is_raised_where_the_steps_are_taken() -> None:
    def compute(batch: list[Any]) -> list[Any]:
        raise ZeroDivisionError("a fault")

    with (
        pytest.raises(ZeroDivisionError, match="a fault"),
        TrailingLens(compute, aside=True) as lens,
    ):
        for step in numbers(0, BATCH):
            lens.add(step)
            lens.ready()
        list(lens.rest())
