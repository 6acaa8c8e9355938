"""Starts and limits a separate Python process, for work that may crash or use up memory.

``start`` starts one, and the process calls ``limit_memory`` before it reads untrusted
input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_START = (
    "import sys, importlib; sys.path.append(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main()"
)
# One arena and one thread: reserves of others would count as memory of the work.
_FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def command(module: str) -> list[str]:
    """The command that runs ``main()`` of a module of this package, from any folder."""
    package = str(Path(__file__).resolve().parents[1])
    # -P: no module of the current folder is imported.
    return [sys.executable, "-P", "-c", _START, package, module]


def start(module: str) -> subprocess.Popen[bytes]:
    """A process that runs ``main()`` of a module; its input and output are pipes.

    Ctrl-C reaches only the process that starts it, which has to kill it.
    """
    return subprocess.Popen(
        command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **_FRUGAL},
    )


def address_space() -> int | None:
    """The bytes of address space of this process; None where the system does not tell."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return None
    return pages * resource.getpagesize()


def limit_memory(more: int) -> None:
    """Limit this process to ``more`` bytes than it has now, where the system supports it.

    Elsewhere the parent process must watch its memory.
    """
    used = address_space()
    if used is None:
        return
    import resource

    most = used + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
