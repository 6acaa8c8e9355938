"""oki-trace: see what a local language model does at every step and every layer."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oki_trace.api import run_traced, score_traced
    from oki_trace.llm.loading.load import load_model_and_tokenizer

__all__ = ["__version__", "load_model_and_tokenizer", "run_traced", "score_traced"]

try:
    __version__ = version("oki-trace")
except PackageNotFoundError:
    __version__ = "0+unknown"

_HOME = {
    "load_model_and_tokenizer": "oki_trace.llm.loading.load",
    "run_traced": "oki_trace.api",
    "score_traced": "oki_trace.api",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use: torch takes seconds to import, and listing needs none of it.
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'oki_trace' has no attribute {name!r}")
