"""The finished messages of a store as Parquet files, in step with it.

Every message is written once, when a question is first asked after it has
ended; whoever generates it pays nothing. Before a question the cache is
compared with the store: a message that is gone from there goes from here too,
whichever way it went, by writing its part anew without it.

Parts of about one size are joined when there are eight of them, and left alone
once they hold 32,768 steps: each message is rewritten at most three times as
the store grows, and n steps lie in at most n / 32,768 + 22 files a table.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import groupby

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from oki_trace.analysis import engine
from oki_trace.analysis.arrow_tables import Tables, reply_tables, schema, to_arrow
from oki_trace.analysis.folder import EMPTY, Folder, Manifest, NewPart, Part, folder_of
from oki_trace.analysis.messages import message_table
from oki_trace.analysis.tables import BY_NAME
from oki_trace.errors import DamagedSteps
from oki_trace.reporting import Progress
from oki_trace.store.reading.columnar import MessageMark
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema.identity import Db

log = logging.getLogger(__name__)

# The tables that lie in the cache: all but the conversations, which change.
CACHED = tuple(name for name in BY_NAME if name != "conversation")

# Where the next tier of parts begins, in steps. Those of the last are full.
_TIERS = (512, 4_096, 32_768)
FULL_STEPS = _TIERS[-1]
_FAN = 8
# What DuckDB gives to one thread at a time.
ROW_GROUP = 122_880


class Cache:
    """The cache of one store."""

    def __init__(self, db: Db) -> None:
        self.folder = Folder(folder_of(db))

    def in_step(self, reader: TraceReader) -> bool:
        """Whether it holds all that has ended in the store, and nothing else."""
        return self.folder.manifest().stamp == reader.stamp()

    def sync(self, reader: TraceReader, progress: Progress | None = None) -> Manifest:
        """Bring it in step with the store; returns what counts now.

        Raises StoreError when the folder cannot be written.
        """
        manifest = self.folder.manifest()
        if manifest.stamp == reader.stamp():
            return manifest
        with self.folder.locked():
            # Another process may have done it while this one waited.
            manifest = self.folder.manifest()
            while True:
                # Before the marks: what changes after it is seen by the next question.
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
        """Throw everything away; the next question writes it anew."""
        with self.folder.locked():
            self.folder.commit(EMPTY)

    def _step(
        self, reader: TraceReader, parts: tuple[Part, ...], progress: Progress | None
    ) -> tuple[Part, ...]:
        """Leave out what is gone, write what is new, join what has become many."""
        there = {str(mark.id): mark for mark in reader.message_marks() if not mark.status.is_live}
        kept: list[Part] = []
        written: set[str] = set()
        for part in parts:
            marks = self.folder.marks(part)
            stay = {
                number: mark
                for number, mark in marks.items()
                if number in there and mark == _mark(there[number])
            }
            written |= stay.keys()
            if len(stay) == len(marks):
                kept.append(part)
            elif stay:
                kept.append(self._join([part], stay))
        new = [mark for number, mark in there.items() if number not in written]
        kept += self._write(reader, new, progress)
        return tuple(self._compact(kept))

    # ------------------------------------------------------------------ writing

    def _write(
        self, reader: TraceReader, new: Sequence[MessageMark], progress: Progress | None
    ) -> Iterator[Part]:
        """The new messages as parts; a conversation's replies lie together."""
        ordered = sorted(new, key=lambda mark: (mark.conversation_id, mark.id))
        done = 0
        while done < len(ordered):
            with self.folder.new_part() as made, _Writers(made) as writers:
                marks: dict[str, str] = {}
                for _, group in groupby(ordered[done:], key=lambda mark: mark.conversation_id):
                    of_conversation = list(group)
                    writers.add({"message": message_table(reader, of_conversation)})
                    for mark in of_conversation:
                        for tables in _readable(reader, mark.id):
                            writers.add(tables)
                        marks[str(mark.id)] = _mark(mark)
                        if progress is not None:
                            progress(done + len(marks), len(ordered))
                    if writers.steps >= FULL_STEPS:
                        break
                writers.close()
                done += len(marks)
                yield made.keep(writers.steps, marks)

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
        whole = sum(part.messages for part in parts) == len(marks)
        ids = pa.table({"id": pa.array([int(number) for number in marks], pa.int64())})
        with (
            self.folder.new_part() as made,
            engine.translate_errors(),
            duckdb.connect(config=engine.CONFIG) as connection,
        ):
            connection.register("kept", ids)
            for name in CACHED:
                rows = connection.read_parquet([self.folder.file(part, name) for part in parts])
                if not whole:
                    key = "id" if name == "message" else "message_id"
                    rows = rows.set_alias("t").join(
                        connection.table("kept").set_alias("k"),
                        duckdb.ColumnExpression("t", key) == duckdb.ColumnExpression("k", "id"),
                        how="semi",
                    )
                rows.write_parquet(
                    str(made.file(name)), compression="zstd", row_group_size=ROW_GROUP
                )
            steps = pq.read_metadata(made.file("step")).num_rows
            return made.keep(steps, marks)


