"""Ctrl-C and SIGTERM while native code or a template ignores them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tokenizers.normalizers import Replace, Sequence

from oki_trace.errors import StoreError
from oki_trace.records import Message, Role, Status
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from tests import tiny
from tests.cli.commands import ROOT, command
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX here")


def endless_template(folder: Path) -> None:
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text(loop)


def endless_tokenizer(folder: Path) -> None:
    """ "x" doubles with each rule, in code that is not Python's; loading tries a text without."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = Sequence([Replace("x", "xx")] * 28)
    tokenizer.save_pretrained(folder)


def reply() -> Message | None:
    try:
        with TraceReader(Settings.from_environment().db) as reader:
            found = [m for m in reader.messages(1) if m.role is Role.ASSISTANT]
    except StoreError:
        return None  # not there yet
    return found[0] if found else None


@pytest.mark.parametrize("make", [endless_template, endless_tokenizer], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("verb", "number"), [("run", signal.SIGINT), ("chat", signal.SIGTERM)], ids=["run", "chat"]
)
def test_a_signal_ends_it_all_the_same(
    endless: Path, tmp_path: Path, make: object, verb: str, number: signal.Signals
) -> None:
    folder = Path(shutil.copytree(endless, tmp_path / "hostile"))
    assert callable(make)
    make(folder)
    text = ["the fox"] if verb == "run" else []
    process = subprocess.Popen(
        command(verb, *text, "--model", folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            assert process.stdin is not None
            if verb == "chat":
                process.stdin.write("the fox\n")
                process.stdin.flush()
            until(reply, "the reply's beginning")
            process.send_signal(number)
            sent = time.monotonic()
            _, err = process.communicate(timeout=60)
            took = time.monotonic() - sent
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert took < 15, "on a busy machine; two seconds and the store's own"
    ended = reply()
    assert ended is not None and ended.status is Status.STOPPED
    assert ended.reason is not None and ended.reason.startswith("stopped while ")
    assert err == f"oki-trace: {ended.reason}.\n"
