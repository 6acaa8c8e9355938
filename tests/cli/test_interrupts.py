"""Ctrl-C, SIGTERM and a closed pipe: decoded steps are kept, and no traceback is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from oki_trace.errors import StoreError
from oki_trace.records import Message, Role, Status
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from tests.cli.commands import ROOT, command
from tests.cli.conftest import Demo
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pipes are POSIX here")

Process = subprocess.Popen[str]

STEPS = 5


@contextmanager
def running(*arguments: object, stdout: int | IO[str] = subprocess.PIPE) -> Iterator[Process]:
    """The command as a process of its own; it is gone afterwards, whatever happens."""
    process = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def under_way(process: Process, reply: int = 0) -> Callable[[], Message | None]:
    """The conversation's reply of this number once it has a few steps."""

    def look() -> Message | None:
        assert process.poll() is None, "it ended before it was asked to"
        try:
            with TraceReader(Settings.from_environment().db) as reader:
                found = [m for m in reader.messages(1) if m.role is Role.ASSISTANT][reply:]
        except StoreError:
            return None  # not there yet
        return found[0] if found and found[0].tokens >= STEPS else None

    return look


def kept(message: Message) -> Message:
    """The reply as it ended; every step of it is there, with all that belongs to it."""
    with TraceReader(Settings.from_environment().db) as reader:
        steps = list(reader.iter_steps(message.id))
        found = reader.message(message.id)
    assert [step.step_index for step in steps] == list(range(found.tokens))
    assert all(step.lens is not None and step.attention for step in steps)
    assert found.tokens >= message.tokens >= STEPS
    spoken = b"".join(step.token_bytes for step in steps if not step.is_special)
    assert found.content == spoken.decode("utf-8", errors="replace").replace("\0", "␀")
    return found


@pytest.mark.parametrize(
    ("number", "status", "options"),
    [(signal.SIGINT, 130, ()), (signal.SIGTERM, 143, ("--json",))],
    ids=["ctrl-c", "term"],
)
def test_a_signal_ends_the_reply_and_keeps_it(
    endless: Path, number: signal.Signals, status: int, options: tuple[str, ...]
) -> None:
    wanted = ("--model", endless, "--max-new-tokens", 1_000_000, *options)
    with running("run", "the fox", *wanted) as process:
        message = until(under_way(process), "the first steps")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, "")
    reply = kept(message)
    assert (reply.status, reply.reason) == (Status.STOPPED, "stopped")
    last = out.splitlines()[-1]
    if "--json" in options:
        found = json.loads(last)
        assert (found["status"], found["steps"]) == ("stopped", reply.tokens)
        assert found["output"].replace("\0", "␀") == reply.content
    else:
        assert last.startswith(f"stopped (stopped) · {reply.tokens} tokens · ")


def test_ctrl_c_in_a_chat_ends_the_reply_and_not_the_chat(endless: Path) -> None:
    with running("chat", "--model", endless, "--max-new-tokens", 1_000_000) as process:
        assert process.stdin is not None
        for turn in range(2):
            process.stdin.write(f"turn {turn}\n")
            process.stdin.flush()
            message = until(under_way(process, turn), f"the first steps of reply {turn}")
            process.send_signal(signal.SIGINT)

            def ended(of: Message = message) -> bool:
                with TraceReader(Settings.from_environment().db) as reader:
                    return not reader.message(of.id).status.is_live

            until(ended, f"the end of reply {turn}")
            assert kept(message).status is Status.STOPPED
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.count("stopped (stopped) · ") == 2


def test_a_reader_that_goes_away_ends_the_reply_and_keeps_it(endless: Path) -> None:
    """``oki-trace run … | head``: nobody reads on, so nobody waits for the rest."""
    with running("run", "the fox", "--model", endless, "--max-new-tokens", 1_000_000) as process:
        message = until(under_way(process), "the first steps")
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    assert kept(message).status is Status.STOPPED


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("show", "1"),
        ("info", "--json"),
        ("export", "--conversation", "1"),
    ],
    ids=" ".join,
)
def test_a_reader_that_is_gone_is_not_complained_of(demo: Demo, arguments: tuple[str, ...]) -> None:
    """As ``| head`` leaves it, but gone from the start, so that it is the same each time."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nowhere:
        done = subprocess.run(
            command(*arguments, "--db", demo.db),
            stdout=nowhere,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    # What an export leaves out is said in any case.
    left_out = "oki-trace: The full tensors are left out: --tensors writes them next to the file.\n"
    assert done.returncode == 0
    assert done.stderr == (left_out if arguments[0] == "export" else "")
