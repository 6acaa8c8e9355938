"""The names of the formats, by themselves: the command line's help needs no more."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """The formats a conversation can be written in."""

    JSON = "json"
    JSONL = "jsonl"
    PARQUET = "parquet"
    HTML = "html"
    TRACE_V1 = "trace-v1"
