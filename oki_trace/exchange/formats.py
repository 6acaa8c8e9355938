"""The export formats, in a module of their own so that the help of the command line loads fast."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Format(StrEnum):
    """The formats a conversation can be written in, with their label and suffix in the explorer."""

    JSON = "json", "JSON", "json"
    JSONL = "jsonl", "JSON lines", "jsonl"
    PARQUET = "parquet", "Parquet tables with full tensors", "zip"
    HTML = "html", "HTML report", "html"
    TRACE_V1 = "trace-v1", "Trace of version 1", "v1.json"

    label: str
    suffix: str

    def __new__(cls, value: str, label: str, suffix: str) -> Self:
        member = str.__new__(cls, value)
        member._value_, member.label, member.suffix = value, label, suffix
        return member
