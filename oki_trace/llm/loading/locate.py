"""Resolves a model's name to the built-in model, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from oki_trace.errors import ModelError
from oki_trace.llm.loading.load_progress import Progress, no_progress
from oki_trace.llm.loading.smollm2 import ensure_smollm2
from oki_trace.settings import BUILTIN_MODEL, Settings

# How llama.cpp names the parts of a model.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z", re.IGNORECASE)
# A name that can only be a path: owner/name and a bare name may be hub ids.
_PATH = re.compile(r"[./~]|.*\\|.*/.*/|[A-Za-z]:|.*/\Z|.*\.(gguf|safetensors)\Z", re.I | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is read from: a hub id, or a folder, or a GGUF file in a folder."""

    model_id: str
    path: str
    folder: Path | None = None
    gguf: str | None = None

    @property
    def is_hub(self) -> bool:
        return self.folder is None


def locate(
    model_id: str, models_dir: Path | None = None, progress: Progress = no_progress
) -> Source:
    """Where ``model_id`` is read from; a folder that exists takes precedence over a hub id."""
    if not model_id.strip():
        raise ModelError("The model's name is empty. Name a hub id, a folder, or smollm2.")
    if model_id == BUILTIN_MODEL:
        folder = ensure_smollm2(models_dir or Settings.from_environment().models_dir, progress)
        return Source(model_id, str(folder), folder)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return Source(model_id, str(path), path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            _refuse_part(path)
            return Source(model_id, str(path.parent), path.parent, path.name)
        raise ModelError(
            f"{model_id} is a file, not a model. Name the folder that holds it, or a .gguf file."
        )
    if path.exists():
        raise ModelError(f"{model_id} is neither a file nor a folder. Name a model's folder.")
    if _PATH.match(model_id):
        raise ModelError(
            f"There is no {model_id} here (looked in {Path.cwd()}). Check the path; a hub id has "
            "the form owner/name."
        )
    return Source(model_id, model_id)


def snapshot(model_id: str, cache_dir: str | None) -> Path | None:
    """The folder of the hub's cache that holds this model, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model_id, "config.json", cache_dir=cache_dir)
    except ValueError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _refuse_part(path: Path) -> None:
    """Refuse a part of a GGUF file: transformers reads a model from one file alone."""
    part = _PART.search(path.name)
    if part is None or int(part[2]) < 2:
        return
    name = path.name[: part.start()]
    raise ModelError(
        f"{path} is one of {int(part[2])} parts of a model, but only a single file can be read. "
        "Join them with llama.cpp's `llama-gguf-split --merge "
        f"{name}-{1:05}-of-{part[2]}.gguf {name}.gguf`, and name {name}.gguf."
    )
