"""The names of the export formats, in a module that the command line's help imports fast."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The formats a conversation can be written in."""

    JSON = "json"
    JSONL = "jsonl"
    PARQUET = "parquet"
    HTML = "html"
    TRACE_V1 = "trace-v1"
