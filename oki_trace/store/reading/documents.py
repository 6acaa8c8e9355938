"""Settings and reports as the JSON documents of a message or a step, and back.

Only records that are read as a whole and never searched are stored like this. A field
that this program does not know is ignored, and one that an older program did not write
gets its default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from oki_trace.records import (
    CapturePolicy,
    CaptureReport,
    Contender,
    Decision,
    Effect,
    Generation,
    ModelChoice,
    Part,
    ReplyChecks,
    Sampling,
    TemplateOptions,
)
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


def part_documents(parts: Sequence[Part]) -> list[Document] | None:
    """The parts of a reply; a field that is None is left out."""
    documents = [_plain(asdict(part)) for part in parts]
    return [
        {name: value for name, value in document.items() if value is not None}
        for document in documents
    ] or None


def choice(document: Document | None) -> ModelChoice | None:
    return _record(ModelChoice, document)


def sampling(document: Document | None) -> Sampling | None:
    return _record(Sampling, document)


def policy(document: Document | None) -> CapturePolicy | None:
    return _record(CapturePolicy, document)


def generation(document: Document | None) -> Generation | None:
    return _record(Generation, document, "eos_token_ids", "others", "replaced")


def checks(document: Document | None) -> ReplyChecks | None:
    return _record(ReplyChecks, document, "steps", "notes")


def parts(documents: Sequence[Document] | None) -> tuple[Part, ...]:
    made = (_record(Part, document) for document in documents or ())
    return tuple(part for part in made if part is not None)


def template(document: Document | None) -> TemplateOptions | None:
    if document is None:
        return None
    return TemplateOptions(document.get("arguments") or {}, tuple(document.get("tools") or ()))


def capture(document: Document | None) -> CaptureReport | None:
    if document is None:
        return None
    layers = tuple(document["attention_layers"])
    return _record(
        CaptureReport,
        {**document, "policy": policy(document["policy"]), "attention_layers": layers},
    )


def decision(document: Document | None) -> Decision | None:
    if document is None:
        return None
    effects = (_record(Effect, _measured(effect)) for effect in document["effects"])
    return _record(
        Decision,
        {
            **document,
            "effects": tuple(effect for effect in effects if effect is not None),
            "greedy": _record(Contender, _measured(document["greedy"])),
            "runner_up": _record(Contender, _measured(document["runner_up"])),
        },
    )


def _record(kind: type[_R], document: Document | None, *tuples: str) -> _R | None:
    """The record of a document; the fields named in ``tuples`` are tuples, empty if missing."""
    if document is None:
        return None
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in document.items() if name in known}
    return kind(**values | {name: tuple(document.get(name) or ()) for name in tuples})


def _measured(document: Document | None) -> Document | None:
    """A null in place of a measured number was NaN; ``noise`` may be absent."""
    if document is None:
        return None
    return {
        name: math.nan if value is None and name != "noise" else value
        for name, value in document.items()
    }


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
