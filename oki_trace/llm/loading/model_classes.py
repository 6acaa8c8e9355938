"""Which of transformers' classes a checkpoint is loaded as: one that continues a text.

A causal language model is one. So is a model of images and text whose text part
decodes: it is loaded for its text, and what it makes of images is not traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from oki_trace.errors import ModelError

_OTHERS: tuple[tuple[Any, Any], ...] = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
)
TEXT_ONLY = "for text alone: what it makes of images or sound is not traced"
# Parts of a config that are of a model's other senses.
_SENSES = ("vision_config", "audio_config", "vq_config", "image_config", "video_config")


@dataclass(frozen=True, slots=True)
class Kind:
    """``loader``: the class whose ``from_pretrained`` and ``from_config`` make it.

    ``text_only``: whether it takes more than text, which is not traced.
    """

    loader: Any
    text_only: bool


def kind_of(config: Any, name: str, trust_remote_code: bool) -> Kind:
    """How the model is loaded. Raises ModelError for one that does not continue a text."""
    kind = config.model_type
    problem = None
    text_only = takes_more_than_text(config)
    own_code = trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    loader: Any = AutoModelForCausalLM
    if _is_encoder_decoder(config):
        problem = f"is an encoder-decoder model ({kind})"
    elif not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = next((auto for known, auto in _OTHERS if _generates(known, config)), None)
        if loader is None:
            problem = f"({kind}) is not a causal language model"
        text_only = True
    elif not own_code and not getattr(config, "is_decoder", False):
        masked = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
        masked -= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        named = set(config.architectures or ())
        if named and named <= masked:
            problem = f"({kind}) was trained to fill in masked words, not to continue a text"
    if problem:
        raise ModelError(f"{name} {problem}. Choose a decoder-only model that generates text.")
    return Kind(loader, text_only)


def takes_more_than_text(config: Any) -> bool:
    """Whether a model takes images or sound as well, by the parts of its config."""
    return any(getattr(config, sense, None) is not None for sense in _SENSES)


def is_mistral_common(tokenizer: Any) -> bool:
    """Whether a tokenizer is mistral-common's, which does not give the text of one token."""
    return any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__)


def _is_encoder_decoder(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, text))


def _generates(known: Any, config: Any) -> bool:
    """Whether the class of this config in ``known`` brings transformers' ``generate()``."""
    if type(config) not in known:
        return False
    found = known[type(config)]
    can_generate = getattr(found, "can_generate", None)
    return callable(can_generate) and bool(can_generate())
