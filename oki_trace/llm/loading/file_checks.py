"""A model's files, looked at before any library reads them: cheaply, and with bounds.

Whoever made the files may want to harm those who load them: with a pipe that never
ends, a header that declares what no memory holds, a file of holes, or a config whose
numbers no weights stand behind. Each is refused here in one line.
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
from oki_trace.llm.loading.gguf_header import read_header

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MOST_ENTRIES = 10_000
_MB = 1_000_000
# The largest there are: a config of 1 MB, a tokenizer of 35 MB, an index of 20 MB.
_MOST_BYTES = {"config.json": 16 * _MB, ".jinja": 4 * _MB}
_MOST_TEXT_BYTES = 150 * _MB
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".py")
# What is read beside a GGUF file. Its folder may hold anything else.
_BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)
_MOST_HEADER_BYTES = 16 * _MB
# A file of which less than this share is on the disk is one of holes.
_LEAST_SHARE = 0.25

# What is refused of a config's numbers, by the end of their names. Four times to a
# thousand times what the largest model has.
_MOST_OF = (
    (re.compile(r"(layers?|depths?|n_layer|num_blocks|block_count)$"), 2_000),
    (re.compile(r"(heads?|n_head|head_count|head_count_kv|experts?|expert_count)$"), 16_384),
    (re.compile(r"vocab_size$"), 1 << 24),
    (re.compile(r"(hidden_size|n_embd|d_model|embedding_length)$"), 1 << 18),
    (re.compile(r"(intermediate_size|n_inner|d_ff|feed_forward_length)$"), 1 << 22),
)
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|.*\.block_count)$")
_AGAIN = "Copy or download it again, or choose another model."


@dataclass(frozen=True, slots=True)
class Weights:
    """What the weight files of a model hold, by their headers: how many tensors, how many bytes."""

    tensors: int
    bytes: int


def sound_folder(folder: Path) -> Weights | None:
    """Look at a model folder; None where it has no weights. Raises ModelError."""
    _plain_files(folder)
    config = folder / "config.json"
    whole = _index_is_here(folder)
    found = [safetensors_header(path) for path in sorted(folder.glob("*.safetensors"))]
    weights = None
    # What is damaged, not downloaded yet, or an adapter's, says nothing of the others.
    if whole and found and all(found) and not (folder / "adapter_config.json").exists():
        weights = Weights(sum(map(len, found)), sum(map(_bytes_of, found)))
    if config.is_file():
        sound_numbers(_json(config), str(config), weights)
    return weights


def sound_gguf(path: Path) -> Weights:
    """Look at a GGUF file and what stands beside it. Raises ModelError."""
    for name in _BESIDE:
        _plain(path.with_name(name))
    _is_on_disk(path)
    try:
        header = read_header(path)
    except ValueError as error:
        raise ModelError(f"{path} {error}. Download it again, or name another.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    size = path.stat().st_size
    if header.elements > 16 * size:
        raise ModelError(
            f"{path} is cut short ({size:,} bytes for {header.elements:,} weights). {_AGAIN}"
        )
    weights = Weights(header.tensors, size)
    sound_numbers(header.numbers, str(path), weights)
    return weights


def sound_numbers(config: Any, name: str, weights: Weights | None) -> None:
    """Refuse a config whose numbers no model has, or not with these weights."""
    for key, value, inner in _numbers(config):
        for pattern, most in _MOST_OF:
            if pattern.search(key) and value > most:
                raise ModelError(
                    f"{name} says {key} = {value:,}, and no model has more than {most:,}. {_AGAIN}"
                )
        if weights is not None and not inner and _LAYERS.match(key) and value > weights.tensors:
            raise ModelError(
                f"{name} says {key} = {value:,}, and its weights have {weights.tensors:,} tensors "
                f"in all. {_AGAIN}"
            )


def _numbers(config: Any, depth: int = 0) -> Iterator[tuple[str, int, bool]]:
    """The whole numbers of a config, and whether each is another part's than the text's."""
    if not isinstance(config, Mapping) or depth > 6:
        return
    for key, value in config.items():
        if isinstance(value, Mapping):
            for name, number, inner in _numbers(value, depth + 1):
                yield name, number, inner or key != "text_config"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(key), value, False


def safetensors_header(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file names, by name. Empty where its header is damaged.

    Raises ModelError for one that would take more memory than a header should, or
    whose tensors are not on the disk.
    """
    _is_on_disk(path)
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            if _MOST_HEADER_BYTES < length <= size:
                raise ModelError(
                    f"{path} has a header of {length:,} bytes, and no model needs more than "
                    f"{_MOST_HEADER_BYTES:,}. {_AGAIN}"
                )
            header = json.loads(stream.read(length)) if length <= size else {}
    except (ValueError, RecursionError, struct.error, OSError):
        return {}  # what is wrong with it is said when it is read (``diagnose``)
    if not isinstance(header, dict):
        return {}
    return {name: value for name, value in header.items() if name != "__metadata__"}


