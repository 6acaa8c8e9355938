"""Reads the files of published lenses: Jacobian lenses and Tuned Lenses.

A lens maps the residual stream of a layer to the basis of the last one:

- Jacobian lens (Gurnee et al. 2026): a torch file of a dict with ``J`` {source layer: (width,
  width)}, ``source_layers``, ``n_prompts``, ``d_model`` and, in newer files, ``provenance``.
  ``J[l] @ h`` reads h, the output of block l counted from 0, that is layer l + 1.
- Tuned Lens (Belrose et al. 2023): a folder with ``config.json`` and ``params.pt``, a torch
  file of ``{l}.weight`` (width, width) and ``{l}.bias`` (width,). ``h + W_l h + b_l`` reads
  entry l of transformers' ``hidden_states``, the input of block l counted from 0, that is
  layer l: 0 is the embedding, and there are as many maps as blocks.

Such a file comes from anywhere. Before torch reads it, its zip is checked: nothing
compressed, so it holds no more than its size, and a pickle that names nothing but tensors,
each of the size that the zip has for it.
The tensors are mapped, not read, until their shapes are known to be right.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oki_trace.errors import ModelError

Kind = Literal["jacobian", "tuned"]

MAX_FILE_BYTES = 2**35
MAX_PICKLE_BYTES = 2**20
MAX_CONFIG_BYTES = 2**20
MAX_WIDTH = 2**16
MAX_LAYERS = 1024
MAX_TEXT = 500
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEYS = {"J", "source_layers", "n_prompts", "d_model", "provenance"}
# What the pickle of tensors in plain dicts names; torch's own list allows more than that,
# such as a byte array of any length.
_ITEM_BYTES = {
    **{f"{kind}Storage": 1 for kind in ("Byte", "Char", "Bool")},
    **{f"{kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"{kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"{kind}Storage": 8 for kind in ("Double", "Long")},
}
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch Size",
    *(f"torch {kind}" for kind in _ITEM_BYTES),
    *(f"torch {str(dtype).removeprefix('torch.')}" for dtype in _DTYPES),
}
_OPCODES_OF_CODE = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_TUNED_KEY = re.compile(r"(0|[1-9][0-9]{0,3})\.(weight|bias)")
_NAME_IN_FILE = re.compile(r"(.+?)_jacobian_lens")


@dataclass(frozen=True)
class FittedOn:
    """What a lens was fitted on, as far as its files say.

    ``layers`` is the model's number of blocks, ``unembed_hash`` that of its head (see
    ``unembedding_hash``), ``prompts`` the number of texts.
    """

    model: str | None
    width: int
    layers: int | None = None
    unembed_hash: str | None = None
    prompts: int | None = None
    capture_point: str | None = None

    @property
    def description(self) -> str:
        """In a few words."""
        size = f"width {self.width}"
        if self.layers is not None:
            size += f", {self.layers} layers"
        return f"{self.model or 'a model that its files do not name'} ({size})"


@dataclass(frozen=True, eq=False)
class LensFile:
    """A lens as its authors published it.

    ``weights`` (width, width) and ``biases`` (width,) by layer, 0 being the embedding. A
    "jacobian" reads ``W h``, a "tuned" one ``h + W h + b``.
    """

    kind: Kind
    fitted: FittedOn
    weights: dict[int, Tensor] = field(repr=False)
    biases: dict[int, Tensor] = field(repr=False)


def read_lens(path: Path) -> LensFile:
    """Read a Jacobian lens's file or a Tuned Lens's folder.

    Raises ModelError, in one line, for anything else, and for a file that is damaged or asks
    for more than tensors.
    """
    if path.is_dir():
        return _tuned(path)
    if not path.is_file():
        raise ModelError(f"There is no lens at {path}: name a .pt file, or a Tuned Lens's folder.")
    return _jacobian(path)


def _jacobian(path: Path) -> LensFile:
    content = _load(path)
    if not isinstance(content, dict) or not {"J", "source_layers", "d_model"} <= set(content):
        raise _refusal(path, "it has no J, source_layers and d_model, as a Jacobian lens has")
    unknown = sorted(str(key)[:40] for key in set(content) - _KEYS)
    if unknown:
        raise _refusal(path, f"it has the unknown entry {unknown[0]!r}")
    width = _whole(path, content["d_model"], "d_model", 1, MAX_WIDTH)
    maps, layers = content["J"], content["source_layers"]
    if not isinstance(maps, dict) or not isinstance(layers, (list, tuple)):
        raise _refusal(path, "J is not a dict, or source_layers not a list")
    numbers = [_whole(path, one, "a source layer", 0, MAX_LAYERS) for one in layers]
    if not numbers or numbers != sorted(set(numbers)) or set(maps) != set(numbers):
        raise _refusal(path, "its source_layers are not the layers of J in ascending order")
    for number in numbers:
        _check_tensor(path, f"J of layer {number}", maps[number], (width, width))
    prompts = content.get("n_prompts")
    if prompts is not None:
        prompts = _whole(path, prompts, "n_prompts", 0, 2**62)
    provenance = content.get("provenance")
    point, model = _provenance(path, {} if provenance is None else provenance)
    if model is None and (named := _NAME_IN_FILE.match(path.name)):
        model = named[1]
    # Maps of all layers but the last one say how many there are.
    whole = numbers == list(range(len(numbers)))
    fitted = FittedOn(
        model=model,
        width=width,
        layers=len(numbers) + 1 if whole and len(numbers) > 1 else None,
        prompts=prompts,
        capture_point=point,
    )
    return LensFile("jacobian", fitted, {number + 1: maps[number] for number in numbers}, {})


def _provenance(path: Path, provenance: Any) -> tuple[str, str | None]:
    """The capture point and the model's name."""
    if not isinstance(provenance, dict):
        raise _refusal(path, "its provenance is not a dict")
    point = provenance.get("capture_point", "block_output")
    if point != "block_output":
        raise _refusal(
            path,
            f"it reads {_shown(point)}, and only the residual stream after a block "
            "(block_output) is recorded",
        )
    reduced = provenance.get("stream_reduce")
    if reduced not in (None, "", "none", "identity"):
        raise _refusal(path, f"it reads several residual streams (stream_reduce {_shown(reduced)})")
    names = (provenance.get(key) for key in ("model", "model_name", "model_id", "hf_model"))
    return point, next((_shown(one) for one in names if isinstance(one, str) and one), None)


