"""The query cache: the finished messages of a store as Parquet files, in sync with the store.

The first question after a message has ended writes the message to the cache, so generation does not
pay for it. Before each question the cache is compared with the store, and a part that contains a
deleted message is rewritten without it.

Eight parts of about the same size are merged, up to 32,768 steps: each message is rewritten at most
three times as the store grows, and n steps need at most n / 32,768 + 22 files per table.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from oki_trace.analysis import engine
from oki_trace.analysis.arrow_tables import Tables, reply_tables, to_arrow
from oki_trace.analysis.folder import EMPTY, Folder, Manifest, NewPart, Part, folder_of
from oki_trace.analysis.messages import message_table
from oki_trace.analysis.tables import BY_NAME
from oki_trace.errors import DamagedSteps
from oki_trace.reporting import Progress
from oki_trace.store.reading.bulk_read import MessageMark
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.arrow import ROW_GROUP, ParquetTable
from oki_trace.store.schema.identity import Db

log = logging.getLogger(__name__)

# The cached tables: all but the conversations, which change.
CACHED = tuple(name for name in BY_NAME if name != "conversation")

# Where each tier of parts ends, in steps. Parts of the last are full.
_TIERS = (512, 4_096, 32_768)
FULL_STEPS = _TIERS[-1]
_FAN = 8


class Cache:
    """The cache of one store."""

    def __init__(self, db: Db) -> None:
        self.folder = Folder(folder_of(db))

    def in_step(self, reader: TraceReader) -> bool:
        """Whether the cache holds exactly the finished messages of the store."""
        return self.folder.manifest().stamp == reader.stamp()

    def sync(self, reader: TraceReader, progress: Progress | None = None) -> Manifest:
        """Synchronise it with the store. Raises StoreError when the folder cannot be written."""
        manifest = self.folder.manifest()
        if manifest.stamp == reader.stamp():
            return manifest
        with self.folder.locked():
            # Another process may have synchronised it while this one waited.
            manifest = self.folder.manifest()
            while True:
                # Before the marks: the next question sees any later change.
                stamp = reader.stamp()
                if manifest.stamp == stamp:
                    return manifest
                parts = self._step(reader, manifest.parts, progress)
                changed = parts != manifest.parts
                manifest = Manifest("" if changed else stamp, parts)
                self.folder.commit(manifest)
                if not changed:
                    return manifest

    def clear(self) -> None:
        """Remove everything; the next question writes it again."""
        with self.folder.locked():
            self.folder.commit(EMPTY)

    def _step(
        self, reader: TraceReader, parts: tuple[Part, ...], progress: Progress | None
    ) -> tuple[Part, ...]:
        """Drop deleted messages, write new ones, and merge small parts."""
        stored = {str(mark.id): mark for mark in reader.message_marks() if not mark.status.is_live}
        kept: list[Part] = []
        written: set[str] = set()
        for part in parts:
            marks = self.folder.marks(part)
            valid = {
                number: mark
                for number, mark in marks.items()
                if number in stored and mark == _identity(stored[number])
            }
            written |= valid.keys()
            if len(valid) == len(marks):
                kept.append(part)
            elif valid:
                kept.append(self._join([part], valid))
        new = [mark for number, mark in stored.items() if number not in written]
        kept += self._write(reader, new, progress)
        return tuple(self._compact(kept))

    # ------------------------------------------------------------------ writing

    def _write(
        self, reader: TraceReader, new: Sequence[MessageMark], progress: Progress | None
    ) -> Iterator[Part]:
        """The new messages as parts; the replies of a conversation stay together."""
        groups = _by_conversation(new)
        done = 0
        while done < len(new):
            with self.folder.new_part() as part:
                marks: dict[str, str] = {}
                with _Files(part) as files:
                    for of_conversation in groups:
                        files.add({"message": message_table(reader, of_conversation)})
                        for mark in of_conversation:
                            for tables in _readable(reader, mark.id):
                                files.add(tables)
                            marks[str(mark.id)] = _identity(mark)
                            if progress is not None:
                                progress(done + len(marks), len(new))
                        if files.steps >= FULL_STEPS:
                            break
                done += len(marks)
                yield part.keep(files.steps, marks)

    def _compact(self, parts: list[Part]) -> list[Part]:
        """Join the parts of a tier as long as there are enough of them."""
        for tier in range(len(_TIERS)):
            same = [part for part in parts if bisect(_TIERS, part.steps) == tier]
            while len(same) >= _FAN or sum(part.steps for part in same) >= FULL_STEPS:
                together, same = _up_to_full(same)
                marks = {
                    n: mark for part in together for n, mark in self.folder.marks(part).items()
                }
                parts = [part for part in parts if part not in together]
                parts.append(self._join(together, marks))
        return parts

    def _join(self, parts: Sequence[Part], marks: dict[str, str]) -> Part:
        """The messages ``marks`` of these parts as one new part."""
        is_all = sum(part.messages for part in parts) == len(marks)
        ids = pa.table({"id": pa.array([int(number) for number in marks], pa.int64())})
        with (
            self.folder.new_part() as joined,
            engine.translate_errors(),
            duckdb.connect(config=engine.CONFIG) as connection,
        ):
            connection.register("kept", ids)
            for name in CACHED:
                rows = connection.read_parquet([self.folder.file(part, name) for part in parts])
                if not is_all:
                    key = "id" if name == "message" else "message_id"
                    rows = rows.set_alias("t").join(
                        connection.table("kept").set_alias("k"),
                        duckdb.ColumnExpression("t", key) == duckdb.ColumnExpression("k", "id"),
                        how="semi",
                    )
                rows.write_parquet(
                    str(joined.file(name)), compression="zstd", row_group_size=ROW_GROUP
                )
            steps = pq.read_metadata(joined.file("step")).num_rows
            return joined.keep(steps, marks)


class _Files:
    """The Parquet files of a new part."""

    def __init__(self, part: NewPart) -> None:
        self.steps = 0
        self._files = {name: ParquetTable(part.file(name), BY_NAME[name].schema) for name in CACHED}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._files.values():
            if raised[0] is None:
                file.flush()
            file.close()

    def add(self, tables: Tables) -> None:
        for name, rows in tables.items():
            if name == "step":
                self.steps += len(rows)
            self._files[name].add(rows)
            if self._files[name].rows >= ROW_GROUP:
                self._files[name].flush()


def _readable(reader: TraceReader, message_id: int) -> Iterator[Tables]:
    """The tables of a reply, without damaged steps, which are logged."""
    try:
        yield from reply_tables(reader, message_id)
    except DamagedSteps as error:
        log.warning("%s", error)


def live_tables(reader: TraceReader) -> Tables:
    """The tables that the cache does not hold: running messages, and all conversations."""
    marks = [mark for mark in reader.message_marks() if mark.status.is_live]
    live = {name: [table.schema.empty_table()] for name, table in BY_NAME.items()}
    live["conversation"].append(_conversations(reader))
    for of_conversation in _by_conversation(marks):
        live["message"].append(message_table(reader, of_conversation))
        for mark in of_conversation:
            for tables in _readable(reader, mark.id):
                for name, rows in tables.items():
                    live[name].append(rows)
    return {name: pa.concat_tables(rows) for name, rows in live.items()}


def _by_conversation(marks: Iterable[MessageMark]) -> Iterator[list[MessageMark]]:
    key = attrgetter("conversation_id")
    for _, group in groupby(sorted(marks, key=key), key=key):
        yield list(group)


def _conversations(reader: TraceReader) -> pa.Table:
    columns = reader.conversation_columns()
    times = {
        name: [when.replace(tzinfo=None) for when in columns[name]]
        for name in ("created_at", "updated_at")
    }
    return to_arrow("conversation", {**columns, **times})


def _identity(mark: MessageMark) -> str:
    """Distinguishes a message from one with the same id in another store at this address.

    And from itself before a lens was applied to it.
    """
    identity = f"{mark.conversation_id} {mark.status} {mark.created_at.isoformat()}"
    return f"{identity} {mark.readings}"


def _up_to_full(parts: list[Part]) -> tuple[list[Part], list[Part]]:
    """The first of these parts that fill one together, and the others."""
    steps = 0
    for count, part in enumerate(parts, start=1):
        steps += part.steps
        if steps >= FULL_STEPS:
            return parts[:count], parts[count:]
    return parts, []
