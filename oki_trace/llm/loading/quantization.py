"""4-bit weights by bitsandbytes: whether they are available, and whether they work.

A load never fails because 4-bit is not possible; the reason is kept with the model.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from oki_trace.llm.failures import first_line

NF4 = "bitsandbytes nf4"


class QuantizationFallback(UserWarning):
    """4-bit was requested and the model was loaded in floating point instead."""


def why_not_4bit(config: Any, is_gguf: bool) -> str | None:
    """Why the model cannot be quantized to 4 bits; None if that can be tried."""
    if is_gguf:
        return "the weights of a GGUF file are already quantized"
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else None
        return f"the model is already quantized ({method or 'its own way'})"
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it warns about an optional kernel
        import_module("bitsandbytes")
    except Exception as error:  # a broken installation raises whatever its loader does
        return f"bitsandbytes does not work here ({first_line(error)})"
    finally:
        logger.setLevel(level)
    return None


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 (Dettmers et al., 2023, QLoRA), computing in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def try_4bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decode two tokens: bitsandbytes quantizes some layers that it cannot run.

    On the CPU it packs the weights at the first decoded token, and only then refuses
    some shapes.
    """
    model.requires_grad_(False)  # packed weights take no forward that tracks gradients
    encoded: Any = tokenizer("a b", return_tensors="pt")
    ids = encoded["input_ids"].to(model.get_input_embeddings().weight.device)
    generator: Any = model
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generator.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=2,
                max_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)


def is_4bit(model: PreTrainedModel) -> bool:
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())
