"""Converts settings and reports to the JSON documents of a message or a step, and back.

Only records that are read as a whole and never searched are stored as JSON. An unknown
field is ignored, and a field that an older version did not write gets its default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from oki_trace import records
from oki_trace.store.schema.column_types import storable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Document = dict[str, Any]
_R = TypeVar("_R", bound="DataclassInstance")


def to_document(record: DataclassInstance | None) -> Document | None:
    """``record`` as JSON can hold it: a number that is not finite becomes null."""
    if record is None:
        return None
    document: Document = _plain(asdict(record))
    return document


def part_documents(parts: Sequence[records.Part]) -> list[Document] | None:
    """The parts of a reply; a field that is None is left out."""
    documents = [_plain(asdict(part)) for part in parts]
    return [
        {name: value for name, value in document.items() if value is not None}
        for document in documents
    ] or None


def _record(kind: type[_R], document: Document, tuples: Sequence[str] = ()) -> _R:
    """The record of a document; the fields named in ``tuples`` are tuples, empty if missing."""
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in document.items() if name in known}
    return kind(**values | {name: tuple(document.get(name) or ()) for name in tuples})


_policy = partial(_record, records.CapturePolicy, tuples=("lenses",))


def parts(documents: Sequence[Document]) -> tuple[records.Part, ...]:
    return tuple(_record(records.Part, document) for document in documents)


def _template(document: Document) -> records.TemplateOptions:
    return records.TemplateOptions(
        document.get("arguments") or {}, tuple(document.get("tools") or ())
    )


def _capture(document: Document) -> records.CaptureReport:
    layers = tuple(document["attention_layers"])
    windows = document.get("windows")
    nested = {
        "policy": _policy(document["policy"]),
        "attention_layers": layers,
        "windows": None if windows is None else tuple(windows),
    }
    return _record(records.CaptureReport, document | nested)


# Columns of a message, with the function that reads each.
OF_A_MESSAGE: dict[str, Callable[[Document], Any]] = {
    "choice": partial(_record, records.ModelChoice),
    "sampling": partial(_record, records.Sampling),
    "policy": _policy,
    "generation": partial(
        _record, records.Generation, tuples=("eos_token_ids", "others", "replaced")
    ),
    "capture": _capture,
    "checks": partial(_record, records.ReplyChecks, tuples=("steps", "notes")),
    "template": _template,
    "forced": partial(_record, records.Forced, tuples=("token_ids",)),
}


def decision(document: Document) -> records.Decision:
    runner_up = document["runner_up"]
    nested = {
        "effects": tuple(_measured(records.Effect, effect) for effect in document["effects"]),
        "greedy": _measured(records.Contender, document["greedy"]),
        "runner_up": None if runner_up is None else _measured(records.Contender, runner_up),
    }
    return _record(records.Decision, document | nested)


def _measured(kind: type[_R], document: Document) -> _R:
    """A record of measured numbers: null was NaN, except that ``noise`` may be missing."""
    nan = {name: math.nan for name, value in document.items() if value is None and name != "noise"}
    return _record(kind, document | nan)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {storable(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
