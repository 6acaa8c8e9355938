"""A limit for the memory of this process while a model's chat template is rendered.

A template is a program: one line of it can ask for more memory than there is. Where
the system knows such a limit, it gets a MemoryError instead, and its turn fails with
the reason. Only for processes that do nothing else meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from oki_trace.llm.loading.activity import Activity

# What rendering may take beyond what the process has. A prompt takes megabytes.
TEMPLATE_BYTES = 1_000_000_000


class MemoryLimit:
    """Told of each phase, it limits the memory of those in ``limited``."""

    def __init__(self, *limited: Activity) -> None:
        self._limited = limited
        self._before: tuple[int, int] | None = None

    def now_doing(self, what: Activity) -> None:
        self.lift()
        if what in self._limited:
            self._set()

    def lift(self) -> None:
        """Put the limit back as it was."""
        if self._before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, self._before)
            self._before = None

    def _set(self) -> None:
        try:
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except (ImportError, OSError):
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + TEMPLATE_BYTES
        if resource.RLIM_INFINITY != soft < most or resource.RLIM_INFINITY != hard < most:
            return  # there is a narrower one already
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        self._before = soft, hard
