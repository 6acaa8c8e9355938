"""The trace object: one assistant message as plain JSON values.

It has every field of a version 1 trace, under the same name, and the fields that
version 2 adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oki_trace.explain import explain
from oki_trace.records import (
    CaptureReport,
    ChatMessage,
    Contender,
    Decision,
    Generation,
    LayerAttention,
    Lens,
    Part,
    Prompt,
    ReplyChecks,
    Status,
    Step,
    TemplateOptions,
)

FORMAT = "oki-trace"
VERSION = 2

Json = dict[str, Any]

# The id that fills up shorter lists. Tokens of imported traces that are known by their text alone
# have ids below it.
BLANK = -1


@dataclass(frozen=True, slots=True)
class TraceHead:
    """The trace of a reply without its steps; ``messages`` are those before it."""

    model_id: str
    prompt: Prompt
    generation: Generation
    capture: CaptureReport
    messages: Sequence[ChatMessage]
    output: str
    status: Status
    reason: str | None
    checks: ReplyChecks | None = None
    parts: Sequence[Part] = ()
    template: TemplateOptions | None = None


def trace_object(
    head: TraceHead,
    steps: Iterable[Step],
    prompt_steps: Iterable[Step] = (),
    *,
    timed: bool = False,
) -> Json:
    """The trace of one reply; ``timed`` as in ``step_objects``."""
    return {
        **head_object(head),
        "steps": list(step_objects(head.prompt, steps, timed=timed)),
        "prompt_steps": list(step_objects(head.prompt, prompt_steps, timed=timed)),
    }


def head_object(head: TraceHead) -> Json:
    """The trace of one reply without its ``steps``, which come last."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_id": head.model_id,
        "prompt": head.prompt.text,
        "prompt_len": len(head.prompt),
        "prompt_token_ids": list(map(known_id, head.prompt.token_ids)),
        "prompt_tokens": list(head.prompt.tokens),
        "prompt_segments": list(head.prompt.segments),
        "output": head.output,
        "parts": part_objects(head.parts),
        "messages": [message_object(message) for message in head.messages],
        "template": None if not head.template else plain(asdict(head.template)),
        "status": str(head.status),
        "reason": head.reason,
        "evidence_provenance": head.capture.evidence_provenance,
        "logit_lens_available": head.capture.logit_lens_available,
        "generation": plain(asdict(head.generation)),
        "capture": plain(asdict(head.capture)),
        "checks": None if head.checks is None else plain(asdict(head.checks)),
    }


def part_objects(parts: Sequence[Part]) -> list[Json]:
    """The parts of a reply; each has the steps from ``start`` up to, but not including, ``end``."""
    return [
        {name: plain(value) for name, value in asdict(part).items() if value is not None}
        for part in parts
    ]


def message_object(message: ChatMessage) -> Json:
    """A message before the reply; with its parts if it has more than an answer."""
    fields: Json = {"role": str(message.role), "content": message.content}
    if any(part.kind != "answer" for part in message.parts):
        fields["parts"] = part_objects(message.parts)
    if message.tool_name is not None:
        fields["tool_name"] = message.tool_name
    return fields


def step_objects(prompt: Prompt, steps: Iterable[Step], *, timed: bool = False) -> Iterator[Json]:
    """The steps, one at a time.

    ``timed``: with ``elapsed_ms``, which differs between otherwise equal runs, and
    with the digests, which cover it.
    """
    ids, tokens = list(prompt.token_ids), list(prompt.tokens)
    for step in steps:
        fields = _step(step, len(prompt), ids, tokens)
        yield {**fields, **_recorded(step)} if timed else fields
        if step.origin != "given":  # a given token is in the prompt already
            ids.append(step.token_id)
            tokens.append(step.token)


def _recorded(step: Step) -> Json:
    digests = {"digest": step.digest, "tensor_digest": step.tensor_digest}
    known = {name: value.hex() for name, value in digests.items() if value is not None}
    return {"elapsed_ms": _number(step.elapsed_ms), **known}


