"""Ends a command on Ctrl-C or SIGTERM, even while native code or a template is running.

Python runs signal handlers only between two bytecode instructions of the main thread,
which a tokenizer or an endless template may never reach. A thread therefore receives each
signal at once. If the command does not react in time, the thread ends the reply in the
store, and then the process.
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

# How long a command may take to obey. A step of a large model takes longer, and so does
# cleaning up.
_SECONDS = 2.0
_LONGER = {Activity.DECODING: 20.0, None: 10.0}
_POLL_SECONDS = 0.1
# The store may be locked by another process.
_STORE_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Watchdog:
    """``end_reply`` is called with the reason, to end the reply in the store."""

    end_reply: Callable[[str], object] | None = None
    doing: Activity | None = None
    obeyed: threading.Event = field(default_factory=threading.Event)
    memory: MemoryLimit = field(default_factory=lambda: MemoryLimit(Activity.TEMPLATE))

    def now_doing(self, what: Activity) -> None:
        self.doing = what
        self.memory.now_doing(what)

    def on_signal(self, number: int) -> None:
        """End the process unless the command obeys this signal in time."""
        self.obeyed.clear()
        threading.Thread(target=self._wait, args=(number,), daemon=True).start()

    def _wait(self, number: int) -> None:
        began = time.monotonic()
        while time.monotonic() - began < _LONGER.get(self.doing, _SECONDS):
            if self.obeyed.wait(_POLL_SECONDS):
                return
        reason = f"stopped while {self.doing}" if self.doing is not None else "stopped"
        if self.end_reply is not None:
            ending = threading.Thread(target=self.end_reply, args=(reason,), daemon=True)
            ending.start()
            ending.join(timeout=_STORE_SECONDS)
        sys.stderr.write(f"oki-trace: {reason}.\n")
        os._exit(128 + number)


@contextmanager
def watchdog() -> Iterator[Watchdog]:
    """Watch for signals; the command sets ``obeyed`` when it has obeyed one.

    Does nothing outside of the main thread, which alone receives signals.
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
        os.close(writing)  # ends the thread


def _listen(reading: int, dog: Watchdog) -> None:
    with os.fdopen(reading, "rb", buffering=0) as signals:
        while numbers := signals.read(16):
            for number in numbers:
                if number in _SIGNALS:
                    dog.on_signal(number)
