"""The files that an import reads: only regular files, each opened once.

Nothing in a file names a place to read or write, and a zip unpacks to no more
than a multiple of its own size.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from oki_trace.errors import ExchangeError
from oki_trace.exchange.refusal import refused

# A zip may hold this many times its own size: Parquet is compressed already.
MAX_UNPACKED_RATIO = 20
MAX_UNPACKED_FLOOR = 100_000_000
CHUNK = 1 << 20


@contextmanager
def opened(path: Path, *, follow: bool) -> Iterator[BinaryIO]:
    """A regular file; a pipe or a device might never end. ``follow``: links are followed.

    Raises ExchangeError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not follow and path.is_symlink():
            raise ExchangeError(f"{path} is a link. Replace it with the file itself.")
        handle = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ExchangeError(f"{path} is not a file. Pipe its content into: import -")
            yield file
    except OSError as error:
        raise ExchangeError(
            f"Cannot read {path}: {error.strerror or error}. Give a file or folder of an export."
        ) from error


def refuse_unreadable(start: bytes) -> None:
    """Refuse a file whose first ``CHUNK`` cannot be of an export, and say what it is."""
    if start[:4] == b"PAR1":
        raise refused("it is one table of an export: import its folder")
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd":
        raise refused("it is compressed: decompress it first")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if not is_zip(start) and text[:1] not in (b"{", b"[") and (text or len(start) < CHUNK):
        raise refused("it is not an oki-trace export")


def is_zip(start: bytes) -> bool:
    """By the first bytes of a file."""
    return start[:2] == b"PK"


def unpack(file: BinaryIO, folder: Path, names: frozenset[str], pulse: Callable[[], None]) -> None:
    """Unpack the tables of a zip, at its top or in one folder of it; all are of ``names``."""
    size = os.fstat(file.fileno()).st_size
    most = MAX_UNPACKED_FLOOR + MAX_UNPACKED_RATIO * size
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > len(names):
                raise refused("the zip holds more files than an export has")
            for member in members:
                name = _table_name(member)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise refused("the zip uses a compression other than deflate")
                if name not in names or (folder / name).exists():
                    raise refused(f"the zip holds {member.filename[:80]!r}, which is not a table")
                # The bytes that come out count, not the size that the zip states.
                with archive.open(member) as source, (folder / name).open("xb") as target:
                    while chunk := source.read(CHUNK):
                        pulse()
                        most -= len(chunk)
                        if most < 0:
                            raise refused("the zip unpacks to far more than an export would")
                        target.write(chunk)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise refused(f"the zip is damaged or encrypted ({error})") from error
    except (NotImplementedError, ValueError) as error:
        raise refused(f"the zip uses an unsupported feature ({error})") from error


def _table_name(member: zipfile.ZipInfo) -> str:
    path = PurePosixPath(member.filename)
    escapes = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if escapes or is_link or len(path.parts) > 2:
        raise refused(f"the zip holds {member.filename[:80]!r}, whose path is not that of a table")
    return path.name