class _Writers:
    """A Parquet file a table; rows are collected until they are a row group."""

    def __init__(self, part: NewPart) -> None:
        self.steps = 0
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in CACHED}
        self._files = {
            name: pq.ParquetWriter(
                part.file(name),
                schema(BY_NAME[name]),
                compression="zstd",
                # Measured numbers seldom repeat.
                use_dictionary=[
                    c.name for c in BY_NAME[name].columns if c.kind not in ("DOUBLE", "FLOAT")
                ],
            )
            for name in CACHED
        }

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, tables: Tables) -> None:
        for name, rows in tables.items():
            if name == "step":
                self.steps += len(rows)
            self._waiting[name].append(rows)
            if sum(map(len, self._waiting[name])) >= ROW_GROUP:
                self._flush(name)

    def close(self) -> None:
        for name, file in self._files.items():
            self._flush(name)
            file.close()

    def _flush(self, name: str) -> None:
        if self._waiting[name]:
            rows = pa.concat_tables(self._waiting[name])
            self._files[name].write_table(rows, row_group_size=ROW_GROUP)
            self._waiting[name].clear()


def _readable(reader: TraceReader, message_id: int) -> Iterator[Tables]:
    """The tables of a reply; what is damaged of it is told and left out."""
    try:
        yield from reply_tables(reader, message_id)
    except DamagedSteps as error:
        log.warning("%s", error)


def live_tables(reader: TraceReader) -> Tables:
    """What the cache does not hold: the messages still running, and all conversations."""
    marks = [mark for mark in reader.message_marks() if mark.status.is_live]
    found: dict[str, list[pa.Table]] = {
        name: [schema(table).empty_table()] for name, table in BY_NAME.items()
    }
    found["conversation"].append(_conversations(reader))
    for _, group in groupby(
        sorted(marks, key=lambda mark: mark.conversation_id), key=lambda m: m.conversation_id
    ):
        of_conversation = list(group)
        found["message"].append(message_table(reader, of_conversation))
        for mark in of_conversation:
            for tables in _readable(reader, mark.id):
                for name, rows in tables.items():
                    found[name].append(rows)
    return {name: pa.concat_tables(rows) for name, rows in found.items()}


def _conversations(reader: TraceReader) -> pa.Table:
    columns = reader.conversation_columns()
    times = {
        name: [when.replace(tzinfo=None) for when in columns[name]]
        for name in ("created_at", "updated_at")
    }
    return to_arrow("conversation", {**columns, **times})


def _mark(mark: MessageMark) -> str:
    """Ids are not given twice in a store; but another store can lie at its address one day."""
    return f"{mark.conversation_id} {mark.status} {mark.created_at.isoformat()}"


def _up_to_full(parts: list[Part]) -> tuple[list[Part], list[Part]]:
    """The first of these parts that fill one together, and those that are left."""
    steps = 0
    for count, part in enumerate(parts, start=1):
        steps += part.steps
        if steps >= FULL_STEPS:
            return parts[:count], parts[count:]
    return parts, []
