"""Loading as seen from outside: transformers' progress bars, and our callback.

transformers draws bars for downloads and for loading weights. A person at a
terminal wants them; a log file or a pipe would get hundreds of lines of them.
A caller with a screen of its own (the explorer) wants the fraction instead.
Every switch turned here belongs to the whole process, so each is put back as
it was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

Progress = Callable[[str, float | None], None]
"""Told what is being done, and how far it is: 0 to 1, or None when that is unknown."""


def silent(text: str, fraction: float | None) -> None:
    """The callback of a caller who gave none."""


@contextmanager
def bars(progress: Progress | None = None) -> Iterator[None]:
    """Within this block bars are drawn on a terminal only, and ``progress`` hears of them too."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    reader: Any = gguf
    quiet = sys.stderr is None or not sys.stderr.isatty()
    was_on = logging.is_progress_bar_enabled()
    plain_tqdm = reader.tqdm  # the GGUF reader takes tqdm's own class and knows no switch
    previous_hook: Any = None
    if quiet:
        logging.disable_progress_bar()
        reader.tqdm = partial(plain_tqdm, disable=True)
    if progress is not None:
        previous_hook = logging.set_tqdm_hook(partial(_reporting, progress))
    try:
        yield
    finally:
        if progress is not None:
            logging.set_tqdm_hook(previous_hook)
        reader.tqdm = plain_tqdm
        if quiet and was_on:
            logging.enable_progress_bar()


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
