"""How the next token is chosen, kept so that it can be told exactly.

The processors and warpers are those that ``generate()`` sets up, called one by
one, so that what each of them did can be read from the scores around it. The
draw is ``torch.multinomial``'s own race, run here so that its noise is known:
with q ~ Exp(1) for every token, the largest p / q wins, which is the largest
log p + noise with noise = -log q (Gumbel noise; the "Gumbel-max trick", Gumbel,
1954). Same generator, same calls, same token.

``choose`` is all that the decoding thread does; what is to be told of a choice
is worked out by ``analyze_choice``, elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.records import Contender, Decision, Effect, FloatArray

# Where torch.multinomial of one sample is that race (ATen's Distributions.cpp).
_RACES = ("cpu", "cuda")


@dataclass(frozen=True)
class Choice:
    """A chosen token and the tensors it was chosen by, still on their device.

    ``token`` (1, 1); ``scores`` (vocab,) fp32, after all processors; ``stages``
    each processor with the scores (vocab,) it gave; ``race`` (vocab,) the draw's
    q, None when nothing was drawn or when it cannot be seen on this device.
    """

    token: Tensor
    scores: Tensor
    stages: tuple[tuple[Any, Tensor], ...]
    sampled: bool
    race: Tensor | None


def choose(
    processors: Any,
    input_ids: Tensor,
    logits: Tensor,
    generator: torch.Generator | None,
) -> Choice:
    """Pick the next token by logits (1, vocab) in fp32; greedily without a generator.

    Raises CaptureError when the processors leave no token, or no distribution.
    """
    stages = []
    # Theirs to write on; the model's own are kept.
    scores = logits.clone() if processors else logits
    for processor in processors:
        scores = processor(input_ids, scores)
        stages.append((processor, scores[0]))
    race = None
    if generator is None:
        token = scores.argmax(-1, keepdim=True)
        reached = float(scores[0, token])
        possible = float("-inf") < reached < float("inf")
    else:
        probs = scores.softmax(-1)
        if probs.device.type in _RACES:
            race = torch.empty_like(probs).exponential_(1, generator=generator)
            token = (probs / race).argmax(-1, keepdim=True)
            # Of what is not a number all is not: the winner's own tells.
            possible = float(probs[0, token]) > 0
        else:
            possible = bool(torch.isfinite(probs).all())
            token = torch.multinomial(probs, 1, generator=generator) if possible else probs[:, :1]
    if not possible:
        raise CaptureError(_impossible(stages))
    return Choice(
        token=token,
        scores=scores[0],
        stages=tuple(stages),
        sampled=generator is not None,
        race=None if race is None else race[0],
    )


def _impossible(stages: list[tuple[Any, Tensor]]) -> str:
    """Which setting left nothing to choose from."""
    for processor, scores in stages:
        if not bool(scores.max().isfinite()):
            words = " ".join(describe_processor(processor)).strip()
            return (
                f"The sampling setting {words} left no token to choose. "
                "Change it, or mend generation_config.json in the model's folder."
            )
    return "The sampling settings left no token to choose. Change them."


# ------------------------------------------------------------------ the decision


@dataclass(frozen=True)
class ChoiceAnalysis:
    """The decision as a record, and the final distribution to look candidates up in."""

    decision: Decision
    chosen_prob: float
    _probs: Tensor
    _noise: Tensor | None

    def probs_of(self, ids: Tensor) -> FloatArray:
        """Their probabilities in the final distribution, 0 where removed."""
        found: FloatArray = self._probs[ids.to(self._probs.device)].cpu().numpy()
        return found

    def noise_of(self, ids: Tensor) -> FloatArray | None:
        """What the draw gave them; None without a draw."""
        if self._noise is None:
            return None
        found: FloatArray = self._noise[ids.to(self._noise.device)].cpu().numpy()
        return found


@torch.no_grad()
def analyze_choice(choice: Choice, logits: Tensor, vocabulary: Vocabulary) -> ChoiceAnalysis | None:
    """What is to be told of a choice from logits (vocab,); None when it was plainly greedy."""
    if not choice.stages and not choice.sampled:
        return None
    chosen = int(choice.token)
    before = logits.to(choice.scores.device, torch.float32)
    probs = before.softmax(-1)
    effects = []
    for processor, after in choice.stages:
        gone = after.isneginf() & ~before.isneginf()
        removed_mass = float(probs[gone].sum())
        if after is not before:
            probs = after.softmax(-1)
        before = after
        name, setting = describe_processor(processor)
        effects.append(Effect(name, setting, int(gone.sum()), removed_mass, float(probs[chosen])))
    # Never 0, so that what is kept is finite.
    noise = None if choice.race is None else -choice.race.clamp_min(1e-38).log()

    def contender(token_id: int) -> Contender:
        return Contender(
            token_id,
            vocabulary.text(token_id),
            float(probs[token_id]),
            None if noise is None else float(noise[token_id]),
        )

    runner_up = None
    if choice.race is not None:
        second = (probs / choice.race).topk(min(2, len(probs)))
        others = [i for i in second.indices.tolist() if i != chosen and float(probs[i]) > 0]
        runner_up = contender(others[0]) if others else None
    decision = Decision(
        drawn=choice.sampled,
        effects=tuple(effects),
        candidates=int((probs > 0).sum()),
        noise=None if noise is None else float(noise[chosen]),
        greedy=contender(_greedy_id(choice, logits)),
        runner_up=runner_up,
    )
    return ChoiceAnalysis(decision, float(probs[chosen]), probs, noise)


def _greedy_id(choice: Choice, logits: Tensor) -> int:
    """The token that ``generate(do_sample=False)`` would have said: without the warpers."""
    if not choice.sampled:
        return int(choice.token)
    kinds = [type(processor).__name__ for processor, _ in choice.stages]
    warping = [kind.endswith("Warper") or kind == "LogitNormalization" for kind in kinds]
    first = warping.index(True) if True in warping else len(kinds)
    if not all(warping[first:]):
        return int(choice.scores.argmax())  # what comes after the warpers counts, too
    return int((choice.stages[first - 1][1] if first else logits).argmax())


# ------------------------------------------------------------------ in plain words


def _count(values: Any) -> str:
    return f"of {len(values)} token{'s' if len(values) != 1 else ''}"


def _number(value: Any) -> str:
    # A tensor's float is that of 32 bits: 0.1 would be 0.10000000149.
    return f"{float(value):.6g}"


_WORDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "TemperatureLogitsWarper": ("temperature", lambda p: _number(p.temperature)),
    "TopKLogitsWarper": ("top-k", lambda p: str(p.top_k)),
    "TopPLogitsWarper": ("top-p", lambda p: _number(p.top_p)),
    "TopHLogitsWarper": ("top-h", lambda p: _number(p.top_h)),
    "MinPLogitsWarper": ("min-p", lambda p: _number(p.min_p)),
    "TypicalLogitsWarper": ("typical-p", lambda p: _number(p.mass)),
    "EpsilonLogitsWarper": ("epsilon cutoff", lambda p: _number(p.epsilon)),
    "EtaLogitsWarper": ("eta cutoff", lambda p: _number(p.epsilon)),
    "RepetitionPenaltyLogitsProcessor": ("repetition penalty", lambda p: _number(p.penalty)),
    "EncoderRepetitionPenaltyLogitsProcessor": (
        "prompt repetition penalty",
        lambda p: _number(1 / p.penalty),
    ),
    "NoRepeatNGramLogitsProcessor": ("no repeated runs", lambda p: f"of {p.ngram_size} tokens"),
    "EncoderNoRepeatNGramLogitsProcessor": (
        "no repeated runs of the prompt",
        lambda p: f"of {p.ngram_size} tokens",
    ),
    "SequenceBiasLogitsProcessor": ("sequence bias", lambda p: f"of {len(p.sequence_bias)}"),
    "NoBadWordsLogitsProcessor": ("bad words", lambda p: f"({len(p.bad_word_ids)})"),
    "MinLengthLogitsProcessor": ("minimum length", lambda p: str(p.min_length)),
    "MinNewTokensLengthLogitsProcessor": ("minimum new tokens", lambda p: str(p.min_new_tokens)),
    "ForcedBOSTokenLogitsProcessor": ("forced first token", lambda p: str(p.bos_token_id)),
    "ForcedEOSTokenLogitsProcessor": ("forced last token", lambda p: _ids(p.eos_token_id)),
    "ExponentialDecayLengthPenalty": ("length penalty", lambda p: _number(p.regulation_factor)),
    "SuppressTokensLogitsProcessor": ("suppression", lambda p: _count(p.suppress_tokens)),
    "SuppressTokensAtBeginLogitsProcessor": (
        "suppression at the beginning",
        lambda p: _count(p.begin_suppress_tokens),
    ),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": (
        "guidance scale",
        lambda p: _number(p.guidance_scale),
    ),
    "WatermarkLogitsProcessor": ("watermark bias", lambda p: _number(p.bias)),
}


def _ids(value: Any) -> str:
    return ", ".join(str(int(i)) for i in torch.as_tensor(value).ravel().tolist())


def describe_processor(processor: Any) -> tuple[str, str]:
    """A processor's name and its setting, as a user would say them."""
    kind = type(processor).__name__
    name, setting = _WORDS.get(kind, (None, None))
    if name is None or setting is None:
        bare = re.sub("(Logits)?(Processor|Warper)$", "", kind)
        return re.sub("(?<=[a-z])(?=[A-Z])", " ", bare).lower(), ""
    try:
        return name, setting(processor)
    except (AttributeError, TypeError, ValueError):
        return name, ""  # another version's processor: its name is still true
