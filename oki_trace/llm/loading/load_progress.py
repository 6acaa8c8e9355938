"""Progress of a load: transformers' progress bars, and a callback.

transformers draws bars for downloads and for loading weights. A person at a
terminal wants them; a log file or a pipe would get hundreds of lines of them.
A caller with its own display, such as the explorer, needs the fraction instead.
The switches belong to the whole process, so each is put back afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

Progress = Callable[[str, float | None], None]
"""Called with the current activity and its fraction: 0 to 1, or None if it is unknown."""


def no_progress(text: str, fraction: float | None) -> None:
    """The callback for callers without one."""


@contextmanager
def progress_bars(progress: Progress | None = None) -> Iterator[None]:
    """In this context, bars are drawn on a terminal only, and reported to ``progress`` as well."""
    from transformers.utils import logging

    from oki_trace.llm.transformers_internals import silent_gguf_reader

    with ExitStack() as stack:
        if sys.stderr is None or not sys.stderr.isatty():
            stack.enter_context(silent_gguf_reader())
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        if progress is not None:
            previous = logging.set_tqdm_hook(partial(_reporting, progress))
            stack.callback(logging.set_tqdm_hook, previous)
        yield


def _reporting(
    progress: Progress, factory: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    """The bar that transformers asks for; over something countable, reported as it goes."""
    bar = factory(*arguments, **keywords)
    total = len(arguments[0]) if arguments and hasattr(arguments[0], "__len__") else 0
    return _counted(bar, progress, str(keywords.get("desc", "Loading")), total) if total else bar


def _counted(bar: Any, progress: Progress, text: str, total: int) -> Iterator[Any]:
    for done, item in enumerate(bar):
        progress(text, done / total)
        yield item
    progress(text, 1.0)
