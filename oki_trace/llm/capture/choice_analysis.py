"""Explains the choice of a token: the effect of each sampling setting, and the draw.

``choose`` (``decoding/sampling.py``) only keeps the tensors of a choice, so the
decoding thread does no more than decoding needs; this runs in another thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.sampling import Choice, describe_processor
from oki_trace.records import Contender, Decision, Effect, FloatArray


@dataclass(frozen=True)
class ChoiceAnalysis:
    """The decision as a record, and the final distribution of the chosen token and candidates.

    ``sampled_probs`` (k,) are 0 where a setting removed the candidate; ``noise`` (k,) is the
    Gumbel noise, None without a draw. All None for greedy decoding without processors.
    """

    decision: Decision | None = None
    chosen_prob: float | None = None
    sampled_probs: FloatArray | None = None
    noise: FloatArray | None = None


@torch.no_grad()
def analyze_choice(
    choice: Choice, logits: Tensor, candidate_ids: Tensor, vocabulary: Vocabulary
) -> ChoiceAnalysis:
    """Analyze a choice from logits (vocab,), with candidates (k,)."""
    if not choice.stages and not choice.sampled:
        return ChoiceAnalysis()
    chosen = int(choice.token)
    before = logits.to(choice.scores.device, torch.float32)
    probs = before.softmax(-1)
    effects = []
    for processor, after in choice.stages:
        removed = after.isneginf() & ~before.isneginf()
        removed_mass = float(probs[removed].sum())
        if after is not before:
            probs = after.softmax(-1)
        before = after
        name, setting = describe_processor(processor)
        removed_count = int(removed.sum())
        effects.append(Effect(name, setting, removed_count, removed_mass, float(probs[chosen])))
    # At least 1e-38, so that the noise is finite.
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
        best = (probs / choice.race).topk(min(2, len(probs)))
        others = [i for i in best.indices.tolist() if i != chosen and float(probs[i]) > 0]
        runner_up = contender(others[0]) if others else None
    decision = Decision(
        drawn=choice.sampled,
        effects=tuple(effects),
        candidates=int((probs > 0).sum()),
        noise=None if noise is None else float(noise[chosen]),
        greedy=contender(_greedy_id(choice, logits)),
        runner_up=runner_up,
    )
    candidate_ids = candidate_ids.to(probs.device)
    return ChoiceAnalysis(
        decision=decision,
        chosen_prob=float(probs[chosen]),
        sampled_probs=probs[candidate_ids].cpu().numpy(),
        noise=None if noise is None else noise[candidate_ids].cpu().numpy(),
    )


def _greedy_id(choice: Choice, logits: Tensor) -> int:
    """The token that ``generate(do_sample=False)`` would choose: without the warpers."""
    if not choice.sampled:
        return int(choice.token)
    kinds = [type(processor).__name__ for processor, _ in choice.stages]
    warping = [kind.endswith("Warper") or kind == "LogitNormalization" for kind in kinds]
    first = warping.index(True) if True in warping else len(kinds)
    if not all(warping[first:]):
        return int(choice.scores.argmax())  # processors after the warpers count, too
    return int((choice.stages[first - 1][1] if first else logits).argmax())
