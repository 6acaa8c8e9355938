"""The settings of a reply: those requested, else those of the model's generation config.

Every setting of the config that makes one choice per step is in force. Others (beam
search, several replies at once, an assistant model's guesses) are replaced by sampling
or by greedy decoding, whichever was requested, and the reply says so.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from oki_trace.errors import CaptureError
from oki_trace.llm.transformers_internals import default_generation_parameters
from oki_trace.records import Generation, Sampling

# By field of GenerationConfig: the value that switches it off, and its name.
_REPLACED: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "beam search"),
    "num_beam_groups": (1, "beam search in groups"),
    "constraints": (None, "constrained beam search"),
    "force_words_ids": (None, "forced words"),
    "num_return_sequences": (1, "several replies at once"),
    "penalty_alpha": (None, "contrastive search"),
    "dola_layers": (None, "DoLa"),
    "prompt_lookup_num_tokens": (None, "prompt lookup"),
    "assistant_early_exit": (None, "early exit"),
    "use_mtp": (None, "multi-token prediction"),
    "token_healing": (None, "token healing"),
}
# Fields that change what generate() returns but not the tokens, or that are handled here.
_SWITCHED_OFF: dict[str, Any] = {
    **dict.fromkeys(("output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("return_dict_in_generate", "is_assistant"), False),
    **dict.fromkeys(("diversity_penalty", "stop_strings")),
}
# Fields that change the choice and are not in Generation: always, and only when sampling.
_OTHERS = (
    *("min_length", "min_new_tokens", "max_time", "stop_strings", "no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale"),
    *("watermarking_config", "remove_invalid_values", "renormalize_logits"),
)
_OTHERS_SAMPLED = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def resolve_generation(model: Any, sampling: Sampling, prompt_len: int) -> Generation:
    """The settings in force for this model: those requested, else its generation config's.

    A reply that samples without a seed gets one, so that it can be reproduced.
    Raises CaptureError when the prompt fills the model's context.
    """
    context = context_length(model)
    if prompt_len >= context:
        raise CaptureError(
            f"The prompt has {prompt_len:,} tokens, but the model's context holds "
            f"{context:,}. Shorten the prompt or start a new conversation."
        )
    defaults = default_generation_parameters(model.generation_config)
    own = model.generation_config.to_dict()
    config = {**defaults, **{name: value for name, value in own.items() if value is not None}}

    def is_on(name: str, off: Any) -> bool:
        value = config.get(name)
        return value is not None and value is not False and value != off

    def requested(name: str) -> Any:
        value = getattr(sampling, name)
        return config[name] if value is None else value

    eos = config.get("eos_token_id")
    sampled = not sampling.is_greedy
    others = (*_OTHERS, *(_OTHERS_SAMPLED if sampled else ()))
    replaced = [
        words
        for name, (off, words) in _REPLACED.items()
        # generate() itself uses contrastive search only in greedy decoding.
        if is_on(name, off) and not (sampled and name == "penalty_alpha")
    ]
    if has_own_generate(model):
        replaced.append("a generate() of its own")
    seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
    return Generation(
        do_sample=sampled,
        max_new_tokens=min(sampling.max_new_tokens, context - prompt_len),
        temperature=sampling.temperature if sampled else None,
        top_p=requested("top_p") if sampled else None,
        top_k=requested("top_k") if sampled else None,
        repetition_penalty=requested("repetition_penalty"),
        seed=seed if sampled else None,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),)),
        others=tuple(_words(n, config[n]) for n in others if is_on(n, defaults.get(n))),
        replaced=tuple(replaced),
    )


def require_context(model: Any, tokens: int, window: int | None) -> None:
    """Raise CaptureError unless a text of so many tokens, or each window of it, fits."""
    context = context_length(model)
    if window is not None and window > context:
        raise CaptureError(
            f"A window of {window:,} tokens is longer than the model's context. Choose one of at "
            f"most {context:,}."
        )
    if window is None and tokens > context:
        raise CaptureError(
            f"The text has {tokens:,} tokens, but the model's context holds {context:,}. Score it "
            f"in overlapping windows: --window {context} --stride {context // 2}."
        )


def has_own_generate(model: Any) -> bool:
    """Whether the model has a ``generate()`` that is not transformers'; it is not used.

    It may not call another loop, or not with the same arguments.
    """
    if not isinstance(model, GenerationMixin):
        return False
    own = type(model).generate
    if own is GenerationMixin.generate or own.__module__.startswith("transformers."):
        return "generate" in vars(model)
    return True


def generate_method(model: Any) -> Callable[..., Any]:
    """The ``generate()`` that prepares a reply. Raises CaptureError for a model without one."""
    if has_own_generate(model):
        return partial(GenerationMixin.generate, model)
    generate: Callable[..., Any] | None = getattr(model, "generate", None)
    if generate is None:
        raise CaptureError(
            f"{type(model).__name__} has no generate(). Choose a model that generates text."
        )
    return generate


def context_length(model: Any) -> int:
    """The most tokens the model can see, from its config; very large when it has no limit."""
    config = model.config.get_text_config(decoder=True)
    limit = int(getattr(config, "max_position_embeddings", None) or 0)
    return max(limit, _stretched(config)) if limit > 0 else 1 << 30


def _stretched(config: Any) -> int:
    """The length that YaRN stretches the rotary embedding to; 0 without it.

    Model cards switch it on by these parameters alone, without a change to the config's
    own length.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [part for part in parameters.values() if isinstance(part, dict)]
    lengths = [0]
    for part in by_layer or [parameters]:
        original, factor = part.get("original_max_position_embeddings"), part.get("factor")
        if part.get("rope_type", part.get("type")) == "yarn" and original and factor:
            lengths.append(int(original * factor))
    return max(lengths)


def generate_arguments(generation: Generation, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The arguments with which ``model.generate()`` prepares these settings."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    own = {name: getattr(generation, name) for name in names}
    # generate() passes its tokenizer, which this needs, to no loop but its own.
    strings = model.generation_config.stop_strings
    stopping = [StopStringCriteria(tokenizer, strings)] if strings else []
    off = {**{name: value for name, (value, _) in _REPLACED.items()}, **_SWITCHED_OFF}
    return {
        # No version of transformers has all of these.
        **{name: value for name, value in off.items() if hasattr(model.generation_config, name)},
        "do_sample": generation.do_sample,
        "max_new_tokens": generation.max_new_tokens,
        **{name: value for name, value in own.items() if value is not None},
        "stopping_criteria": StoppingCriteriaList(stopping),
    }


def find_stop_reason(token_id: int, length: int, generation_config: Any) -> str:
    """Why a reply ends with this token; ``length`` counts prompt and reply up to it."""
    eos = generation_config.eos_token_id
    if token_id in (eos if isinstance(eos, list) else [eos]):
        return "end of turn"
    if length >= generation_config.max_length:
        return "token limit"
    return "stop string" if generation_config.max_time is None else "stop string or time limit"


def _words(name: str, value: Any) -> str:
    if isinstance(value, list | tuple | dict) and len(value) > 4:
        return f"{name} ({len(value)} entries)"
    return f"{name} {value}"
