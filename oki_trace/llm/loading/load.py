"""A model and its tokenizer, from a name.

A name is ``smollm2`` (built in), a hub id, a local folder, or a local
``.gguf`` file. Two guarantees. What was got is said: a request for 4-bit that
cannot be met is met in floating point, with a warning and the reason in
:class:`LoadedModel`. And whatever goes wrong is one :class:`ModelError` whose
message names the fix (see ``diagnose``). Weights are read from safetensors or
GGUF alone, and a model's own code runs only when asked for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from oki_trace.errors import ModelError
from oki_trace.llm.capture.vocabulary import is_mistral_common
from oki_trace.llm.loading.activity import INTERRUPTIONS, Doing, now_doing
from oki_trace.llm.loading.diagnose import explain
from oki_trace.llm.loading.file_checks import Weights, sound_folder, sound_gguf, sound_numbers
from oki_trace.llm.loading.hardware import (
    checkpoint_dtype,
    must_fit,
    native_dtype,
    pick_device,
    requested_dtype,
)
from oki_trace.llm.loading.load_progress import Progress, bars, silent
from oki_trace.llm.loading.locate import Source, find, snapshot
from oki_trace.llm.loading.model_classes import TEXT_ONLY, Kind, kind_of
from oki_trace.llm.loading.quantization import (
    NF4,
    QuantizationFallback,
    first_line,
    impossible,
    is_4bit,
    quantization_config,
    try_out,
)
from oki_trace.records import ModelChoice
from oki_trace.settings import Settings


class LoadedForText(UserWarning):
    """A model that takes more than text was loaded, for its text."""


class PlainPrompts(UserWarning):
    """A model was loaded whose own way to write a conversation is not among its files."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to run, what was asked for, and what was got.

    ``dtype`` is what it computes in. ``quantization`` is how its weights are
    held if not in that. ``fallback_reason`` says why 4-bit, though asked for,
    was not done. ``text_only``: it takes images or sound as well, which are not traced.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_id: str
    requested: ModelChoice
    dtype: str
    device: str
    quantization: str | None
    fallback_reason: str | None
    seconds: float
    text_only: bool = False

    @property
    def description(self) -> str:
        """One line for people: what was got."""
        held = f"{self.quantization}, computing in " if self.quantization else ""
        note = f", {TEXT_ONLY}" if self.text_only else ""
        return f"{self.model_id} ({held}{self.dtype}) on {self.device}{note}"


