"""Loads a model and its tokenizer by name.

A name is ``smollm2`` (built in), a hub id, a local folder, or a local
``.gguf`` file. Two guarantees. If a model cannot be loaded in 4 bits, it is loaded
in floating point, with a warning and the reason in :class:`LoadedModel`. And any
failure is one :class:`ModelError` whose message names the fix (see ``diagnose``).
Weights are read from safetensors or GGUF only, and a model's own code runs only
with ``trust_remote_code``.
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
from oki_trace.llm.failures import INTERRUPTIONS, first_line
from oki_trace.llm.loading.activity import Activity, report_activity
from oki_trace.llm.loading.diagnose import explain
from oki_trace.llm.loading.file_checks import Weights, check_folder, check_gguf, check_numbers
from oki_trace.llm.loading.hardware import (
    check_memory,
    checkpoint_dtype,
    native_dtype,
    pick_device,
    requested_dtype,
)
from oki_trace.llm.loading.load_progress import Progress, no_progress, progress_bars
from oki_trace.llm.loading.locate import Source, locate, snapshot
from oki_trace.llm.loading.model_classes import (
    TEXT_ONLY,
    ModelClass,
    is_mistral_common,
    model_class,
)
from oki_trace.llm.loading.quantization import (
    NF4,
    QuantizationFallback,
    is_4bit,
    quantization_config,
    try_4bit,
    why_not_4bit,
)
from oki_trace.llm.transformers_internals import set_model_name
from oki_trace.records import ModelChoice
from oki_trace.settings import Settings


class LoadedForText(UserWarning):
    """A model that takes more than text was loaded for its text alone."""


class PlainPrompts(UserWarning):
    """A model was loaded without a chat template; its own format is not among its files."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to run, the request for it, and how it was loaded.

    It computes in ``dtype``; ``quantization`` is the format of its weights if another.
    ``fallback_reason`` says why it is not in 4-bit although that was requested.
    ``text_only``: it takes images or sound as well, which are not traced.
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
        """How it was loaded, in one line for people."""
        weights = f"{self.quantization}, computing in " if self.quantization else ""
        note = f", {TEXT_ONLY}" if self.text_only else ""
        return f"{self.model_id} ({weights}{self.dtype}) on {self.device}{note}"


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
        ModelError: the model cannot be found or read, or does not fit into memory.
        UsageError: there is no such dtype or device.
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
    change_config: Callable[[Any], Any] | None = None,
) -> LoadedModel:
    """Load what ``choice`` names; ``models_dir`` is where the built-in model is kept.

    ``check_tokenizer`` is called before the weights are read, and may raise a ModelError.
    ``change_config`` returns the config to load with, of a model that is not a GGUF file.

    ``dtype`` "auto" is the checkpoint's own if the hardware computes it natively,
    else float16 on a GPU and float32 on a CPU. ``device`` "auto" lets accelerate
    place the model.
    """
    started = time.perf_counter()
    report = progress or no_progress
    device = pick_device(choice.device)
    dtype = requested_dtype(choice.dtype)
    source = locate(choice.model_id, models_dir, report)
    cache = None if cache_dir is None else str(cache_dir)
    common: dict[str, Any] = {"cache_dir": cache, "trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        common["gguf_file"] = source.gguf
    with progress_bars(progress):
        try:
            report_activity(Activity.READING)
            report(f"Reading {source.model_id}", None)
            weights = _checked_files(source, cache)
            config: Any = AutoConfig.from_pretrained(source.path, **common)
            if change_config is not None and source.gguf is None:
                config = change_config(config)
            kind = model_class(config, source.model_id, trust_remote_code)
            dtype = dtype or native_dtype(checkpoint_dtype(config), device)
            tokenizer = _tokenizer(source, common)
            if check_tokenizer is not None:
                check_tokenizer(tokenizer)
            report_activity(Activity.LOADING)
            report(f"Loading {source.model_id}", None)
            reason = why_not_4bit(config, source.gguf is not None) if choice.use_4bit else None
            use_4bit = choice.use_4bit and reason is None
            check_memory(kind.loader, config, source.model_id, device, dtype, use_4bit, weights)
            try:
                model = _model(source, kind, config, dtype, choice.device, use_4bit, common)
                if use_4bit:
                    try_4bit(model, tokenizer)
            except Exception as error:
                if not use_4bit or isinstance(error, ModelError):
                    raise
                # If 4-bit is not the cause, this fails again and is explained.
                reason = f"it failed in 4-bit ({type(error).__name__}: {first_line(error)})"
                model = _model(source, kind, config, dtype, choice.device, False, common)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise explain(error, source, cache) from error
    if choice.use_4bit and reason is None and not is_4bit(model):
        reason = "the model has no layer that bitsandbytes quantizes"
    model.eval()
    # The name that loads it again, not the folder it came from.
    set_model_name(model, source.model_id)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        model_id=source.model_id,
        requested=choice,
        dtype=str(dtype).removeprefix("torch."),
        device=", ".join(dict.fromkeys(str(p.device) for p in model.parameters())),
        quantization=_quantization(model, source),
        fallback_reason=reason,
        seconds=time.perf_counter() - started,
        text_only=kind.text_only,
    )
    _warn(loaded, source, cache)
    report(f"{source.model_id} is loaded", 1.0)
    return loaded


