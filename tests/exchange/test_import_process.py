"""The process that reads a file: its limits, and that it ends with its parent."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oki_trace.errors import ExchangeError, UsageError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_files, import_path, import_stream
from oki_trace.exchange.reading import supervisor
from oki_trace.exchange.tables import TABLES
from oki_trace.store.reading.reader import TraceReader
from tests.cli.commands import ROOT
from tests.exchange import stories
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")

# Of reading and of the program that waits for it, each by itself.
MOST_BYTES = 650_000_000
LEFTOVERS = ".oki-trace-import-*"

_RUN = r"""
import re, resource, sys
from pathlib import Path
from oki_trace.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
# Not getrusage for this one: its peak includes the size of the parent before exec.
own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small export: ``x.json``, ``x.safetensors``, and the tables in ``x``."""
    folder = tmp_path_factory.mktemp("exported")
    stories.fill(folder / "s.db", steps=2)
    with TraceReader(folder / "s.db") as reader:
        export(reader, 1, Format.JSON, folder / "x.json", sys.stdout, tensors=True)
        export(reader, 1, Format.PARQUET, folder / "x", sys.stdout)
    return folder


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "t.db"


def endless(folder: Path) -> Path:
    """A file that takes minutes to read, each step of it in milliseconds."""
    path = folder / "endless.json"
    step = {"chosen_token": "a", "logits_topk": [{"token": "a", "prob": 0.5}] * 100}
    steps = ",".join([json.dumps(step)] * 20_000)
    path.write_text(f'{{"prompt": "x", "output": "y", "steps": [{steps}]}}')
    return path


# ------------------------------------------------------------------------- bombs


def long_text(exported: Path, into: Path) -> Path:
    """A text of 20 MB, once in a dictionary, that 2,000 rows refer to."""
    text = pa.DictionaryArray.from_arrays(pa.repeat(0, 2_000).cast("int32"), ["a" * 20_000_000])
    return changed(exported, into, "topk_entry", "token", text)


def zeros(exported: Path, into: Path) -> Path:
    """A tensor of zeros, which compresses to some kilobytes."""
    return changed(exported, into, "tensor", "data", pa.array([bytes(200_000_000)]))


def one_row_without_end(exported: Path, into: Path) -> Path:
    """A row that is repeated ten million times, as one run."""
    return changed(exported, into, "topk_entry", "token", pa.repeat("a", 10_000_000))


def changed(exported: Path, into: Path, name: str, column: str, values: Any) -> Path:
    """The tables of the export, one of them made of its first row and this column."""
    into.mkdir()
    for file in (exported / "x").iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    schema = TABLES[name]
    (first,) = pq.read_table(into / f"{name}.parquet").slice(0, 1).to_pylist()
    arrays = {
        field.name: values
        if field.name == column
        else pa.repeat(pa.scalar(first[field.name], type=field.type), len(values))
        for field in schema
    }
    pq.write_table(pa.table(arrays), into / f"{name}.parquet", compression="zstd")
    return into


def sparse_tensor(exported: Path, into: Path) -> Path:
    """Full logits of a gigabyte, which take nothing on the disk."""
    into.mkdir()
    document = json.loads((exported / "x.json").read_text())
    (into / "x.json").write_text(json.dumps(document))
    data = (exported / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    size = 1_000_000_000
    at = max(entry["data_offsets"][1] for name, entry in header.items() if name[0] == "m")
    header["message-3/step-0/logits"] = {
        "dtype": "F32",
        "shape": [size // 4],
        "data_offsets": [at, at + size],
    }
    text = json.dumps(header).encode()
    with (into / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        file.truncate(file.tell() + size)
    return into / "x.json"


def written(into: Path, pieces: list[str]) -> Path:
    into.mkdir()
    with (into / "x.json").open("w") as file:
        file.writelines(pieces)
    return into / "x.json"


BOMBS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a long text in every row": (long_text, "token is longer than"),
    "zeros": (zeros, "memory"),
    "a row without end": (one_row_without_end, "more than 1,000 rows"),
    "a tensor that is a hole": (sparse_tensor, "memory"),
    "a prompt of nothing": (
        lambda _, into: written(into, ['{"prompt": "x", "output": "", "prompt_len": 1999999}']),
        "more than the prompt allows",
    ),
    "a list of lists": (
        lambda _, into: written(
            into, ['{"prompt": "x", "prompt_tokens": [[]', ",[]" * 20_000_000, "]}"]
        ),
        "memory",
    ),
    "an object of names": (
        lambda _, into: written(
            into,
            [
                '{"prompt": "x", "generation": {"0": 0',
                *(f',"{n}":0' for n in range(4_000_000)),
                "}}",
            ],
        ),
        "memory",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line_in_little_memory(
    name: str, exported: Path, tmp_path: Path, db: Path
) -> None:
    make, why = BOMBS[name]
    # Less than the others, because making it takes several times its size.
    more = ["--memory", "150MB"] if name == "zeros" else []
    path = make(exported, tmp_path / "bomb")
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "import", str(path), "--db", str(db), *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and why in done.stderr, done.stderr
    assert int(done.stdout) < MOST_BYTES
    assert not db.exists() and list(tmp_path.glob(LEFTOVERS)) == []


def test_names_that_nobody_asks_for_are_not_held(tmp_path: Path, db: Path) -> None:
    """Two of them that would exceed the memory; invalid JSON within them is still refused."""
    more = ['"x": "', "a" * 80_000_000, '", "y": [[1', ",[],{}" * 6_000_000, "]], "]
    path = written(tmp_path / "x", ["{", *more, '"prompt": "a", "output": "b"}'])
    assert import_path(path, db).messages == 2
    path = written(tmp_path / "y", ['{"x": [1, ', "[]," * 1_000_000, '}, "prompt": "a"}'])
    with pytest.raises(ExchangeError, match="not JSON"):
        import_path(path, db)


def test_a_zip_of_a_bomb_is_refused(exported: Path, tmp_path: Path, db: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("tensor.parquet", bytes(300_000_000))
    with pytest.raises(ExchangeError, match="far more than an export"):
        import_path(tmp_path / "x.zip", db)
    assert list(tmp_path.glob(LEFTOVERS)) == []


def test_more_memory_is_given_when_it_is_asked_for(
    exported: Path, tmp_path: Path, db: Path
) -> None:
    path = exported / "x.json"
    with pytest.raises(ExchangeError, match="--memory"):
        import_path(path, db, memory_bytes=1_000_000)
    assert import_path(path, db, memory_bytes=2_000_000_000).steps == 4


# --------------------------------------------------------------------- the process


def test_it_tells_how_far_it_is(exported: Path, db: Path) -> None:
    calls: list[tuple[int, int]] = []
    done = import_path(exported / "x.json", db, lambda done, total: calls.append((done, total)))
    assert done.steps == 4 and calls[-1] == (4, 4)


def test_an_upload_brings_its_tensors(exported: Path, db: Path) -> None:
    files = {
        suffix: io.BytesIO((exported / f"x{suffix}").read_bytes())
        for suffix in (".safetensors", ".json")
    }
    (number,) = import_files(files, db).conversations
    with TraceReader(db) as reader:
        assert reader.tensor_names(3, 0) and reader.conversation(number).messages == 8


def children() -> list[psutil.Process]:
    """The import processes of this one: other tests leave a sandbox of DuckDB running."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("exchange.reading" in word for word in child.cmdline()):
                found.append(child)
    return found


