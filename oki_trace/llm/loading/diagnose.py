"""Why a model could not be loaded, in one line that names the fix.

transformers, the hub client, safetensors and torch each raise their own
errors, many a paragraph long and some about something else altogether (a
mistyped folder is looked up on the hub). Loading pays nothing for this: only
after it failed are the files looked at and the error's chain of causes read.
"""

from __future__ import annotations

import errno
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from oki_trace.errors import ModelError, OkiTraceError
from oki_trace.llm.loading.locate import Source, snapshot

_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory|paging file", re.I)
_LEARN = "Choose a decoder-only model that generates text."


def explain(error: BaseException, source: Source, cache_dir: str | None = None) -> ModelError:
    """The :class:`ModelError` to raise from ``error``."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, ModelError):
            return cause
        if isinstance(cause, OkiTraceError):
            return ModelError(str(cause))
    name = source.model_id
    sentence = (
        _memory(chain, name)
        or _files(source, cache_dir)
        or (_hub(chain, name) if source.is_hub else None)
        or _kind(" ".join(str(cause) for cause in chain), name)
        or _missing_package(chain, name)
    )
    if sentence is None:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        sentence = (
            f"{name} cannot be loaded: {type(error).__name__}: {first[:200]}. "
            "Run again with --debug to see where, or choose another model."
        )
    return ModelError(sentence)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# ---------------------------------------------------------------- memory


def _memory(chain: list[BaseException], name: str) -> str | None:
    for cause in chain:
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, RuntimeError) and _MEMORY.search(str(cause)))
        ):
            return (
                f"There is not enough memory to load {name}. Close other programs, load it in "
                "4-bit (--4bit) or 16-bit (--dtype bf16), or choose a smaller model."
            )
    return None


# ---------------------------------------------------------------- files


def _files(source: Source, cache_dir: str | None) -> str | None:
    """What is wrong with the files themselves, if anything is."""
    if source.folder is not None and source.gguf is not None:
        return _gguf(source.folder / source.gguf)
    if source.folder is not None:
        return _folder(source.folder)
    here = snapshot(source.path, cache_dir)
    damage = _damage(here) if here is not None else None
    return f"{damage} Delete {here} and download it again." if damage else None


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
    """The first weight file that is missing or is not whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index} is damaged."
        missing = sorted(shard for shard in named if not (folder / shard).is_file())
        if missing:
            return f"{folder} lacks {missing[0]} ({len(missing)} of {len(named)} parts missing)."
    for weights in sorted(folder.glob("*.safetensors")):
        size = weights.stat().st_size
        expected = safetensors_bytes(weights)
        if expected is None:
            return f"{weights} is not a whole safetensors file ({size:,} bytes)."
        if size < expected:
            return f"{weights} is cut short: {size:,} of {expected:,} bytes."
    config = folder / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{config} is not valid JSON."
    return None


def safetensors_bytes(path: Path) -> int | None:
    """The length the file's own header promises; None if there is no readable header."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return None
        (length,) = struct.unpack("<Q", prefix)
        if length > 1 << 24:
            return None
        try:
            header = json.loads(stream.read(length))
            ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return 8 + int(length) + max(ends, default=0)


def _gguf(path: Path) -> str | None:
    from gguf import GGUFReader

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return f"{path} is not a GGUF file. Download it again, or name another."
    try:
        tensors = GGUFReader(path).tensors
        whole = all(tensor.data.nbytes == tensor.n_bytes for tensor in tensors)
    except Exception:  # the reader lets NumPy's errors about the mapped file through
        whole = False
    if whole:
        return None
    return f"{path} is cut short ({path.stat().st_size:,} bytes). Copy or download it again."


# ---------------------------------------------------------------- the hub


def _hub(chain: list[BaseException], name: str) -> str | None:
    from huggingface_hub import errors, is_offline_mode

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

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
    text = " ".join(str(cause) for cause in chain)
    if "safetensors" in text and "does not appear to have" in text:
        return (
            f"{name} has no safetensors weights on the hub, and only safetensors is read. "
            "Choose a model, or a conversion of it, that has them."
        )
    if any_of(errors.OfflineModeIsEnabled) or (
        is_offline_mode() and any_of(errors.LocalEntryNotFoundError, OSError)
    ):
        return (
            f"{name} is not in the hub's cache and HF_HUB_OFFLINE is set. Unset it to download "
            "the model, or name a local folder or smollm2."
        )
    if any_of(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or "connect" in text:
        return (
            f"{name} is not in the hub's cache and the hub cannot be reached. Check the network "
            "or HF_ENDPOINT, or name a local folder or smollm2."
        )
    if any_of(errors.RemoteEntryNotFoundError) or "config.json" in text:
        return f"{name} on the hub has no config.json, so it is not a transformers model. {_LEARN}"
    return None


# ---------------------------------------------------------------- the model's kind


def _kind(text: str, name: str) -> str | None:
    if "trust_remote_code" in text:
        return (
            f"{name} runs code of its own, which is off. Read that code, then pass "
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
        return f"{name} is not a causal language model. {_LEARN}"
    return None


def _missing_package(chain: list[BaseException], name: str) -> str | None:
    for cause in chain:
        if isinstance(cause, ImportError):
            first = next((s for s in str(cause).splitlines() if s.strip()), "a package is missing")
            return f"{name} needs a package that is not installed: {first.strip()[:160]}"
    return None