def _warn(loaded: LoadedModel, source: Source, cache: str | None) -> None:
    """Warn about everything that differs from the request or from what the model can do."""
    name = loaded.model_id
    if loaded.fallback_reason is not None:
        warnings.warn(
            f"{name}: 4-bit was requested, but {loaded.quantization or loaded.dtype} was loaded "
            f"because {loaded.fallback_reason}.",
            QuantizationFallback,
            stacklevel=3,
        )
    folder = source.folder or snapshot(source.path, cache)
    templated = getattr(loaded.tokenizer, "chat_template", None)
    # mistral-common has the chat format in its code, which has no template to show.
    if not templated and folder is not None and (folder / "tekken.json").is_file():
        warnings.warn(
            f"{name} has no chat template, so its prompts are plain (USER: … "
            "ASSISTANT:). Put the model's chat_template.jinja into its folder.",
            PlainPrompts,
            stacklevel=3,
        )
    if loaded.text_only:
        warnings.warn(f"{name} is loaded {TEXT_ONLY}.", LoadedForText, stacklevel=3)


def _checked_files(source: Source, cache: str | None) -> Weights | None:
    """Check the model's files before any library reads them; None if they are not here yet."""
    if source.folder is not None and source.gguf is not None:
        return check_gguf(source.folder / source.gguf)
    folder = source.folder or snapshot(source.path, cache)
    if folder is not None:
        return check_folder(folder)
    config, _ = PreTrainedConfig.get_config_dict(source.path, cache_dir=cache)
    check_numbers(config, f"{source.model_id}'s config.json", None)
    return None


def _model(
    source: Source,
    kind: ModelClass,
    config: Any,
    dtype: torch.dtype,
    device: str,
    use_4bit: bool,
    common: dict[str, Any],
) -> PreTrainedModel:
    placement: Any = "auto" if device == "auto" else {"": device}
    if device == "auto" and not torch.accelerator.is_available():
        placement = {"": "cpu"}  # as accelerate does, but without spilling to disk
    loading: Any = kind.loader.from_pretrained(
        source.path,
        config=None if source.gguf else config,
        dtype=dtype,
        device_map=placement,
        quantization_config=quantization_config(dtype) if use_4bit else None,
        use_safetensors=True,
        output_loading_info=True,
        **common,
    )
    model: PreTrainedModel = loading[0]
    info: dict[str, Any] = loading[1]
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise ModelError(
            f"{source.model_id} lacks weights that a causal language model needs ({missing[0]}, "
            f"{len(missing)} in all). Choose a decoder-only model that generates text, or download "
            "this one again."
        )
    return model


def load_tokenizer(model_id: str, *, models_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone, as ``load`` would load it. Raises ModelError."""
    source = locate(model_id, models_dir)
    common: dict[str, Any] = {"trust_remote_code": False}
    if source.gguf is not None:
        common["gguf_file"] = source.gguf
    try:
        _checked_files(source, None)
        return _tokenizer(source, common)
    except (*INTERRUPTIONS, ModelError):
        raise
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{model_id} has no tokenizer that can be read ({reason}).") from error


def _tokenizer(source: Source, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    files = "Copy the tokenizer files (tokenizer.json, tokenizer_config.json) into it"
    try:
        # Not mistral-common's tokenizer: half of its calls return no text.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, mistral_format=False, **common
        )
        if is_mistral_common(tokenizer):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.path, **common)
        is_empty = not len(tokenizer("a b")["input_ids"])
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        if source.is_hub or source.gguf or "trust_remote_code" in str(error):
            raise
        raise ModelError(
            f"{source.model_id} has no tokenizer that can be read ({first_line(error)}). {files}."
        ) from error
    if is_empty:
        raise ModelError(
            f"{source.model_id} has an empty tokenizer. {files}, or download it again."
        )
    return tokenizer


def _quantization(model: PreTrainedModel, source: Source) -> str | None:
    if source.gguf is not None:
        return "gguf, dequantized"
    if is_4bit(model):
        return NF4
    existing = getattr(model.config, "quantization_config", None)
    method = getattr(existing, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None
