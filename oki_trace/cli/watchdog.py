"""Ctrl-C and SIGTERM end a command also while it is deep in a model's files.

Python tells its own code of a signal only between two of its own instructions, and
what hears of it may not listen: a tokenizer at work, a template that loops. So a
thread hears of each signal at once. When the command has not obeyed within a moment,
it ends the process, after the reply under way was ended in the store.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from oki_trace.llm.decoding.memory_limit import MemoryLimit
from oki_trace.llm.loading.activity import Activity, reporting_to

# How long a signal is waited for, where it is not the model's files that do not listen: a
# step of a large model takes its time, as does cleaning up.
_SECONDS = 2.0
_LONGER = {Activity.DECODING: 20.0, None: 10.0}
_LOOK_SECONDS = 0.1
# For the store, which another process may hold.
_SECONDS_TO_TELL = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Watchdog:
    """``tell`` is called with what was being done, to end the reply in the store."""

    tell: Callable[[str], object] | None = None
    doing: Activity | None = None
    obeyed: threading.Event = field(default_factory=threading.Event)
    memory: MemoryLimit = field(default_factory=lambda: MemoryLimit(Activity.TEMPLATE))

    def now_doing(self, what: Activity) -> None:
        self.doing = what
        self.memory.now_doing(what)

    def hear(self, number: int) -> None:
        """A signal has come; end the process unless it is obeyed in time."""
        self.obeyed.clear()
        threading.Thread(target=self._wait, args=(number,), daemon=True).start()

    def _wait(self, number: int) -> None:
        came = time.monotonic()
        while time.monotonic() - came < _LONGER.get(self.doing, _SECONDS):
            if self.obeyed.wait(_LOOK_SECONDS):
                return
        what = f"stopped while {self.doing}" if self.doing is not None else "stopped"
        teller = threading.Thread(target=self._tell, args=(what,), daemon=True)
        teller.start()
        teller.join(timeout=_SECONDS_TO_TELL)
        sys.stderr.write(f"oki-trace: {what}.\n")
        os._exit(128 + number)

    def _tell(self, what: str) -> None:
        if self.tell is not None:
            self.tell(what)


@contextmanager
def watchdog() -> Iterator[Watchdog]:
    """While this lasts, signals are heard of; ``obeyed`` is to be set when one was.

    It is set at the end, too. Outside of the main thread there are no signals to hear.
    """
    dog = Watchdog()
    if threading.current_thread() is not threading.main_thread():
        yield dog
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading, dog), daemon=True).start()
    try:
        with reporting_to(dog.now_doing):
            yield dog
    finally:
        dog.obeyed.set()
        dog.memory.lift()
        signal.set_wakeup_fd(before)
        os.close(writing)  # which ends the thread


def _listen(reading: int, dog: Watchdog) -> None:
    with os.fdopen(reading, "rb", buffering=0) as signals:
        while numbers := signals.read(16):
            for number in numbers:
                if number in _SIGNALS:
                    dog.hear(number)
