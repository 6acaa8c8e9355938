"""The installed lenses: a folder for each, beside the models.

``lens.json`` says what a lens was fitted on, ``maps.safetensors`` has its maps as
``weight.LAYER`` and ``bias.LAYER``. A folder exists only if it is complete: it is written
under another name and then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from oki_trace.errors import ModelError, UsageError
from oki_trace.llm.lenses.files import FittedOn, Kind, read_lens
from oki_trace.llm.lenses.transport import Transport
from oki_trace.records import require_lens_name
from oki_trace.settings import Settings

_RECORD = "lens.json"
_MAPS = "maps.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class InstalledLens:
    """An installed lens: its name, what it was made from, and its size on disk.

    ``layers`` are those that it has a map for, 0 being the embedding.
    """

    name: str
    kind: Kind
    fitted: FittedOn
    layers: tuple[int, ...]
    source: str
    bytes: int


def lenses_dir() -> Path:
    """The folder of the installed lenses."""
    return Settings.from_environment().lenses_dir


def add(source: str, name: str | None = None, folder: Path | None = None) -> InstalledLens:
    """Install a lens from a file, a folder, or a hub id with the path inside the repository.

    Raises UsageError for a name that is taken or no name, ModelError for a lens that cannot
    be found or read.
    """
    from safetensors.torch import save_file

    from oki_trace.llm.lenses.hub import fetch

    folder = folder or lenses_dir()
    path = Path(source).expanduser()
    if not path.exists():
        path = fetch(source)
    name = name or _name_of(source)
    require_lens_name(name)
    if (folder / name).exists():
        raise UsageError(
            f"A lens {name} is installed already. Choose another --name, or remove it first."
        )
    lens = read_lens(path)
    tensors = {f"weight.{layer}": w.contiguous() for layer, w in lens.weights.items()}
    tensors |= {f"bias.{layer}": b.contiguous() for layer, b in lens.biases.items()}
    record = {
        "version": _VERSION,
        "kind": lens.kind,
        "fitted": asdict(lens.fitted),
        "layers": sorted(lens.weights),
        "source": source,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".adding-", dir=folder) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            save_file(tensors, made / _MAPS)
            text = json.dumps(record, indent=2, ensure_ascii=True)
            (made / _RECORD).write_text(text + "\n", encoding="utf-8")
            made.rename(folder / name)
    except OSError as error:
        raise ModelError(
            f"The lens cannot be written to {folder}: {error.strerror or error}. Free some space "
            "there, or make the folder writable."
        ) from error
    return installed(name, folder)


def _name_of(source: str) -> str:
    """A name made from that of the file or folder."""
    stem = source.rstrip("/").replace("\\", "/").rpartition("/")[2].lower().removesuffix(".pt")
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:63]


def installed(name: str, folder: Path | None = None) -> InstalledLens:
    """The lens of this name. Raises UsageError if there is none, ModelError if it is damaged."""
    require_lens_name(name)
    folder = folder or lenses_dir()
    path = folder / name
    if not path.is_dir():
        names = ", ".join(one.name for one in all_installed(folder)) or "none"
        raise UsageError(
            f"No lens {name} is installed in {folder} (installed: {names}). Install it with "
            "`oki-trace lens add`."
        )
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if record["version"] != _VERSION:
            raise ValueError(f"version {record['version']}")
        size = sum(one.stat().st_size for one in path.iterdir())
        return InstalledLens(
            name,
            record["kind"],
            FittedOn(**record["fitted"]),
            tuple(record["layers"]),
            str(record["source"]),
            size,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The installed lens {name} cannot be read ({error}). Remove it with `oki-trace lens "
            f"remove {name}`, and add it again."
        ) from error


def require_installed(names: Iterable[str]) -> tuple[str, ...]:
    """The names. Raises UsageError for one that no installed lens has, ModelError as ``installed``.

    Called before a reply is queued, so that none begins that must fail.
    """
    if isinstance(names, str):
        raise UsageError("lenses is a list of names, not one text.")
    return tuple(installed(name).name for name in names)


def all_installed(folder: Path | None = None) -> list[InstalledLens]:
    """All lenses that can be read, by name."""
    folder = folder or lenses_dir()
    lenses = []
    for path in sorted(folder.glob("*/" + _RECORD)):
        try:
            lenses.append(installed(path.parent.name, folder))
        except (ModelError, UsageError):
            continue  # a folder that is no lens, or a damaged one; naming it says why
    return lenses


def remove(name: str, folder: Path | None = None) -> None:
    """Remove an installed lens; what it has read stays. Raises UsageError if there is none."""
    require_lens_name(name)
    path = (folder or lenses_dir()) / name
    if not path.is_dir():
        installed(name, folder)
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise ModelError(
            f"The lens {name} cannot be removed: {error.strerror or error}. Make {path} writable."
        ) from error


def load_transport(name: str, folder: Path | None = None) -> Transport:
    """The maps of an installed lens. Raises as ``installed``."""
    lens = installed(name, folder)
    path = (folder or lenses_dir()).absolute() / name / _MAPS
    try:
        return _transport(lens, path, path.stat().st_mtime_ns)
    # safetensors raises an error class of its own, derived from Exception.
    except Exception as error:
        raise ModelError(
            f"The maps of the lens {name} cannot be read ({type(error).__name__}: {error}). Remove "
            f"it with `oki-trace lens remove {name}`, and add it again."
        ) from error


@lru_cache(maxsize=4)
def _transport(lens: InstalledLens, path: Path, changed: int) -> Transport:
    """Kept from one reply to the next; ``changed`` tells a lens that was added again."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    by_kind = {
        kind: {
            int(key.removeprefix(kind)): tensor
            for key, tensor in tensors.items()
            if key.startswith(kind)
        }
        for kind in ("weight.", "bias.")
    }
    return Transport(lens.name, lens.kind, lens.fitted, by_kind["weight."], by_kind["bias."])
