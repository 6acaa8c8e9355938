"""Exporting by format: what each is written with, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TextIO

from oki_trace.errors import UsageError
from oki_trace.exchange import json_export
from oki_trace.exchange.files import replacing, replacing_bytes, replacing_folder
from oki_trace.exchange.formats import Format
from oki_trace.exchange.selection import selected
from oki_trace.exchange.tensor_export import write_tensors
from oki_trace.exchange.tensor_file import SUFFIX
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader

Tell = Callable[[str], None]


class _Writer(Protocol):
    def __call__(
        self,
        reader: TraceReader,
        conversation_id: int,
        file: TextIO,
        message_id: int | None = None,
        progress: Progress | None = None,
    ) -> None: ...


_WITH_TENSORS = (Format.JSON, Format.JSONL)


def export(
    reader: TraceReader,
    conversation_id: int,
    format: Format,
    output: Path | None,
    standard: TextIO,
    *,
    message_id: int | None = None,
    tensors: bool = False,
    progress: Progress | None = None,
    tell: Tell = lambda sentence: None,
) -> list[Path]:
    """Write a conversation; returns the files or the folder that now are there.

    Without ``output`` it goes to ``standard``. ``tell`` gets a sentence for what
    the format does not hold. Raises NotFound, UsageError for what cannot be
    combined, ExchangeError where nothing can be written.
    """
    beside = _beside(format, output) if tensors else None
    _tell_limits(reader, conversation_id, format, message_id, tensors, tell)
    if format is Format.PARQUET:
        if output is None:
            raise UsageError("parquet is a folder of tables: name it with --output.")
        # Here, because pyarrow takes a while to import.
        from oki_trace.exchange.parquet_export import write_tables
        from oki_trace.exchange.tables import FILES

        with replacing_folder(output, FILES) as folder:
            write_tables(reader, conversation_id, folder, message_id, progress)
        return [output]
    write = _writer(format, tensors)
    if output is None:
        write(reader, conversation_id, standard, message_id, progress)
        return []
    if beside is None:
        with replacing(output) as file:
            write(reader, conversation_id, file, message_id, progress)
        return [output]
    # Both of one instant, and the tensors in place before what speaks of them.
    with (
        selected(reader, conversation_id, message_id) as chosen,
        replacing(output) as file,
        replacing_bytes(beside) as blobs,
    ):
        write(chosen.reader, conversation_id, file, message_id, progress)
        write_tensors(chosen, blobs, progress)
    return [output, beside]


def _writer(format: Format, tensors: bool) -> _Writer:
    if format is Format.HTML:
        from oki_trace.exchange.report import write_report

        return write_report
    if format is Format.TRACE_V1:
        return json_export.write_v1
    write = json_export.write_lines if format is Format.JSONL else json_export.write_conversation
    return partial(write, tensors=tensors)


def _beside(format: Format, output: Path | None) -> Path | None:
    """The file of the tensors; None where the format itself holds them."""
    if format is Format.PARQUET:
        return None
    if format not in _WITH_TENSORS:
        raise UsageError(f"{format} has no place for tensors: use json, jsonl or parquet.")
    if output is None:
        raise UsageError("Tensors are written beside the file: name it with --output.")
    if output.suffix == SUFFIX:
        raise UsageError(f"The tensors get the name {output.name}: choose another --output.")
    return output.with_suffix(SUFFIX)


def _tell_limits(
    reader: TraceReader,
    conversation_id: int,
    format: Format,
    message_id: int | None,
    tensors: bool,
    tell: Tell,
) -> None:
    with selected(reader, conversation_id, message_id) as chosen:
        if chosen.conversation.damage:
            tell(
                f"Conversation {conversation_id} is damaged: {chosen.conversation.damage}; it is "
                "exported as far as it can be read."
            )
        if format is Format.TRACE_V1:
            tell(
                "trace-v1 holds no token ids but the chosen, no logits, ranks or entropies, the "
                "attention of the final layer alone, and no tensors; json holds all of it."
            )
            if len(chosen.replies) > 1:
                tell(f"{len(chosen.replies)} replies make a list of traces; --message takes one.")
        elif format is Format.HTML:
            if chosen.has_tensors():
                tell("html is for reading: it holds no full tensors and cannot be imported.")
        elif format in _WITH_TENSORS:
            if not tensors and chosen.has_tensors():
                tell("The full tensors are left out: --tensors writes them beside the file.")
        elif tensors:
            tell("parquet always holds the full tensors: --tensors is not needed.")
