"""The trace object: one assistant message as plain JSON values.

Every name of a version 1 trace is there under the same name and meaning; what
version 2 adds stands beside it.
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

# Not every imported trace says which tokens it means: a token known by its text
# alone has an id of its own below BLANK, which fills up a shorter list.
BLANK = -1


@dataclass(frozen=True, slots=True)
class TraceHead:
    """All of a reply's trace but its steps; ``messages`` are those before it."""

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


def trace_object(head: TraceHead, steps: Iterable[Step], *, timed: bool = False) -> dict[str, Any]:
    """The trace of one reply; ``timed`` as in ``step_objects``."""
    return {**head_object(head), "steps": list(step_objects(head.prompt, steps, timed=timed))}


def head_object(head: TraceHead) -> dict[str, Any]:
    """The trace of one reply up to its ``steps``, which come last."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_id": head.model_id,
        "prompt": head.prompt.text,
        "prompt_len": len(head.prompt),
        "prompt_token_ids": [_known_id(token_id) for token_id in head.prompt.token_ids],
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


def part_objects(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The parts of a reply: the steps of each are ``start`` up to ``end``, which is not of it."""
    return [
        {name: plain(value) for name, value in asdict(part).items() if value is not None}
        for part in parts
    ]


def message_object(message: ChatMessage) -> dict[str, Any]:
    """A message as a trace repeats it; its parts where it has more than an answer."""
    made: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if any(part.kind != "answer" for part in message.parts):
        made["parts"] = part_objects(message.parts)
    if message.tool_name is not None:
        made["tool_name"] = message.tool_name
    return made


def step_objects(
    prompt: Prompt, steps: Iterable[Step], *, timed: bool = False
) -> Iterator[dict[str, Any]]:
    """Each step as it comes: no more than one is held, beside the reply's tokens.

    ``timed``: with ``elapsed_ms``, which differs between runs that are otherwise the
    same, and the digests, which cover it.
    """
    ids, tokens = list(prompt.token_ids), list(prompt.tokens)
    for step in steps:
        made = _step(step, len(prompt), ids, tokens)
        yield {**made, **_as_recorded(step)} if timed else made
        ids.append(step.token_id)
        tokens.append(step.token)


def _as_recorded(step: Step) -> dict[str, Any]:
    digests = {"digest": step.digest, "tensor_digest": step.tensor_digest}
    return {
        "elapsed_ms": _number(step.elapsed_ms),
        **{name: value.hex() for name, value in digests.items() if value is not None},
    }


def _step(step: Step, prompt_len: int, ids: list[int], tokens: list[str]) -> dict[str, Any]:
    evidence = step.evidence
    return {
        "step": step.step_index,
        "chosen_token": step.token,
        "chosen_id": _known_id(step.token_id),
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
            {"layer": layer.layer, "topk": _ranked(layer), "missing": _number(layer.missing)}
            for layer in step.attention
        ],
        "logit_lens": _lens(step.lens) if step.lens else [],
    }


def decision_object(step: Step, decision: Decision) -> dict[str, Any]:
    """``processors`` in order; ``text`` says it all in a sentence or two."""
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


def _contender(contender: Contender) -> dict[str, Any]:
    return {
        "token_id": _known_id(contender.token_id),
        "token": contender.token,
        "sampled_prob": _number(contender.prob),
        "noise": _number(contender.noise),
    }


def _candidates(step: Step) -> list[dict[str, Any]]:
    top = step.topk
    nothing = [None] * len(top.tokens)
    sampled = nothing if top.sampled_probs is None else top.sampled_probs.tolist()
    noise = nothing if top.noise is None else top.noise.tolist()
    own = (top.token_ids.tolist(), top.tokens, top.logits.tolist(), top.probs.tolist())
    columns = (*own, sampled, noise)
    return [
        {
            "rank": rank,
            "token_id": _known_id(token_id),
            "token": token,
            "logit": _number(logit),
            "prob": _number(prob),
            "sampled_prob": _number(after),
            "noise": _number(drawn),
        }
        for rank, (token_id, token, logit, prob, after, drawn) in enumerate(
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
                "token_id": _known_id(ids[position]),
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
                {
                    "rank": r,
                    "token_id": _known_id(i),
                    "token": t,
                    "logit": _number(x),
                    "prob": _number(p),
                }
                for r, (i, t, x, p) in enumerate(zip(ids, tokens, logits, probs, strict=True), 1)
                if i != BLANK
            ],
            "chosen_rank": rank or None,
            "chosen_prob": _number(prob),
            "entropy": _number(entropy),
            "kl": _number(kl),
        }
        for layer, (ids, tokens, logits, probs, rank, prob, entropy, kl) in enumerate(columns)
    ]


def _known_id(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _number(value: float | None) -> float | None:
    """JSON has no infinities and no NaN: a token that was ruled out has no logit."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A report's fields as JSON holds them: lists, and only finite numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value
