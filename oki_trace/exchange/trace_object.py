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
    ChatMessage,
    Contender,
    Decision,
    FloatArray,
    IntArray,
    LayerAttention,
    LayerRouting,
    Lens,
    Part,
    Prompt,
    Step,
    TemplateOptions,
    TurnEnd,
    TurnStart,
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

    start: TurnStart
    end: TurnEnd
    messages: Sequence[ChatMessage]
    template: TemplateOptions | None = None


def trace_object(
    head: TraceHead,
    steps: Iterable[Step],
    prompt_steps: Iterable[Step] = (),
    *,
    timed: bool = False,
) -> Json:
    """The trace of one reply; ``timed`` as in ``step_objects``."""
    prompt = head.start.prompt
    return {
        **head_object(head),
        "steps": list(step_objects(prompt, steps, timed=timed)),
        "prompt_steps": list(step_objects(prompt, prompt_steps, timed=timed)),
    }


def head_object(head: TraceHead) -> Json:
    """The trace of one reply without its ``steps``, which come last."""
    start, end, prompt = head.start, head.end, head.start.prompt
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_id": start.model_id,
        "prompt": prompt.text,
        "prompt_len": len(prompt),
        "prompt_token_ids": list(map(known_id, prompt.token_ids)),
        "prompt_tokens": list(prompt.tokens),
        "prompt_segments": list(prompt.segments),
        **({"prefix_len": start.prefix_len} if start.prefix_len else {}),
        "output": end.output,
        "parts": part_objects(end.parts),
        "messages": [message_object(message) for message in head.messages],
        "template": None if not head.template else plain(asdict(head.template)),
        "status": str(end.status),
        "reason": end.reason or None,
        "evidence_provenance": start.capture.evidence_provenance,
        "logit_lens_available": start.capture.logit_lens_available,
        "generation": plain(asdict(start.generation)),
        "capture": plain(asdict(start.capture)),
        "checks": None if end.checks is None else plain(asdict(end.checks)),
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
        **({"lenses": {lens.name: _lens(lens) for lens in step.lenses}} if step.lenses else {}),
        **({"router": [_routing(layer) for layer in step.router]} if step.router else {}),
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
    drawn = {"sampled_prob": top.sampled_probs, "noise": top.noise}
    return _tokens(top.token_ids, top.tokens, logit=top.logits, prob=top.probs, **drawn)


def _tokens(token_ids: IntArray, tokens: Sequence[str], **numbers: FloatArray | None) -> list[Json]:
    """The tokens of a list by rank; a number that was not measured is None."""
    ids = token_ids.tolist()
    columns = [
        [None] * len(ids) if values is None else map(_number, values.tolist())
        for values in numbers.values()
    ]
    return [
        {"rank": rank, "token_id": known_id(token_id), "token": token}
        | dict(zip(numbers, measured, strict=True))
        for rank, (token_id, token, *measured) in enumerate(
            zip(ids, tokens, *columns, strict=True), start=1
        )
        if token_id != BLANK
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
    return [
        {
            "layer": layer,
            "topk": _tokens(
                lens.token_ids[row], tokens, logit=lens.logits[row], prob=lens.probs[row]
            ),
            "chosen_rank": int(lens.chosen_rank[row]) or None,
            "chosen_prob": _number(float(lens.chosen_prob[row])),
            "entropy": _number(float(lens.entropy[row])),
            "kl": _number(float(lens.kl[row])),
        }
        for row, (layer, tokens) in enumerate(
            zip(lens.layer_numbers.tolist(), lens.tokens, strict=True)
        )
    ]


def _routing(routing: LayerRouting) -> Json:
    pairs = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
    return {
        "layer": routing.layer,
        "topk": [
            {"rank": rank, "expert": expert, "weight": _number(weight)}
            for rank, (expert, weight) in enumerate(pairs, start=1)
        ],
    }


def known_id(token_id: int | None) -> int | None:
    return token_id if token_id is not None and token_id >= 0 else None


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
