"""Cheap, bounded checks of a model's files before any library reads them.

The files may be malicious: a pipe that never ends, a header that declares more
than fits into memory, a sparse file, or a config whose numbers no weights support.
Each is refused in one line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oki_trace.errors import ModelError
from oki_trace.llm.loading.gguf_header import read_gguf_header

_FILE_TYPES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAX_ENTRIES = 10_000
_MB = 1_000_000
# The largest published ones: a config of 1 MB, a tokenizer of 35 MB, an index of 20 MB.
_MAX_BYTES = {"config.json": 16 * _MB, ".jinja": 4 * _MB}
_MAX_TEXT_BYTES = 150 * _MB
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".py")
# The files that are read next to a GGUF file, whose folder may hold anything else.
_NEXT_TO_GGUF = (
    *("config.json", "generation_config.json", "adapter_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)
_MAX_HEADER_BYTES = 16 * _MB
# A file with a smaller share of its bytes on the disk counts as sparse.
_MIN_SHARE = 0.25

# The largest number that is accepted, by the end of its name in the config: four times to a
# thousand times that of the largest model.
_MAX_NUMBERS = (
    (re.compile(r"(layers?|depths?|n_layer|num_blocks|block_count)$"), 2_000),
    (re.compile(r"(heads?|n_head|head_count|head_count_kv|experts?|expert_count)$"), 16_384),
    (re.compile(r"vocab_size$"), 1 << 24),
    (re.compile(r"(hidden_size|n_embd|d_model|embedding_length)$"), 1 << 18),
    (re.compile(r"(intermediate_size|n_inner|d_ff|feed_forward_length)$"), 1 << 22),
)
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|.*\.block_count)$")
_UNREADABLE = (OSError, ValueError, RecursionError)
_FIX = "Copy or download it again, or choose another model."


@dataclass(frozen=True, slots=True)
class Weights:
    """The number of tensors in a model's weight files and their size, by the files' headers."""

    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A file's tensors, the bytes they take, and the length that the file should have."""

    tensors: int
    data_bytes: int
    file_bytes: int


def check_folder(folder: Path) -> Weights | None:
    """Check a model folder; None if its weights are missing or incomplete. Raises ModelError."""
    _check_files(folder)
    # The headers of an incomplete download, and those of an adapter, do not describe the model.
    complete = _has_all_parts(folder) and not (folder / "adapter_config.json").exists()
    headers = [read_safetensors_header(path) for path in sorted(folder.glob("*.safetensors"))]
    found = [header for header in headers if header is not None and header.tensors]
    weights = None
    if complete and found and len(found) == len(headers):
        weights = Weights(sum(h.tensors for h in found), sum(h.data_bytes for h in found))
    config = folder / "config.json"
    if config.is_file():
        check_numbers(read_json(config), str(config), weights)
    return weights


def check_gguf(path: Path) -> Weights:
    """Check a GGUF file and the files that are read with it. Raises ModelError."""
    for name in _NEXT_TO_GGUF:
        _check_file(path.with_name(name))
    _refuse_sparse(path)
    try:
        header = read_gguf_header(path)
    except ValueError as error:
        raise ModelError(f"{path} {error}. Download it again, or name another.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    size = path.stat().st_size
    if header.elements > 16 * size:
        raise ModelError(
            f"{path} is truncated ({size:,} bytes for {header.elements:,} weights). {_FIX}"
        )
    weights = Weights(header.tensors, size)
    check_numbers(header.numbers, str(path), weights)
    return weights


def check_numbers(config: Any, name: str, weights: Weights | None) -> None:
    """Refuse a config with numbers that no model has, or more layers than there are weights for."""
    for key, value, of_text in _numbers(config):
        for pattern, most in _MAX_NUMBERS:
            if pattern.search(key) and value > most:
                raise ModelError(
                    f"{name} says {key} = {value:,}, but no model has more than {most:,}. {_FIX}"
                )
        if weights is not None and of_text and _LAYERS.match(key) and value > weights.tensors:
            raise ModelError(
                f"{name} says {key} = {value:,}, but its weights have {weights.tensors:,} tensors "
                f"in all. {_FIX}"
            )


def _numbers(config: Any, of_text: bool = True, depth: int = 0) -> Iterator[tuple[str, int, bool]]:
    """The whole numbers of a config, and whether each describes the text part."""
    if not isinstance(config, Mapping) or depth > 6:
        return
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, of_text and key == "text_config", depth + 1)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(key), value, of_text