def _step(step: Step, prompt_len: int, ids: list[int], tokens: list[str]) -> Json:
    evidence = step.evidence
    return {
        "step": step.step_index if step.step_index >= 0 else None,
        "origin": step.origin,
        "chosen_token": step.token,
        "chosen_id": known_id(step.token_id),
        "chosen_bytes": step.token_bytes.hex(),
        "is_special": step.is_special,
        "position": step.position,
        "logit": _number(step.logit),
        "prob": _number(step.prob),
        "logprob": _number(step.logprob),
        "entropy": _number(step.entropy),
        "rank": step.rank or None,
        "margin": _number(step.margin),
        "sampled_prob": _number(step.sampled_prob),
        "decision": decision_object(step, step.decision) if step.decision else None,
        "logits_topk": _candidates(step),
        "evidence": _evidence(evidence, prompt_len, ids, tokens) if evidence else [],
        "attention": [
            {
                "layer": layer.layer,
                "topk": _attention_entries(layer),
                "missing": _number(layer.missing),
            }
            for layer in step.attention
        ],
        "logit_lens": _lens(step.lens) if step.lens else [],
    }


def decision_object(step: Step, decision: Decision) -> Json:
    """``processors`` in order; ``text`` is the explanation in words."""
    return {
        "text": explain(step),
        "drawn": decision.drawn,
        "differs_from_greedy": step.differs_from_greedy,
        "candidates": decision.candidates,
        "noise": _number(decision.noise),
        "greedy": _contender(decision.greedy),
        "runner_up": _contender(decision.runner_up) if decision.runner_up else None,
        "processors": [plain(asdict(effect)) for effect in decision.effects],
    }


def _contender(contender: Contender) -> Json:
    return {
        "token_id": known_id(contender.token_id),
        "token": contender.token,
        "sampled_prob": _number(contender.prob),
        "noise": _number(contender.noise),
    }


def _candidates(step: Step) -> list[Json]:
    top = step.topk
    missing = [None] * len(top.tokens)
    sampled = missing if top.sampled_probs is None else top.sampled_probs.tolist()
    noise = missing if top.noise is None else top.noise.tolist()
    own = (top.token_ids.tolist(), top.tokens, top.logits.tolist(), top.probs.tolist())
    columns = zip(*own, sampled, noise, strict=True)
    return [
        {
            "rank": rank,
            "token_id": known_id(token_id),
            "token": token,
            "logit": _number(logit),
            "prob": _number(prob),
            "sampled_prob": _number(sampled_prob),
            "noise": _number(noise),
        }
        for rank, (token_id, token, logit, prob, sampled_prob, noise) in enumerate(columns, start=1)
    ]


def _attention_entries(layer: LayerAttention) -> list[Json]:
    pairs = zip(layer.positions.tolist(), layer.weights.tolist(), strict=True)
    return [
        {"rank": rank, "position": position, "weight": _number(weight)}
        for rank, (position, weight) in enumerate(pairs, start=1)
    ]


def _evidence(
    layer: LayerAttention, prompt_len: int, ids: list[int], tokens: list[str]
) -> list[Json]:
    """``relative`` counts from the reply's first token; it is None inside the prompt."""
    entries = []
    for entry in _attention_entries(layer):
        position = entry["position"]
        in_prompt = position < prompt_len
        token = {"token_id": known_id(ids[position]), "token": tokens[position]}
        relative = None if in_prompt else position - prompt_len
        entries.append({**entry, **token, "in_prompt": in_prompt, "relative": relative})
    return entries


def _lens(lens: Lens) -> list[Json]:
    columns = zip(
        *(lens.token_ids.tolist(), lens.tokens, lens.logits.tolist(), lens.probs.tolist()),
        *(lens.chosen_rank.tolist(), lens.chosen_prob.tolist()),
        *(lens.entropy.tolist(), lens.kl.tolist()),
        strict=True,
    )
    return [
        {
            "layer": layer,
            "topk": [
                {
                    "rank": rank,
                    "token_id": known_id(token_id),
                    "token": token,
                    "logit": _number(logit),
                    "prob": _number(prob),
                }
                for rank, (token_id, token, logit, prob) in enumerate(zip(*entries, strict=True), 1)
                if token_id != BLANK
            ],
            "chosen_rank": chosen_rank or None,
            "chosen_prob": _number(chosen_prob),
            "entropy": _number(entropy),
            "kl": _number(kl),
        }
        for layer, (*entries, chosen_rank, chosen_prob, entropy, kl) in enumerate(columns)
    ]


def known_id(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _number(value: float | None) -> float | None:
    """None for infinities and NaN, which JSON has not: a token that is ruled out has no logit."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """The fields of a record as JSON values: lists, and only finite numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value
