"""Exports a conversation in any format, and reports what the format leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from oki_trace.errors import UsageError
from oki_trace.exchange import json_export
from oki_trace.exchange.files import replacing, replacing_folder
from oki_trace.exchange.formats import Format
from oki_trace.exchange.selection import Selection, selected
from oki_trace.exchange.tensor_export import write_tensors
from oki_trace.exchange.tensor_file import SUFFIX
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader

_WITH_TENSORS = (Format.JSON, Format.JSONL)


def export(
    reader: TraceReader,
    conversation_id: int,
    format: Format,
    output: Path | None,
    standard: TextIO,
    *,
    message_id: int | None = None,
    branch: int | None = None,
    tensors: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[Path]:
    """Write a conversation; returns the files, or the folder, that were written.

    ``branch``: only the newest path through this message. Without ``output`` it goes to
    ``standard``. ``tell`` gets a sentence for
    anything that the format leaves out. Raises NotFound, UsageError for options
    that cannot be combined, ExchangeError where nothing can be written.
    """
    beside = _beside(format, output) if tensors else None
    if format is Format.PARQUET and output is None:
        raise UsageError("parquet is a folder of tables: choose it with --output.")
    which = (conversation_id, message_id, progress)
    given = format is not Format.TRACE_V1
    with selected(reader, *which, branch=branch, tensors=tensors, given=given) as chosen:
        for sentence in _left_out(chosen, format):
            tell(sentence)
        if format is Format.PARQUET and output is not None:
            # Here, because pyarrow takes a while to import.
            from oki_trace.exchange.parquet_export import write_tables
            from oki_trace.exchange.tables import FILES

            with replacing_folder(output, FILES) as folder:
                write_tables(chosen, folder)
            return [output]
        with ExitStack() as files:
            file = standard if output is None else files.enter_context(replacing(output))
            # Closed first: the tensors are in place before the file that refers to them.
            blobs = files.enter_context(replacing(beside, "wb")) if beside else None
            _writer(format)(chosen, file)
            if blobs is not None:
                write_tensors(chosen, blobs)
    return [path for path in (output, beside) if path is not None]


def _writer(format: Format) -> Callable[[Selection, TextIO], None]:
    if format is Format.HTML:
        from oki_trace.exchange.report import write_report

        return write_report
    if format is Format.TRACE_V1:
        return json_export.write_v1
    return json_export.write_lines if format is Format.JSONL else json_export.write_conversation


def _beside(format: Format, output: Path | None) -> Path | None:
    """The file of the tensors; None where the format itself holds them."""
    if format is Format.PARQUET:
        return None
    if format not in _WITH_TENSORS:
        raise UsageError(f"{format} cannot contain full tensors: use json, jsonl or parquet.")
    if output is None:
        raise UsageError("Tensors are written next to the file: choose it with --output.")
    if output.suffix == SUFFIX:
        raise UsageError(f"The tensors get the name {output.name}: choose another --output.")
    return output.with_suffix(SUFFIX)


def _left_out(chosen: Selection, format: Format) -> Iterator[str]:
    """Sentences about the data that the export leaves out."""
    if chosen.conversation.damage:
        yield (
            f"Conversation {chosen.conversation.id} is damaged: {chosen.conversation.damage}; it "
            "is exported as far as it can be read."
        )
    if chosen.given_steps and not chosen.given:
        yield (
            f"The steps of {chosen.given_steps:,} given tokens are left out: json, jsonl, "
            "parquet and html contain them."
        )
    if format is Format.TRACE_V1:
        yield (
            "trace-v1 contains only the ids of chosen tokens and the attention of the final layer, "
            "and no logits, ranks, entropies or tensors; json contains all of them."
        )
        if len(chosen.replies) > 1:
            yield f"The file is a list of {len(chosen.replies)} traces; --message selects one."
    elif format is Format.HTML:
        if chosen.has_tensors():
            yield "html is for reading: it contains no full tensors and cannot be imported."
    elif format in _WITH_TENSORS:
        if not chosen.tensors and chosen.has_tensors():
            yield "The full tensors are left out: --tensors writes them next to the file."
    elif chosen.tensors:
        yield "parquet always contains the full tensors: --tensors is not needed."
