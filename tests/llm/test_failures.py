"""Exceptions in one line, and those that mean out of memory."""

from __future__ import annotations

import errno

import pytest
import torch

from oki_trace.llm.failures import first_line, is_out_of_memory, summary


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(""), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 GB"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (OSError(errno.ENOMEM, "mmap"), True),
        (OSError("The paging file is too small for this operation to complete."), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not match"), False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_out_of_memory_is_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_exception_in_one_line() -> None:
    error = ValueError("\n  the first line  \nthe second")
    assert first_line(error) == "the first line"
    assert first_line(error, 3) == "the"
    assert summary(error) == "ValueError: the first line"
    assert first_line(ValueError()) == summary(ValueError()) == "ValueError"
