"""Chooses the next token, and keeps every intermediate result.

The processors and warpers are those that ``generate()`` sets up, called one by
one, so that the effect of each can be read from the scores around it. The
draw is the algorithm of ``torch.multinomial`` for one sample, run here so that its
noise is known: with q ~ Exp(1) for every token, the largest p / q wins, which is the
largest log p + noise with noise = -log q (Gumbel noise; the "Gumbel-max trick", Gumbel,
1954). Same generator, same calls, same token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError

# Device types on which torch.multinomial is this algorithm (ATen's Distributions.cpp).
_RACE_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Choice:
    """A chosen token and the tensors it was chosen by, still on their device.

    ``token`` (1, 1); ``scores`` (vocab,) fp32, after all processors; ``stages``
    each processor with the scores (vocab,) it returned; ``race`` (vocab,) the q of the
    draw, None when nothing was drawn or the device does not show it.
    """

    token: Tensor
    scores: Tensor
    stages: tuple[tuple[Any, Tensor], ...]
    sampled: bool
    race: Tensor | None


def force(token_id: int, logits: Tensor) -> Choice:
    """The choice of a token that the user chose, at logits (1, vocab) in fp32."""
    token = torch.tensor([[token_id]], device=logits.device)
    return Choice(token, logits[0], (), sampled=False, race=None)


def choose(
    processors: Any,
    input_ids: Tensor,
    logits: Tensor,
    generator: torch.Generator | None,
) -> Choice:
    """Choose the next token from logits (1, vocab) in fp32; greedily without a generator.

    Raises CaptureError when the processors leave no token, or no distribution.
    """
    stages = []
    # Processors may write to the scores; the model's own logits are kept.
    scores = logits.clone() if processors else logits
    for processor in processors:
        scores = processor(input_ids, scores)
        stages.append((processor, scores[0]))
    race = None
    if generator is None:
        token = scores.argmax(-1, keepdim=True)
        possible = float("-inf") < float(scores[0, token]) < float("inf")
    else:
        probs = scores.softmax(-1)
        if probs.device.type in _RACE_DEVICES:
            race = torch.empty_like(probs).exponential_(1, generator=generator)
            token = (probs / race).argmax(-1, keepdim=True)
            # One NaN makes all probabilities NaN, so the chosen one is enough to look at.
            possible = float(probs[0, token]) > 0
        else:
            possible = bool(torch.isfinite(probs).all())
            token = torch.multinomial(probs, 1, generator=generator) if possible else probs[:, :1]
    if not possible:
        raise CaptureError(_no_token_left(stages))
    return Choice(
        token=token,
        scores=scores[0],
        stages=tuple(stages),
        sampled=generator is not None,
        race=None if race is None else race[0],
    )


def _no_token_left(stages: list[tuple[Any, Tensor]]) -> str:
    """The error message, with the setting that left no token to choose from."""
    for processor, scores in stages:
        if not bool(scores.max().isfinite()):
            setting = " ".join(describe_processor(processor)).strip()
            return (
                f"The sampling setting {setting} left no token to choose. "
                "Change it, or fix generation_config.json in the model's folder."
            )
    return "The sampling settings left no token to choose. Change them."


def _count(values: Any) -> str:
    return f"of {len(values)} token{'s' if len(values) != 1 else ''}"


def _number(value: Any) -> str:
    # A tensor holds 32-bit floats: 0.1 would be shown as 0.10000000149.
    return f"{float(value):.6g}"


def _ids(value: Any) -> str:
    return ", ".join(str(int(i)) for i in torch.as_tensor(value).ravel().tolist())


# By class of transformers, without its ending: the setting's name, and its value as text.
_SETTINGS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Temperature": ("temperature", lambda p: _number(p.temperature)),
    "TopK": ("top-k", lambda p: str(p.top_k)),
    "TopP": ("top-p", lambda p: _number(p.top_p)),
    "TopH": ("top-h", lambda p: _number(p.top_h)),
    "MinP": ("min-p", lambda p: _number(p.min_p)),
    "Typical": ("typical-p", lambda p: _number(p.mass)),
    "Epsilon": ("epsilon cutoff", lambda p: _number(p.epsilon)),
    "Eta": ("eta cutoff", lambda p: _number(p.epsilon)),
    "RepetitionPenalty": ("repetition penalty", lambda p: _number(p.penalty)),
    "EncoderRepetitionPenalty": ("prompt repetition penalty", lambda p: _number(1 / p.penalty)),
    "NoRepeatNGram": ("no repeated runs", lambda p: f"of {p.ngram_size} tokens"),
    "EncoderNoRepeatNGram": (
        "no repeated runs of the prompt",
        lambda p: f"of {p.ngram_size} tokens",
    ),
    "SequenceBias": ("sequence bias", lambda p: f"of {len(p.sequence_bias)}"),
    "NoBadWords": ("bad words", lambda p: f"({len(p.bad_word_ids)})"),
    "MinLength": ("minimum length", lambda p: str(p.min_length)),
    "MinNewTokensLength": ("minimum new tokens", lambda p: str(p.min_new_tokens)),
    "ForcedBOSToken": ("forced first token", lambda p: str(p.bos_token_id)),
    "ForcedEOSToken": ("forced last token", lambda p: _ids(p.eos_token_id)),
    "ExponentialDecayLengthPenalty": ("length penalty", lambda p: _number(p.regulation_factor)),
    "SuppressTokens": ("suppression", lambda p: _count(p.suppress_tokens)),
    "SuppressTokensAtBegin": (
        "suppression at the beginning",
        lambda p: _count(p.begin_suppress_tokens),
    ),
    "UnbatchedClassifierFreeGuidance": ("guidance scale", lambda p: _number(p.guidance_scale)),
    "Watermark": ("watermark bias", lambda p: _number(p.bias)),
}


def describe_processor(processor: Any) -> tuple[str, str]:
    """A processor's name and its setting, as a user would call them."""
    kind = re.sub("(Logits)?(Processor|Warper)$", "", type(processor).__name__)
    if kind not in _SETTINGS:
        return re.sub("(?<=[a-z])(?=[A-Z])", " ", kind).lower(), ""
    name, setting = _SETTINGS[kind]
    try:
        return name, setting(processor)
    except (AttributeError, TypeError, ValueError):
        return name, ""  # the processor of another version, which has the same name