def child_of(process: int) -> psutil.Process | None:
    return next(iter(psutil.Process(process).children()), None)


class _Enough(Exception):
    """The caller ends the import."""


def test_whoever_watches_can_end_it(tmp_path: Path, db: Path) -> None:
    """As a page does when the user leaves it."""
    seen: list[psutil.Process] = []

    def watch(done: int, total: int) -> None:
        seen.extend(children())
        if done:
            raise _Enough

    with pytest.raises(_Enough):
        import_path(endless(tmp_path), db, watch)
    assert seen and not any(child.is_running() for child in seen)
    assert list(tmp_path.glob(LEFTOVERS)) == [] and not db.exists()


def test_one_that_is_stuck_is_given_up(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STUCK_SECONDS", 1.0)

    def stop(done: int, total: int) -> None:
        if done:
            for child in children():
                child.send_signal(signal.SIGSTOP)

    with pytest.raises(ExchangeError, match="no progress"):
        import_path(endless(tmp_path), db, stop)
    assert children() == []


def test_one_that_breaks_is_one_line(tmp_path: Path, db: Path) -> None:
    def kill(done: int, total: int) -> None:
        for child in children():
            child.kill()

    with pytest.raises(ExchangeError, match="signal 9"):
        import_path(endless(tmp_path), db, kill)
    assert list(tmp_path.glob(LEFTOVERS)) == []


@contextmanager
def importing(path: Path, db: Path) -> Iterator[subprocess.Popen[str]]:
    """``oki-trace import`` as a process of its own, and reading."""
    process = subprocess.Popen(
        [sys.executable, "-m", "oki_trace", "import", str(path), "--db", str(db)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            until(lambda: any(db.parent.glob(f"{LEFTOVERS}/staging.db")), "the reading")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_leaves_nothing(
    number: signal.Signals, status: int, tmp_path: Path, db: Path
) -> None:
    with importing(endless(tmp_path), db) as process:
        child = child_of(process.pid)
        assert child is not None
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", "")
    until(lambda: not child.is_running(), "the end of the reading process")
    assert list(tmp_path.glob(LEFTOVERS)) == [] and not db.exists()


def test_one_that_is_killed_leaves_no_process_and_its_folder_goes_with_the_next(
    exported: Path, tmp_path: Path, db: Path
) -> None:
    import_path(exported / "x.json", db)
    with importing(endless(tmp_path), db) as process:
        child = child_of(process.pid)
        assert child is not None
        process.kill()
    until(lambda: not child.is_running(), "the end of the reading process")
    assert len(list(tmp_path.glob(LEFTOVERS))) == 1
    import_path(exported / "x.json", db)
    assert list(tmp_path.glob(LEFTOVERS)) == []
    with TraceReader(db) as reader:
        assert reader.conversation_count() == 2


def test_a_folder_that_is_worked_in_is_left_alone(exported: Path, tmp_path: Path, db: Path) -> None:
    with importing(endless(tmp_path), db) as process:
        import_path(exported / "x.json", db)
        assert process.poll() is None
        assert len(list(tmp_path.glob(f"{LEFTOVERS}/staging.db"))) == 1


def test_no_program_of_the_current_folder_is_run(
    exported: Path, tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of others may hold a file with the name of any module."""
    for name in ("json", "numpy", "sqlalchemy", "pyarrow", "oki_trace"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert import_path(exported / "x", db).steps == 4
    assert not (tmp_path / "ran").exists()


def test_what_is_staged_is_for_its_user_alone(tmp_path: Path, db: Path) -> None:
    with importing(endless(tmp_path), db):
        (folder,) = tmp_path.glob(LEFTOVERS)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


# ------------------------------------------------------------------------- a pipe


class _Endless(io.RawIOBase):
    """A pipe that never ends."""

    def __init__(self, piece: bytes) -> None:
        self._piece = piece
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.bytes_read += size
        return (self._piece * (size // len(self._piece) + 1))[:size]


@pytest.mark.parametrize("piece", [b"y\n", b"\x1f\x8b\x08", b"PAR1"])
def test_a_pipe_of_anything_else_is_refused_at_once(piece: bytes, tmp_path: Path, db: Path) -> None:
    pipe = _Endless(piece)
    with pytest.raises(ExchangeError):
        import_stream(pipe, db)  # type: ignore[arg-type]
    assert pipe.bytes_read < 10_000_000
    assert list(tmp_path.glob(LEFTOVERS)) == []


def test_a_pipe_takes_half_of_the_free_disk_at_most(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=40_000_000))
    with pytest.raises(ExchangeError, match="half of the free disk"):
        import_stream(_Endless(b"[1,"), db)  # type: ignore[arg-type]
    assert list(tmp_path.glob(LEFTOVERS)) == []


def test_memory_is_given_as_a_size(tmp_path: Path, db: Path) -> None:
    from tests.cli.commands import start

    done = start("import", tmp_path / "x.json", "--memory", "much", "--db", db)
    assert done.status == 2 and "is not a size" in done.err
    assert issubclass(UsageError, ValueError) and os.name == "posix"
