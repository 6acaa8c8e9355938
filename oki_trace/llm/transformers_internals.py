"""The only module that uses undocumented parts of transformers.

``pyproject.toml`` bounds transformers above because of this module, and
``tests/llm/test_internals.py`` fails for each name that a new version removes or changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils.chat_template_utils import render_jinja_template

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "modeling_auto",
    "render_jinja_template",
]

# The sources of the stock attention, which branch on the number of queries.
ATTENTION_SOURCES = frozenset({masking_utils.__file__, sdpa_attention.__file__})


def prefill(model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The model's outputs for a prompt (1, T), in chunks if the generation config says so.

    The beginning that is in the cache does not run again: ``input_ids`` are all tokens.
    """
    if hasattr(config, "_mask_length"):  # by this length, transformers knows that they are all
        config._mask_length = input_ids.shape[1]
    return model._prefill(input_ids, config, model_kwargs)


def next_kwargs(model: Any, outputs: Any, kwargs: dict[str, Any], steps: int | None = None) -> Any:
    """The keyword arguments of the next step; of several at once if ``counts_tokens_as_usual``."""
    count = {} if steps is None else {"num_new_tokens": steps}
    return model._update_model_kwargs_for_generation(outputs, kwargs, **count)


def counts_tokens_as_usual(model: Any) -> bool:
    """Whether the keyword arguments can be updated for several steps at once."""
    own = type(model)._update_model_kwargs_for_generation
    return own is GenerationMixin._update_model_kwargs_for_generation


def optimized_for_decoding(model: Any) -> Any:
    """The context in which ``generate()`` runs its decode steps."""
    return model._optimize_model_for_decode()


def default_generation_parameters(config: Any) -> Any:
    """The values, by name, that ``generate()`` uses where a generation config has none."""
    return config._get_default_generation_params()


def attention_implementation(config: Any) -> str:
    """The key of the attention function that a model with this config runs."""
    return str(config._attn_implementation)


def attention_name(config: Any) -> str:
    """The implementation's name as a config stores it; "None" without one."""
    return str(getattr(config, "_attn_implementation_internal", None))


def attention_configs(model: nn.Module) -> list[Any]:
    """The configs that name an attention implementation: parts of a model may have their own."""
    configs = (getattr(module, "config", None) for module in model.modules())
    named = (config for config in configs if hasattr(config, "_attn_implementation_internal"))
    return list({id(config): config for config in named}.values())


@contextmanager
def eager_attention(configs: Sequence[Any]) -> Iterator[None]:
    """In this context, models with these configs run their own eager attention."""
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config, _ in before:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def set_model_name(model: Any, name: str) -> None:
    """Change the name that a model and its config were loaded by."""
    model.name_or_path = model.config._name_or_path = name


def forget_quantization(model: Any) -> None:
    """Let a model from a GGUF file be saved: once loaded, its weights are plain floats."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None


@contextmanager
def silent_gguf_reader() -> Iterator[None]:
    """In this context, the GGUF reader draws no bar; it ignores transformers' switch for bars."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    tqdm = reader.tqdm
    reader.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        reader.tqdm = tqdm