def read_safetensors_header(path: Path) -> SafetensorsHeader | None:
    """The header of a safetensors file; None if it is damaged.

    Raises ModelError for a header larger than any model's, and for a sparse file.
    """
    _refuse_sparse(path)
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            if _MAX_HEADER_BYTES < length <= size:
                raise ModelError(
                    f"{path} has a header of {length:,} bytes, but no model needs more than "
                    f"{_MAX_HEADER_BYTES:,}. {_FIX}"
                )
            if length > size:
                return None
            header = json.loads(stream.read(length))
        ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
    except (*_UNREADABLE, struct.error, LookupError, TypeError, AttributeError):
        return None
    data_bytes = max(ends, default=0)
    return SafetensorsHeader(len(ends), data_bytes, 8 + int(length) + data_bytes)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except _UNREADABLE:
        return None


def parts_of_index(index: Path) -> set[str] | None:
    """The weight files that an index lists; None if it is damaged."""
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, Mapping) else None
    return {str(name) for name in parts.values()} if isinstance(parts, Mapping) else None


# ---------------------------------------------------------------- files


def _check_files(folder: Path) -> None:
    """Check every file of a folder that may belong to a model."""
    templates = folder / "additional_chat_templates"
    for place in (folder, templates) if templates.is_dir() else (folder,):
        with os.scandir(place) as entries:
            for number, entry in enumerate(entries):
                if number >= _MAX_ENTRIES:
                    raise ModelError(f"{place} has more than {_MAX_ENTRIES:,} files. {_FIX}")
                if entry.name.endswith((*_TEXTS, *_WEIGHTS)):
                    _check_file(Path(entry.path))


def _check_file(path: Path) -> None:
    """Refuse anything but a file or a folder, and a text file larger than any model's."""
    try:
        status = path.stat()
    except OSError:
        return  # missing, or a broken link
    file_type = _FILE_TYPES.get(stat.S_IFMT(status.st_mode))
    if file_type is not None:
        raise ModelError(f"{path} is {file_type}, but a model has only regular files. {_FIX}")
    if path.suffix in _TEXTS and stat.S_ISREG(status.st_mode):
        most = _MAX_BYTES.get(path.name, _MAX_BYTES.get(path.suffix, _MAX_TEXT_BYTES))
        if status.st_size > most:
            raise ModelError(
                f"{path} has {status.st_size:,} bytes, but no model needs more than {most:,}. "
                f"{_FIX}"
            )


def _has_all_parts(folder: Path) -> bool:
    """Whether every listed weight file exists. Refuses an index that leads out of the folder."""
    complete = True
    for index in folder.glob("*.index.json"):
        for name in parts_of_index(index) or ():
            if name != Path(name).name:
                raise ModelError(f"{index} names {name}, which is not in the folder. {_FIX}")
            complete = complete and (folder / name).is_file()
    return complete


def _refuse_sparse(path: Path) -> None:
    """Refuse a file that is mostly holes: it takes no space until it is read."""
    size = path.stat().st_size
    stored = _stored_bytes(path, size)
    if stored < size * _MIN_SHARE:
        raise ModelError(
            f"{path} is incomplete: only {stored:,} of its {size:,} bytes are on the disk. {_FIX}"
        )


def _stored_bytes(path: Path, size: int) -> int:
    """The bytes of a file that are on the disk; its size if the system does not tell."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    stored = at = 0
    with path.open("rb") as stream:
        number = stream.fileno()
        try:
            while at < size and stored < size * _MIN_SHARE:
                begin = os.lseek(number, at, os.SEEK_DATA)
                at = os.lseek(number, begin, os.SEEK_HOLE)
                stored += at - begin
        except OSError as error:
            # ENXIO: only a hole follows. Other errors: the file system does not tell.
            return stored if error.errno == errno.ENXIO else size
    return stored