def _tuned(folder: Path) -> LensFile:
    config = _config(folder / "config.json")
    path = folder / "params.pt"
    if not path.is_file():
        raise ModelError(f"{folder} has no params.pt: name the folder of a Tuned Lens.")
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise _refusal(folder, f"its lens_type is {_shown(kind)}, not linear_tuned_lens")
    width = _whole(folder, config.get("d_model"), "d_model", 1, MAX_WIDTH)
    layers = _whole(folder, config.get("num_hidden_layers"), "num_hidden_layers", 1, MAX_LAYERS)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise _refusal(path, "it is not a dict of tensors")
    has_bias = config.get("bias", True)
    kinds = ("weight", "bias") if has_bias else ("weight",)
    wanted = {f"{layer}.{kind}" for layer in range(layers) for kind in kinds}
    if unknown := sorted(str(key)[:40] for key in set(content) - wanted):
        raise _refusal(path, f"it has the unknown entry {unknown[0]!r}")
    if missing := sorted(wanted - set(content)):
        raise _refusal(path, f"it lacks {missing[0]}, {len(missing)} entries in all")
    for key, tensor in content.items():
        shape = (width, width) if key.endswith("weight") else (width,)
        _check_tensor(path, key, tensor, shape)
    model, unembedding = config.get("base_model_name_or_path"), config.get("unembed_hash")
    fitted = FittedOn(
        model=_shown(model) if isinstance(model, str) and model else None,
        width=width,
        layers=layers,
        unembed_hash=unembedding if isinstance(unembedding, str) and unembedding else None,
        capture_point="hidden_states",
    )
    weights = {layer: content[f"{layer}.weight"] for layer in range(layers)}
    biases = {layer: content[f"{layer}.bias"] for layer in range(layers)} if has_bias else {}
    return LensFile("tuned", fitted, weights, biases)


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise _refusal(path, "it is too large for a config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"it cannot be read ({_reason(error)})") from error
    if not isinstance(config, dict):
        raise _refusal(path, "it is not a JSON object")
    return config


def _load(path: Path) -> Any:
    """The content of a torch file, its tensors mapped and not yet read."""
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Whatever torch raises on a damaged file, it is one.
    except Exception as error:
        raise _refusal(path, f"torch cannot read it ({_reason(error)})") from error


def _check_zip(path: Path) -> None:
    """Refuse all but an uncompressed zip, of which one small pickle names tensors only."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _refusal(path, f"it has more than {MAX_FILE_BYTES >> 30} GiB")
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise _refusal(path, "it is compressed, which torch's own files are not")
            if sum(info.file_size for info in infos) > path.stat().st_size:
                raise _refusal(path, "it declares more bytes than it has")
            pickles = [info for info in infos if info.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise _refusal(path, "it is not a torch file of plain tensors")
            root = pickles[0].filename.removesuffix("data.pkl")
            sizes = {info.filename.removeprefix(root): info.file_size for info in infos}
            _check_pickle(path, archive.read(pickles[0]), sizes)
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise _refusal(path, f"it is not a torch file ({_reason(error)})") from error


def _check_pickle(path: Path, data: bytes, sizes: Mapping[str, int]) -> None:
    """Refuse a pickle that names more than tensors, or storages of other ``sizes`` than theirs.

    torch trusts the sizes, and would read past the end of a shorter one.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            named = str(argument) if opcode.name == "GLOBAL" else ""
            if opcode.name in _OPCODES_OF_CODE or (named and named not in _GLOBALS):
                raise _refusal(path, f"it holds pickled code ({(named or opcode.name)[:80]})")
            # The memo is a list that grows to the number.
            if opcode.name.endswith("PUT") and not 0 <= int(str(argument)) < len(data):
                raise ValueError("its memo is too large")
        _Storages(data, sizes).load()
    except ModelError:
        raise
    # Whatever a damaged pickle does to the unpickler.
    except Exception as error:
        raise _refusal(path, f"its pickle is damaged ({_reason(error)})") from error


class _Storages(pickle.Unpickler):
    """Goes through a checked pickle without making a tensor, and compares its storages."""

    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._sizes = sizes

    def find_class(self, module: str, name: str, /) -> Any:
        return dict if name == "OrderedDict" else _Named(name)

    def persistent_load(self, pid: Any, /) -> None:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Named) or not isinstance(count, int):
            raise ValueError("a storage is described otherwise")
        size = count * _ITEM_BYTES[storage.name]
        if not isinstance(key, str) or self._sizes.get(f"data/{key}") != size:
            raise ValueError(f"a storage of {size} bytes has {self._sizes.get(f'data/{key}')}")


@dataclass(frozen=True)
class _Named:
    """Stands for what a pickle names; making something of it gives nothing."""

    name: str

    def __call__(self, *arguments: Any) -> None:
        return None


def _check_tensor(path: Path, name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise _refusal(path, f"{name} is not a tensor")
    if value.dtype not in _DTYPES:
        dtype = str(value.dtype).removeprefix("torch.")
        raise _refusal(path, f"{name} is {dtype}, not float16, bfloat16 or float32")
    if tuple(value.shape) != shape:
        raise _refusal(path, f"{name} is {tuple(value.shape)}, not {shape}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise _refusal(path, f"{name} has fewer numbers than its shape says")
    if not bool(torch.isfinite(value).all()):
        raise _refusal(path, f"{name} has a NaN or an infinity")


def _whole(path: Path, value: Any, name: str, lowest: int, highest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise _refusal(path, f"{name} is {_shown(value)}, not a number from {lowest} to {highest}")
    return value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_shown(str(error).strip().partition(chr(10))[0])[:200]}"


def _refusal(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is not used: {reason}. Name another lens, or fetch it again.")