def load_model_and_tokenizer(
    model_id: str | None = None,
    use_4bit: bool = True,
    cache_dir: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    ``model_id`` None is ``$OKI_TRACE_MODEL``, or ``smollm2``. ``cache_dir`` is
    the hub's cache. The keywords are those of :func:`load`.

    Raises:
        ModelError: it cannot be found, read, or held in memory.
        UsageError: no such dtype or device.
    """
    choice = ModelChoice(
        model_id=Settings.from_environment().model_id if model_id is None else str(model_id),
        use_4bit=use_4bit,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
    )
    loaded = load(
        choice, cache_dir=cache_dir, trust_remote_code=trust_remote_code, progress=progress
    )
    return loaded.model, loaded.tokenizer


def load(
    choice: ModelChoice,
    *,
    cache_dir: str | Path | None = None,
    models_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    check_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> LoadedModel:
    """Load what ``choice`` names; ``models_dir`` is where the built-in model is kept.

    ``check_tokenizer`` is called before the weights are read, and may raise a ModelError.

    ``dtype`` "auto" is the checkpoint's own where the hardware computes it
    natively, else float16 on a GPU and float32 on a CPU. ``device`` "auto"
    leaves the placing to accelerate.
    """
    started = time.perf_counter()
    report = progress or silent
    device = pick_device(choice.device)
    dtype = requested_dtype(choice.dtype)
    source = find(choice.model_id, models_dir, report)
    cache = str(cache_dir) if cache_dir is not None else None
    common: dict[str, Any] = {"cache_dir": cache, "trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        common["gguf_file"] = source.gguf
    with bars(progress):
        try:
            now_doing(Doing.READING)
            report(f"Reading {source.model_id}", None)
            weights = _sound(source, cache)
            config: Any = AutoConfig.from_pretrained(source.path, **common)
            kind = kind_of(config, source.model_id, trust_remote_code)
            dtype = dtype or native_dtype(checkpoint_dtype(config), device)
            tokenizer = _tokenizer(source, common)
            if check_tokenizer is not None:
                check_tokenizer(tokenizer)
            now_doing(Doing.LOADING)
            report(f"Loading {source.model_id}", None)
            reason = impossible(config, source.gguf is not None) if choice.use_4bit else None
            use_4bit = choice.use_4bit and reason is None
            must_fit(kind.loader, config, source.model_id, device, dtype, use_4bit, weights)
            try:
                model = _model(source, kind, config, dtype, choice.device, use_4bit, common)
                if use_4bit:
                    try_out(model, tokenizer)
            except Exception as error:
                if not use_4bit or isinstance(error, ModelError):
                    raise
                # If 4-bit is not to blame, this fails again and is explained.
                reason = f"it failed in 4-bit ({type(error).__name__}: {first_line(error)})"
                model = _model(source, kind, config, dtype, choice.device, False, common)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise explain(error, source, cache) from error
    if choice.use_4bit and reason is None and not is_4bit(model):
        reason = "the model has no layer that bitsandbytes quantizes"
    quantization = _quantization(model, source)
    got = str(dtype).removeprefix("torch.")
    if reason is not None:
        warnings.warn(
            f"{source.model_id}: 4-bit was asked for, {quantization or got} was loaded, "
            f"because {reason}.",
            QuantizationFallback,
            stacklevel=2,
        )
    _tell_of_plain_prompts(source, tokenizer, cache)
    if kind.text_only:
        said = f"{source.model_id} is loaded {TEXT_ONLY}."
        warnings.warn(said, LoadedForText, stacklevel=2)
    model.eval()
    # What a trace calls it: the name that loads it again, not the folder it came from.
    model.name_or_path = model.config._name_or_path = source.model_id
    report(f"{source.model_id} is loaded", 1.0)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        model_id=source.model_id,
        requested=choice,
        dtype=got,
        device=_placement(model),
        quantization=quantization,
        fallback_reason=reason,
        seconds=time.perf_counter() - started,
        text_only=kind.text_only,
    )


# ---------------------------------------------------------------- the model


def _sound(source: Source, cache: str | None) -> Weights | None:
    """Look at the model's files before any library reads them; None for what is not here yet."""
    if source.folder is not None:
        if source.gguf is not None:
            return sound_gguf(source.folder / source.gguf)
        return sound_folder(source.folder)
    here = snapshot(source.path, cache)
    if here is not None:
        return sound_folder(here)
    config, _ = PreTrainedConfig.get_config_dict(source.path, cache_dir=cache)
    sound_numbers(config, f"{source.model_id}'s config.json", None)
    return None


def _model(
    source: Source,
    kind: Kind,
    config: Any,
    dtype: torch.dtype,
    device: str,
    use_4bit: bool,
    common: dict[str, Any],
) -> PreTrainedModel:
    placing: Any = "auto" if device == "auto" else {"": device}
    if device == "auto" and not torch.accelerator.is_available():
        placing = {"": "cpu"}  # where accelerate would put it, less its spilling to disk
    loading: Any = kind.loader.from_pretrained(
        source.path,
        config=None if source.gguf else config,
        dtype=dtype,
        device_map=placing,
        quantization_config=quantization_config(dtype) if use_4bit else None,
        use_safetensors=True,
        output_loading_info=True,
        **common,
    )
    model: PreTrainedModel = loading[0]
    info: dict[str, Any] = loading[1]
    made_up = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if made_up:
        raise ModelError(
            f"{source.model_id} lacks weights that a causal language model needs ({made_up[0]}, "
            f"{len(made_up)} in all). Choose a decoder-only model that generates text, or download "
            "this one again."
        )
    return model


def _tokenizer(source: Source, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = _read_tokenizer(source, common)
        works = len(tokenizer("a b")["input_ids"]) > 0
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        if source.is_hub or source.gguf or "trust_remote_code" in str(error):
            raise
        raise ModelError(
            f"{source.model_id} has no tokenizer that can be read ({first_line(error)}). Copy the "
            "tokenizer files (tokenizer.json, tokenizer_config.json) into it."
        ) from error
    if not works:
        raise ModelError(
            f"{source.model_id} has an empty tokenizer. Copy the tokenizer files (tokenizer.json, "
            "tokenizer_config.json) into it, or download it again."
        )
    return tokenizer


def _read_tokenizer(source: Source, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer by transformers' own code; mistral-common's has no text for half its calls."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source.path, mistral_format=False, **common
    )
    if is_mistral_common(tokenizer):
        again: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            source.path, **common
        )
        return again
    return tokenizer


def _tell_of_plain_prompts(source: Source, tokenizer: Any, cache: str | None) -> None:
    """Warn where the chat format is in mistral-common's code, which has no template to show."""
    where = source.folder or snapshot(source.path, cache)
    if getattr(tokenizer, "chat_template", None) or where is None:
        return
    if (where / "tekken.json").is_file():
        warnings.warn(
            f"{source.model_id} has no chat template, so its prompts are plain (USER: … "
            "ASSISTANT:). Put the model's chat_template.jinja into its folder.",
            PlainPrompts,
            stacklevel=3,
        )


# ---------------------------------------------------------------- what was got


def _quantization(model: PreTrainedModel, source: Source) -> str | None:
    if source.gguf is not None:
        return "gguf, dequantized"
    if is_4bit(model):
        return NF4
    existing = getattr(model.config, "quantization_config", None)
    method = getattr(existing, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def _placement(model: PreTrainedModel) -> str:
    """The devices that hold the model, the first used first."""
    return ", ".join(dict.fromkeys(str(p.device) for p in model.parameters()))
