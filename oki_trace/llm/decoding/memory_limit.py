"""Limits the memory of this process while a model's chat template is rendered.

A template is a program: one line of it can allocate more memory than there is. On
systems with such a limit it gets a MemoryError instead, and its turn fails with the
reason. Only for processes that do nothing else at the same time.
"""

from __future__ import annotations

from pathlib import Path

from oki_trace.llm.loading.activity import Activity

# The memory that rendering may add to the process's own. A prompt takes megabytes.
TEMPLATE_BYTES = 1_000_000_000


class MemoryLimit:
    """Limits the memory of the phases in ``limited``; it is notified of each phase."""

    def __init__(self, *limited: Activity) -> None:
        self._limited = limited
        self._before: tuple[int, int] | None = None

    def now_doing(self, what: Activity) -> None:
        """The phase ``what`` begins, and any other ends."""
        self.lift()
        if what in self._limited:
            self._set()

    def lift(self) -> None:
        """Restore the earlier limit."""
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
        limit = pages * resource.getpagesize() + TEMPLATE_BYTES
        if resource.RLIM_INFINITY != soft < limit or resource.RLIM_INFINITY != hard < limit:
            return  # a lower limit is in force
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        self._before = soft, hard
