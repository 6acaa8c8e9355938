"""Explains why a model could not be loaded, in one line that names the fix.

transformers, the hub client, safetensors and torch each raise their own
errors, many a paragraph long and some misleading (a mistyped folder is looked
up on the hub). The files and the error's chain of causes are examined only
after loading has failed, so a load that works pays nothing for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from oki_trace.errors import ModelError, OkiTraceError
from oki_trace.llm.failures import first_line, is_out_of_memory
from oki_trace.llm.loading.file_checks import parts_of_index, read_json, read_safetensors_header
from oki_trace.llm.loading.locate import Source, snapshot

_DECODER_ONLY = "Choose a decoder-only model that generates text."


def explain(error: BaseException, source: Source, cache_dir: str | None = None) -> ModelError:
    """The :class:`ModelError` to raise from ``error``."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OkiTraceError):
            return cause if isinstance(cause, ModelError) else ModelError(str(cause))
    name = source.model_id
    return ModelError(
        _memory(chain, name)
        or _files(source, cache_dir)
        or (_hub(chain, name) if source.is_hub else None)
        or _model_type(" ".join(str(cause) for cause in chain), name)
        or _missing_package(chain, name)
        or f"{name} cannot be loaded: {type(error).__name__}: {first_line(error, 200)}. "
        "Run again with --debug to see where, or choose another model."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _memory(chain: list[BaseException], name: str) -> str | None:
    if not any(map(is_out_of_memory, chain)):
        return None
    return (
        f"There is not enough memory to load {name}. Close other programs, load it in "
        "4-bit (--4bit) or 16-bit (--dtype bfloat16), or choose a smaller model."
    )


# ---------------------------------------------------------------- files


def _files(source: Source, cache_dir: str | None) -> str | None:
    """The problem with the files themselves, if they have one."""
    if source.folder is not None:
        gguf = source.gguf
        return _folder(source.folder) if gguf is None else _gguf(source.folder / gguf)
    folder = snapshot(source.path, cache_dir)
    damage = _damage(folder) if folder is not None else None
    return f"{damage} Delete {folder} and download it again." if damage else None


def _folder(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"name the file itself: {ggufs[0]}" if ggufs else "name the folder that holds it"
        return f"{folder} has no config.json, so it is not a model folder: {hint}."
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            return (
                f"{folder} holds its weights as pickle (.bin), which can run code when opened; "
                "only safetensors is read. Convert it with save_pretrained, or fetch a version "
                "in safetensors."
            )
        return f"{folder} has no *.safetensors file. Copy or download the weights into it."
    damage = _damage(folder)
    return f"{damage} Copy or download it again." if damage else None


def _damage(folder: Path) -> str | None:
    """The first file that is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = parts_of_index(index)
        if parts is None:
            return f"{index} is damaged."
        missing = sorted(part for part in parts if not (folder / part).is_file())
        if missing:
            return f"{folder} lacks {missing[0]} ({len(missing)} of {len(parts)} parts missing)."
    for weights in sorted(folder.glob("*.safetensors")):
        size, header = weights.stat().st_size, read_safetensors_header(weights)
        if header is None:
            return f"{weights} is not a complete safetensors file ({size:,} bytes)."
        if size < header.file_bytes:
            return f"{weights} is truncated: {size:,} of {header.file_bytes:,} bytes."
    config = folder / "config.json"
    return f"{config} is not valid JSON." if read_json(config) is None else None


def _gguf(path: Path) -> str | None:
    from gguf import GGUFReader

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return f"{path} is not a GGUF file. Download it again, or name another."
    try:
        tensors = GGUFReader(path).tensors
        whole = all(tensor.data.nbytes == tensor.n_bytes for tensor in tensors)
    except Exception:  # the reader raises NumPy's errors about the mapped file
        whole = False
    if whole:
        return None
    return f"{path} is truncated ({path.stat().st_size:,} bytes). Copy or download it again."


# ---------------------------------------------------------------- the hub


def _hub(chain: list[BaseException], name: str) -> str | None:
    from huggingface_hub import errors, is_offline_mode

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    text = " ".join(str(cause) for cause in chain)
    if any_of(errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its hub page, then sign in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if any_of(errors.RepositoryNotFoundError, errors.HFValidationError):
        return (
            f"There is no folder {name} here and no model of that name on the hub. Check the "
            "spelling; for a private model sign in with `hf auth login`."
        )
    if any_of(errors.RevisionNotFoundError):
        return f"{name} has no main revision on the hub. Download it, and name the folder."
    if "safetensors" in text and "does not appear to have" in text:
        return (
            f"{name} has no safetensors weights on the hub, and only safetensors is read. "
            "Choose a model or a conversion that has them."
        )
    if any_of(errors.OfflineModeIsEnabled) or (
        is_offline_mode() and any_of(errors.LocalEntryNotFoundError, OSError)
    ):
        cause, fix = "HF_HUB_OFFLINE is set", "Unset it to download the model"
    elif any_of(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or "connect" in text:
        cause, fix = "the hub cannot be reached", "Check the network or HF_ENDPOINT"
    elif any_of(errors.RemoteEntryNotFoundError) or "config.json" in text:
        reason = "has no config.json, so it is not a transformers model"
        return f"{name} on the hub {reason}. {_DECODER_ONLY}"
    else:
        return None
    return (
        f"{name} is not in the hub's cache and {cause}. {fix}, or name a local folder or smollm2."
    )


# ---------------------------------------------------------------- the type of model


def _model_type(text: str, name: str) -> str | None:
    if "trust_remote_code" in text:
        return (
            f"{name} needs its own code, which oki-trace does not run. Read that code, then pass "
            "trust_remote_code=True, or choose a model that transformers knows."
        )
    unknown = re.search(r"model type `([^`]+)`", text)
    if unknown:
        import transformers

        return (
            f"{name} is of type {unknown[1]!r}, unknown to transformers "
            f"{transformers.__version__}. Run `pip install --upgrade transformers`."
        )
    if "Unrecognized model in" in text or "should have a `model_type`" in text.lower():
        return f"{name} has a config.json that names no model_type. Copy or download it again."
    architecture = re.search(r"GGUF model with architecture (\S+)", text)
    if architecture:
        return (
            f"{name} holds a {architecture[1]} model, which transformers cannot read from GGUF. "
            "Use its safetensors version."
        )
    if "Unrecognized configuration class" in text:
        return f"{name} is not a causal language model. {_DECODER_ONLY}"
    return None


def _missing_package(chain: list[BaseException], name: str) -> str | None:
    missing = next((cause for cause in chain if isinstance(cause, ImportError)), None)
    if missing is None:
        return None
    return f"{name} needs a package that is not installed: {first_line(missing)}"
