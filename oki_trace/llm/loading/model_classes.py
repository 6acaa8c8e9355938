"""Selects the transformers class that loads a checkpoint: one that can continue a text.

A causal language model can. So can an image-text model whose text part decodes: it is
loaded for its text, and its use of images is not traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from oki_trace.errors import ModelError
from oki_trace.llm.transformers_internals import modeling_auto as mappings

_OTHERS: tuple[tuple[Any, Any], ...] = (
    (mappings.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (mappings.MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
)
TEXT_ONLY = "for text only: images and sound are not traced"
# The parts of a config for inputs other than text.
_OTHER_INPUTS = ("vision_config", "audio_config", "vq_config", "image_config", "video_config")


@dataclass(frozen=True, slots=True)
class ModelClass:
    """``loader`` is the class whose ``from_pretrained`` and ``from_config`` make the model.

    ``text_only``: whether it takes more than text, which is not traced.
    """

    loader: Any
    text_only: bool


def model_class(config: Any, name: str, trust_remote_code: bool) -> ModelClass:
    """How the model is loaded. Raises ModelError for one that does not continue a text."""
    model_type = config.model_type
    problem = None
    text_only = takes_more_than_text(config)
    own_code = trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    loader: Any = AutoModelForCausalLM
    if _is_encoder_decoder(config):
        problem = f"is an encoder-decoder model ({model_type})"
    elif not own_code and type(config) not in mappings.MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = next((auto for mapping, auto in _OTHERS if _generates(mapping, config)), None)
        if loader is None:
            problem = f"({model_type}) is not a causal language model"
        text_only = True
    elif not own_code and not getattr(config, "is_decoder", False):
        masked = set(mappings.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
        masked -= set(mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        architectures = set(config.architectures or ())
        if architectures and architectures <= masked:
            problem = f"({model_type}) was trained to fill in masked words, not to continue a text"
    if problem:
        raise ModelError(f"{name} {problem}. Choose a decoder-only model that generates text.")
    return ModelClass(loader, text_only)


def takes_more_than_text(config: Any) -> bool:
    """Whether a model takes images or sound as well, by the parts of its config."""
    return any(getattr(config, part, None) is not None for part in _OTHER_INPUTS)


def is_mistral_common(tokenizer: Any) -> bool:
    """Whether a tokenizer is mistral-common's, which does not give the text of one token."""
    return any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__)


def _is_encoder_decoder(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, text))


def _generates(mapping: Any, config: Any) -> bool:
    """Whether the class for this config in ``mapping`` has transformers' ``generate()``."""
    can_generate = type(config) in mapping and getattr(mapping[type(config)], "can_generate", None)
    return callable(can_generate) and bool(can_generate())
