"""The trace object: one assistant message as plain JSON values.

Every name of a version 1 trace is there under the same name and meaning; what
version 2 adds stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from oki_trace.records import (
    CaptureReport,
    ChatMessage,
    Generation,
    LayerAttention,
    Lens,
    Prompt,
    Status,
    Step,
)

FORMAT = "oki-trace"
VERSION = 2


def trace_object(
    *,
    model_id: str,
    prompt: Prompt,
    generation: Generation,
    capture: CaptureReport,
    messages: Sequence[ChatMessage],
    output: str,
    status: Status,
    reason: str | None,
    steps: Iterable[Step],
) -> dict[str, Any]:
    """The trace of one reply; ``messages`` are those before it."""
    decoded = list(steps)
    tokens = [*prompt.tokens, *(step.token for step in decoded)]
    ids = [*prompt.token_ids, *(step.token_id for step in decoded)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_id": model_id,
        "prompt": prompt.text,
        "prompt_len": len(prompt),
        "prompt_token_ids": list(prompt.token_ids),
        "output": output,
        "messages": [{"role": str(m.role), "content": m.content} for m in messages],
        "status": str(status),
        "reason": reason,
        "evidence_provenance": capture.evidence_provenance,
        "logit_lens_available": capture.logit_lens_available,
        "generation": _plain(asdict(generation)),
        "capture": _plain(asdict(capture)),
        "steps": [_step(step, len(prompt), ids, tokens) for step in decoded],
    }


def _step(step: Step, prompt_len: int, ids: list[int], tokens: list[str]) -> dict[str, Any]:
    evidence = step.evidence
    return {
        "step": step.step_index,
        "chosen_token": step.token,
        "chosen_id": step.token_id,
        "position": step.position,
        "prob": _number(step.prob),
        "logprob": _number(step.logprob),
        "entropy": _number(step.entropy),
        "rank": step.rank,
        "margin": _number(step.margin),
        "sampled_prob": _number(step.sampled_prob),
        "logits_topk": _candidates(step),
        "evidence": _evidence(evidence, prompt_len, ids, tokens) if evidence else [],
        "attention": [
            {"layer": layer.layer, "topk": _ranked(layer), "missing": _number(layer.missing)}
            for layer in step.attention
        ],
        "logit_lens": _lens(step.lens) if step.lens else [],
    }


def _candidates(step: Step) -> list[dict[str, Any]]:
    top = step.topk
    sampled = [None] * len(top.tokens) if top.sampled_probs is None else top.sampled_probs.tolist()
    columns = (top.token_ids.tolist(), top.tokens, top.logits.tolist(), top.probs.tolist(), sampled)
    return [
        {
            "rank": rank,
            "token_id": token_id,
            "token": token,
            "logit": _number(logit),
            "prob": _number(prob),
            "sampled_prob": _number(after),
        }
        for rank, (token_id, token, logit, prob, after) in enumerate(
            zip(*columns, strict=True), start=1
        )
    ]


def _ranked(layer: LayerAttention) -> list[dict[str, Any]]:
    pairs = zip(layer.positions.tolist(), layer.weights.tolist(), strict=True)
    return [
        {"rank": rank, "position": position, "weight": _number(weight)}
        for rank, (position, weight) in enumerate(pairs, start=1)
    ]


def _evidence(
    layer: LayerAttention, prompt_len: int, ids: list[int], tokens: list[str]
) -> list[dict[str, Any]]:
    """``relative`` counts from the reply's first token; None inside the prompt."""
    entries = []
    for entry in _ranked(layer):
        position = entry["position"]
        in_prompt = position < prompt_len
        entries.append(
            {
                **entry,
                "token_id": ids[position],
                "token": tokens[position],
                "in_prompt": in_prompt,
                "relative": None if in_prompt else position - prompt_len,
            }
        )
    return entries


def _lens(lens: Lens) -> list[dict[str, Any]]:
    columns = zip(
        lens.token_ids.tolist(),
        lens.tokens,
        lens.logits.tolist(),
        lens.probs.tolist(),
        lens.chosen_rank.tolist(),
        lens.chosen_prob.tolist(),
        lens.entropy.tolist(),
        lens.kl.tolist(),
        strict=True,
    )
    return [
        {
            "layer": layer,
            "topk": [
                {"rank": r, "token_id": i, "token": t, "logit": _number(x), "prob": _number(p)}
                for r, (i, t, x, p) in enumerate(zip(ids, tokens, logits, probs, strict=True), 1)
            ],
            "chosen_rank": rank,
            "chosen_prob": _number(prob),
            "entropy": _number(entropy),
            "kl": _number(kl),
        }
        for layer, (ids, tokens, logits, probs, rank, prob, entropy, kl) in enumerate(columns)
    ]


def _number(value: float | None) -> float | None:
    """JSON has no infinities and no NaN: a token that was ruled out has no logit."""
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A report's fields as JSON holds them: lists, and only finite numbers."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value
