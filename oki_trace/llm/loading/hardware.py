"""The device and dtype for a model on this machine, and whether it fits into memory.

The default dtype is the checkpoint's own if the hardware computes it natively.
Emulation is several times slower than another dtype that is native, so that one
is used instead.
"""

from __future__ import annotations

import copy
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from oki_trace.errors import ModelError, UsageError
from oki_trace.llm.accelerate_internals import execution_device
from oki_trace.llm.loading.file_checks import Weights

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def requested_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. Choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES.get(name)


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto", the one that accelerate fills first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"There is no device {name!r}. Choose one of auto, cpu, cuda, mps."
        ) from None
    if device.type == "cpu":
        return device
    available = accelerator is not None and accelerator.type == device.type
    if not available or (device.index or 0) >= torch.accelerator.device_count():
        raise ModelError(
            f"This torch ({torch.__version__}) sees no {name} device. Use --device auto or cpu, "
            "or install a torch build for that hardware."
        )
    return device


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config states, for the model or for its text part."""
    dtype = getattr(config, "dtype", None)
    if dtype is None:
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; emulated, it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def native_dtype(own: torch.dtype | None, device: torch.device) -> torch.dtype:
    """``own`` if ``device`` computes it natively, else the widest fast dtype it has."""
    if device.type == "cpu":
        return torch.bfloat16 if own == torch.bfloat16 and has_native_bfloat16() else torch.float32
    if own == torch.float32:
        return own
    native = device.type == "xpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.bfloat16 if own == torch.bfloat16 and native else torch.float16


def input_device(model: Any) -> torch.device:
    """The device for the model's token ids; offloaded embeddings have none of their own."""
    embeddings = model.get_input_embeddings()
    return execution_device(embeddings) or embeddings.weight.device


def computing_dtype(model: Any) -> torch.dtype:
    """The dtype the model computes in, in this thread: its own, or that of autocast."""
    own: torch.dtype = model.dtype
    # Offloaded weights are on the meta device between two passes.
    kind = "cpu" if model.device.type == "meta" else model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own


def check_memory(
    loader: Any,
    config: Any,
    model_id: str,
    device: torch.device,
    dtype: torch.dtype,
    use_4bit: bool,
    weights: Weights | None = None,
) -> None:
    """Refuse a model that does not fit into memory, before the system kills the process.

    ``loader`` is the class that makes the model (``model_classes``). With ``weights``, a
    config that declares more parameters than they have bits is refused as well.
    """
    if getattr(config, "auto_map", None):
        return
    with torch.device("meta"):
        parameters = loader.from_config(copy.deepcopy(config)).num_parameters()
    if device.type == "cpu":
        needed = parameters * (0.6 if use_4bit else dtype.itemsize)
        free = psutil.virtual_memory().available
        if needed > free:
            raise ModelError(
                f"{model_id} needs {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB "
                "are free. Close other programs, load it in 4-bit (--4bit) or 16-bit "
                "(--dtype bfloat16), or choose a smaller model."
            )
    if weights is not None and parameters > 8 * weights.bytes:
        raise ModelError(
            f"{model_id} declares {parameters:,} parameters, but its weights have "
            f"{weights.bytes:,} bytes. Copy or download it again, or choose another model."
        )