def _bytes_of(header: Mapping[str, Any]) -> int:
    ends = [value.get("data_offsets") for value in header.values() if isinstance(value, Mapping)]
    whole = [end[1] for end in ends if isinstance(end, list) and len(end) == 2]
    return max((end for end in whole if isinstance(end, int)), default=0)


# ---------------------------------------------------------------- files


def _plain_files(folder: Path) -> None:
    """Look at all files of a folder that a model may be read from."""
    inner = folder / "additional_chat_templates"
    for place in (folder, inner) if inner.is_dir() else (folder,):
        with os.scandir(place) as entries:
            for number, entry in enumerate(entries):
                if number >= _MOST_ENTRIES:
                    raise ModelError(f"{place} has more than {_MOST_ENTRIES:,} files. {_AGAIN}")
                if entry.name.endswith((*_TEXTS, *_WEIGHTS)):
                    _plain(Path(entry.path))


def _plain(path: Path) -> None:
    """Refuse what is neither a file nor a folder, and a text of a size that no model has."""
    try:
        found = path.stat()
    except OSError:
        return  # a link that leads nowhere: missing, if it is asked for at all
    kind = _KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is not None:
        raise ModelError(f"{path} is {kind}, and a model's files are plain ones. {_AGAIN}")
    if path.suffix in _TEXTS and stat.S_ISREG(found.st_mode):
        most = _MOST_BYTES.get(path.name, _MOST_BYTES.get(path.suffix, _MOST_TEXT_BYTES))
        if found.st_size > most:
            raise ModelError(
                f"{path} has {found.st_size:,} bytes, and no model needs more than {most:,}. "
                f"{_AGAIN}"
            )


def _index_is_here(folder: Path) -> bool:
    """Whether all that an index names is here; one that leads out of the folder is refused."""
    whole = True
    for index in folder.glob("*.index.json"):
        named = _json(index)
        parts = named.get("weight_map") if isinstance(named, Mapping) else None
        for name in set(map(str, parts.values())) if isinstance(parts, Mapping) else ():
            if name != Path(name).name:
                raise ModelError(f"{index} names {name}, which is not in the folder. {_AGAIN}")
            whole = whole and (folder / name).is_file()
    return whole


def _is_on_disk(path: Path) -> None:
    """Refuse a file that is mostly holes: zeros that take no room until they are read."""
    size = path.stat().st_size
    held = _held(path, size)
    if held < size * _LEAST_SHARE:
        raise ModelError(
            f"{path} is not whole: of its {size:,} bytes {held:,} are on the disk, the others are "
            f"holes. {_AGAIN}"
        )


def _held(path: Path, size: int) -> int:
    """How many bytes of a file are on the disk; all of them where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    held = at = 0
    with path.open("rb") as stream:
        number = stream.fileno()
        try:
            while at < size and held < size * _LEAST_SHARE:
                begin = os.lseek(number, at, os.SEEK_DATA)
                at = os.lseek(number, begin, os.SEEK_HOLE)
                held += at - begin
        except OSError as error:
            # ENXIO: nothing but a hole follows. Else the file system knows of none.
            return held if error.errno == errno.ENXIO else size
    return held


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # said when it is read
