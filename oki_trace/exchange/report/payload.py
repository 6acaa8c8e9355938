"""The data of a report, in compact form.

Each token is an index into ``tokens``, a list of [id, text] pairs, so equal
indices are equal tokens. Probabilities of the lens and attention weights are
whole thousandths, and data that the page does not show is left out. 300 steps
of a model of 30 layers take about a megabyte.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from oki_trace import __version__
from oki_trace.exchange.selection import Selection
from oki_trace.exchange.trace_object import Json, known_id
from oki_trace.explain import explain, explain_generation
from oki_trace.likelihood import score_of
from oki_trace.message_spans import message_spans, scored_span
from oki_trace.message_tree import path_to
from oki_trace.records import CaptureReport, Generation, LayerAttention, Message, Step

# Entries of a lens layer, of the final layer's attention, and of the other layers'.
_LENS, _EVIDENCE, _ATTENTION = 5, 10, 5


class _Tokens:
    """Indices of tokens, in the order of their first appearance."""

    def __init__(self) -> None:
        self._indices: dict[tuple[int, str], int] = {}

    def index(self, token_id: int, text: str) -> int:
        return self._indices.setdefault((token_id, text), len(self._indices))

    def indices(self, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
        return list(map(self.index, ids, texts))

    def table(self) -> list[list[Any]]:
        return [[known_id(token_id), text] for token_id, text in self._indices]


def payload(chosen: Selection) -> Json:
    """The data of the whole report."""
    tokens = _Tokens()
    messages: list[Json] = []
    replies: list[Json] = []
    places = _places(chosen.messages)
    for message in chosen.messages:
        who = f"{message.role} {message.tool_name or ''}".rstrip()
        shown: Json = {"role": str(message.role), "who": who, "content": message.content}
        if message.id in chosen.traced:
            shown["reply"] = len(replies)
            replies.append(_reply(chosen, message, tokens))
        elif message.reason:
            shown["note"] = f"{message.status}: {message.reason}"
        if message.id in places:
            shown["place"] = places[message.id]
        messages.append(shown)
    _find_given(chosen, messages, replies)
    return {
        "version": __version__,
        "title": chosen.conversation.title,
        "created": f"{chosen.conversation.created_at:%Y-%m-%d %H:%M} UTC",
        "messages": messages,
        "replies": replies,
        "tokens": tokens.table(),
    }


def _places(messages: Sequence[Message]) -> dict[int, str]:
    """Where each message is in a conversation that has branches; empty for one that has none."""
    places = {}
    before: int | None = None
    for message in messages:
        place = f"message {message.id}"
        if message.branch_of is not None:
            place += f" · branch of message {message.branch_of} from step {message.branch_step}"
        elif message.parent_id != before:
            follows = message.parent_id is not None
            place += f" · follows message {message.parent_id}" if follows else " · begins anew"
        places[message.id] = place
        before = message.id
    return places if any("·" in place for place in places.values()) else {}


def _find_given(chosen: Selection, messages: Sequence[Json], replies: Sequence[Json]) -> None:
    """Add to each message whose tokens a reply's prompt has traced: [reply, first, end].

    The tokens are at these positions of the prompt of the first such reply.
    """
    for number, (reply, shown) in enumerate(zip(chosen.replies, replies, strict=True)):
        traced = {step["position"] for step in shown["given"]}
        if not traced:
            continue
        before = path_to(chosen.messages, reply.id)[:-1]
        spans = message_spans(chosen.head(reply).start.prompt, before)
        for message, data in zip(chosen.messages, messages, strict=True):
            span = spans.get(message.id, range(0))
            if not traced.isdisjoint(span):
                data.setdefault("given", [number, span.start, span.stop])


def _steps(steps: Iterable[Step], tokens: _Tokens) -> list[Json]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [{**_step(step, tokens), "run": decoder.decode(step.token_bytes)} for step in steps]


def _reply(chosen: Selection, message: Message, tokens: _Tokens) -> Json:
    start = chosen.head(message).start
    capture, prompt = start.capture, start.prompt
    steps = _steps(chosen.iter_steps(message), tokens)
    given = _steps(chosen.iter_steps(message, given=True), tokens)
    scored: Json = {}
    if given and not steps and message.content:
        span = scored_span(len(prompt), given[0]["position"])
        scored = {"scored": [span.start, span.stop], "score": _score(chosen, message)}
    return {
        **scored,
        "id": message.id,
        "count": len(steps),
        "status": f"{message.status} ({message.reason})" if message.reason else message.status,
        "bad": message.status.value in ("failed", "interrupted"),
        "layers": capture.layers,
        "lens": None if capture.logit_lens_available else capture.lens_reason or "not available",
        "provenance": capture.evidence_provenance,
        "promptLen": len(prompt),
        "prefix": "".join(prompt.tokens[len(prompt) - message.prefix_len :]),
        "prompt": tokens.indices(prompt.token_ids, prompt.tokens),
        "segments": list(prompt.segments),
        "facts": _facts(message, capture, start.generation, len(steps)),
        # [kind, first step, the step after the last] of the parts that are not the answer.
        "parts": [[p.kind, p.start, p.end] for p in message.parts if p.kind != "answer"],
        "steps": steps,
        # The own steps of the prompt's tokens, by position.
        "given": given,
    }


def _score(chosen: Selection, message: Message) -> str:
    score = score_of(chosen.reader.steps(message.id, given=True))
    numbers = (
        ("logprob", score.logprob, 2, " nats"),
        ("perplexity", score.perplexity, 2, ""),
        ("", score.bits_per_byte, 3, " bits per byte"),
    )
    return " · ".join(
        f"{name} {value:.{digits}f}{unit}".strip()
        for name, value, digits, unit in numbers
        if math.isfinite(value)
    )


def _facts(
    message: Message, capture: CaptureReport, generation: Generation, count: int
) -> list[list[str]]:
    fault = message.checks.fault if message.checks is not None else None
    facts = [
        ("model", message.model_id or "unknown"),
        ("weights", f"{capture.quantization or capture.dtype} on {capture.device}"),
        ("shape", f"{capture.layers} layers, width {capture.width}"),
        ("sampling", _sampling(generation)),
        *([("check failed", fault)] if fault else []),
        ("lens check", _check(message.lens_check, "nats")),
        *([("lens draft", _check(message.lens_draft, ""))] if message.lens_draft else []),
        ("attention check", _check(capture.attention_check, "")),
        ("evidence", capture.evidence_provenance),
        ("versions", capture.versions),
    ]
    if message.seconds and math.isfinite(message.seconds):
        speed = f", {count / message.seconds:.1f} tokens/s" if count else ""
        facts.insert(4, ("duration", f"{message.seconds:.1f} s{speed}"))
    return [[name, value] for name, value in facts]


def _sampling(generation: Generation) -> str:
    if not generation.do_sample:
        settings = ["greedy"]
    else:
        settings = [
            f"{name.replace('_', '-')} {value:g}"
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(generation, name)) is not None
        ] or ["sampled"]
    replaced = explain_generation(generation)
    return ", ".join([*settings, *generation.others, *([replaced] if replaced else [])])


def _check(value: float | None, unit: str) -> str:
    if value is None:
        return "not run"
    return f"at most {value:.0e} {unit}".strip() if value else "no difference"


def _step(step: Step, tokens: _Tokens) -> Json:
    top = step.topk
    chosen = tokens.index(step.token_id, step.token)
    shown: Json = {
        "token": chosen,
        "position": step.position,
        "special": int(step.is_special),
        "prob": _rounded(step.prob),
        "surprisal": _rounded(step.surprisal),
        "entropy": _rounded(step.entropy),
        "rank": step.rank,
        "sampled": _rounded(step.sampled_prob),
        "top": tokens.indices(top.token_ids.tolist(), top.tokens),
        "topProb": [_rounded(value) for value in top.probs.tolist()],
        "attention": [
            _attention(layer, _EVIDENCE if layer is step.evidence else _ATTENTION)
            for layer in step.attention
        ],
    }
    if step.origin != "given":
        shown["why"] = explain(step)
    if top.sampled_probs is not None:
        shown["topSampled"] = [_rounded(value) for value in top.sampled_probs.tolist()]
    if step.lens is not None:
        lens = step.lens
        ids, shares = lens.token_ids[:, :_LENS], lens.probs[:, :_LENS]
        shown["lens"] = [
            tokens.indices(row.tolist(), texts[:_LENS])
            for row, texts in zip(ids, lens.tokens, strict=True)
        ]
        shown["lensProb"] = [_thousandths(row.tolist()) for row in shares]
        shown["lensRank"] = lens.chosen_rank.tolist()
        shown["settle"] = lens.settle_layer
        if lens.layers is not None:
            shown["lensLayers"] = lens.layers.tolist()
    return shown


def _attention(layer: LayerAttention, most: int) -> list[Any]:
    """[layer, positions, weights in thousandths]."""
    return [
        layer.layer,
        layer.positions[:most].tolist(),
        _thousandths(layer.weights[:most].tolist()),
    ]


def _rounded(value: float | None) -> float | None:
    """Four significant digits; None for infinities and NaN."""
    return None if value is None or not math.isfinite(value) else float(f"{value:z.4g}")


def _thousandths(values: Sequence[float]) -> list[int | None]:
    return [round(value * 1000) if math.isfinite(value) else None for value in values]
