"""A Python process of its own for work that must not take this one along.

``command`` starts one on a function of ours, ``FRUGAL`` is its environment, and
``limit_memory`` is what it calls before it touches what is not trusted.
"""

from __future__ import annotations

import sys
from pathlib import Path

_START = (
    "import sys, importlib; sys.path.append(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main()"
)
# One arena, one thread: their reserves would count as memory that the work takes.
FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def command(module: str) -> list[str]:
    """What runs ``main()`` of this module of ours, wherever the user is."""
    package = str(Path(__file__).resolve().parents[1])
    # -P: no module of the folder that the user is in.
    return [sys.executable, "-P", "-c", _START, package, module]


def address_space() -> int | None:
    """The bytes of address space that this process has taken; None where it cannot be told."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return None
    return pages * resource.getpagesize()


def limit_memory(more: int) -> None:
    """Let this process have so many bytes more than now, where the system can see to that.

    Elsewhere the process that started it watches.
    """
    taken = address_space()
    if taken is None:
        return
    import resource

    most = taken + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
