"""What a report draws, as compact plain data.

Each token of a reply's tables is a number into ``tokens`` ([id, text] pairs), so
equal numbers are equal tokens; shares are whole thousandths, lists of entries
are flat, and what a page does not show is not in it. Three hundred steps of a
model of thirty layers take about a megabyte.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from oki_trace import __version__
from oki_trace.exchange.decision import explain, explain_generation
from oki_trace.exchange.selection import Progress, Selection
from oki_trace.records import CaptureReport, Generation, LayerAttention, Message, Step

# Of a lens layer, of the final layer's attention, and of the other layers'.
_LENS, _EVIDENCE, _ATTENTION = 5, 10, 5

Json = dict[str, Any]


class _Tokens:
    """Numbers for tokens, in the order they are first met."""

    def __init__(self) -> None:
        self.table: list[list[Any]] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def number(self, token_id: int, text: str) -> int:
        key = (token_id, text)
        if key not in self._numbers:
            self._numbers[key] = len(self.table)
            self.table.append([token_id if token_id >= 0 else None, text])
        return self._numbers[key]

    def numbers(self, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
        return [self.number(*pair) for pair in zip(ids, texts, strict=True)]


def payload(chosen: Selection, progress: Progress | None = None) -> Json:
    """The whole report's data."""
    tokens = _Tokens()
    messages: list[Json] = []
    replies: list[Json] = []
    for message in chosen.messages:
        who = f"{message.role} {message.tool_name or ''}".rstrip()
        said: Json = {"role": str(message.role), "who": who, "content": message.content}
        if message.id in chosen.traced:
            said["reply"] = len(replies)
            done = sum(reply["count"] for reply in replies)
            replies.append(_reply(chosen, message, tokens, done, progress))
        elif message.reason:
            said["note"] = f"{message.status}: {message.reason}"
        messages.append(said)
    return {
        "version": __version__,
        "title": chosen.conversation.title,
        "created": f"{chosen.conversation.created_at:%Y-%m-%d %H:%M} UTC",
        "messages": messages,
        "replies": replies,
        "tokens": tokens.table,
    }


def _reply(
    chosen: Selection, message: Message, tokens: _Tokens, done: int, progress: Progress | None
) -> Json:
    head = chosen.head(message)
    capture = head.capture
    steps: list[Json] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for step in chosen.reader.iter_steps(message.id):
        steps.append({**_step(step, tokens), "run": decoder.decode(step.token_bytes)})
        if progress is not None:
            progress(done + len(steps), chosen.steps)
    how = message.reason or ""
    return {
        "id": message.id,
        "count": len(steps),
        "status": f"{message.status}{f' ({how})' if how else ''}",
        "bad": message.status.value in ("failed", "interrupted"),
        "layers": capture.layers,
        "lens": None if capture.logit_lens_available else capture.lens_reason or "not available",
        "provenance": capture.evidence_provenance,
        "promptLen": len(head.prompt),
        "prompt": tokens.numbers(head.prompt.token_ids, head.prompt.tokens),
        "segments": list(head.prompt.segments),
        "facts": _facts(message, capture, head.generation, len(steps)),
        # [kind, first step, the step after the last] of all that is no answer.
        "parts": [[p.kind, p.start, p.end] for p in message.parts if p.kind != "answer"],
        "steps": steps,
    }


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
        speed = f"{count / message.seconds:.1f} tokens/s"
        facts.insert(4, ("duration", f"{message.seconds:.1f} s, {speed}"))
    return [[name, value] for name, value in facts]


def _sampling(generation: Generation) -> str:
    if not generation.do_sample:
        said = ["greedy"]
    else:
        said = [
            f"{name.replace('_', '-')} {value:g}"
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(generation, name)) is not None
        ] or ["sampled"]
    replaced = explain_generation(generation)
    return ", ".join([*said, *generation.others, *([replaced] if replaced else [])])


def _check(value: float | None, unit: str) -> str:
    if value is None:
        return "not run"
    return f"at most {value:.0e} {unit}".strip() if value else "no difference"


def _step(step: Step, tokens: _Tokens) -> Json:
    top = step.topk
    chosen = tokens.number(step.token_id, step.token)
    made: Json = {
        "token": chosen,
        "position": step.position,
        "special": int(step.is_special),
        "prob": _rounded(step.prob),
        "surprisal": _rounded(step.surprisal),
        "entropy": _rounded(step.entropy),
        "rank": step.rank,
        "sampled": _rounded(step.sampled_prob),
        "why": explain(step),
        "top": tokens.numbers(top.token_ids.tolist(), top.tokens),
        "topProb": [_rounded(value) for value in top.probs.tolist()],
        "attention": [
            _attention(layer, _EVIDENCE if layer is step.evidence else _ATTENTION)
            for layer in step.attention
        ],
    }
    if top.sampled_probs is not None:
        made["topSampled"] = [_rounded(value) for value in top.sampled_probs.tolist()]
    if step.lens is not None:
        lens = step.lens
        ids, shares = lens.token_ids[:, :_LENS], lens.probs[:, :_LENS]
        made["lens"] = [
            tokens.numbers(row.tolist(), texts[:_LENS])
            for row, texts in zip(ids, lens.tokens, strict=True)
        ]
        made["lensProb"] = [_thousandths(row.tolist()) for row in shares]
        made["lensRank"] = lens.chosen_rank.tolist()
        made["settle"] = lens.settle_layer
    return made


def _attention(layer: LayerAttention, most: int) -> list[Any]:
    """[layer, positions, weights in thousandths]."""
    return [
        layer.layer,
        layer.positions[:most].tolist(),
        _thousandths(layer.weights[:most].tolist()),
    ]


def _rounded(value: float | None) -> float | None:
    """Four digits, also of what is small; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:z.4g}")


def _thousandths(values: Sequence[float]) -> list[int | None]:
    return [round(value * 1000) if math.isfinite(value) else None for value in values]
