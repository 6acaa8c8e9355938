"""Builds a reply, without its steps, from the validated fields of a file.

``validation`` has checked each field by itself; this module checks several together.
Nothing is invented: a missing number becomes NaN, a missing rank 0, and a token of
which only the text is known gets an id below ``BLANK``, the same for the same text.
There is one exception: if the id of a chosen token is known, every token with that
text gets the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.validation import value_or
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import CapturePolicy, CaptureReport, Generation, Part, Prompt, TurnStart

# Tokens of a prompt that may have no text, such as special ones.
_TEXTLESS = 100_000


class TokenIds:
    """Ids for the tokens of one reply of which the file has only the text."""

    def __init__(self, known: dict[str, int] | None = None) -> None:
        self._by_text = dict(known or {})
        self._next = BLANK - 1

    def of(self, token_id: int | None, text: str) -> int:
        if token_id is not None:
            return token_id
        if text not in self._by_text:
            self._by_text[text] = self._next
            self._next -= 1
        return self._by_text[text]


@dataclass
class Survey:
    """Facts that the head of a version 1 trace lacks, collected from its steps."""

    steps: int = 0
    first: int = 0
    layers: int = 0
    topk: tuple[int, int, int] = (1, 1, 1)  # candidates, evidence, lens
    has_evidence: bool = False
    chosen: dict[str, int] = field(default_factory=dict)
    prompt_tokens: dict[int, str] = field(default_factory=dict)
    _least_prompt_len: int = 0
    _known_prompt_len: int | None = None

    def add(self, step: validation.Step) -> None:
        """The next step. Some trace writers count from 1."""
        index, self.steps = self.steps, self.steps + 1
        if self.steps > validation.MAX_STEPS:
            raise refused(f"a reply has more than {validation.MAX_STEPS:,} steps")
        if index == 0:
            self.first = int(step.get("step") == 1)
        token_id = step.get("chosen_id")
        if token_id is not None:
            self.chosen[step["chosen_token"]] = token_id
        candidates, evidence, lens = self.topk
        for row in step.get("logit_lens") or ():
            self.layers = max(self.layers, row["layer"])
            lens = max(lens, len(row.get("topk") or ()))
        entries = step.get("evidence") or ()
        candidates = max(candidates, len(step.get("logits_topk") or ()))
        self.topk = (candidates, max(evidence, len(entries)), lens)
        self.has_evidence = self.has_evidence or len(entries) > 0
        for entry in entries:
            position, relative = entry["position"], entry.get("relative")
            self._least_prompt_len = max(self._least_prompt_len, position - index + 1)
            if relative is not None and relative >= 0:
                self._known_prompt_len = position - relative
            self.prompt_tokens.setdefault(position, entry.get("token") or "")

    @property
    def prompt_len(self) -> int:
        """From evidence inside the reply; else the least with which no step looks ahead."""
        known = self._known_prompt_len
        return self._least_prompt_len if known is None else known


def turn_start(
    trace: validation.Trace, ids: TokenIds, survey: Survey | None, where: str
) -> TurnStart:
    """A reply before its first step; ``survey`` where the trace has no ``capture``."""
    survey = survey or Survey()
    capture = trace.get("capture") or _capture_v1(trace, survey)
    layers = capture.attention_layers
    if list(layers) != sorted(set(layers)) or max(layers, default=0) > capture.layers:
        raise refused(f"{where}, capture: attention_layers are not layers in ascending order")
    prompt = _prompt(trace, ids, survey, where)
    prefix_len = value_or(trace, "prefix_len", 0)
    if prefix_len > len(prompt):
        raise refused(f"{where}: prefix_len is {prefix_len:,}, more tokens than its prompt has")
    return TurnStart(
        model_id=value_or(trace, "model_id", "unknown"),
        prompt=prompt,
        prefix_len=prefix_len,
        generation=trace.get("generation")
        or Generation(**{**validation.GENERATION, "max_new_tokens": survey.steps}),
        capture=capture,
    )


def _prompt(trace: validation.Trace, ids: TokenIds, survey: Survey, where: str) -> Prompt:
    text = value_or(trace, "prompt", "")
    tokens = trace.get("prompt_tokens")
    if tokens is None:
        length = value_or(trace, "prompt_len", survey.prompt_len)
        known = {at: token for at, token in survey.prompt_tokens.items() if at < length}
        if not 0 <= length <= len(known) + len(text.encode()) + _TEXTLESS:
            raise refused(f"{where}: prompt_len is {length:,}, more than the prompt allows")
        tokens = [known.get(position, "") for position in range(length)]
    token_ids = trace.get("prompt_token_ids") or [None] * len(tokens)
    segments = trace.get("prompt_segments") or ["template"] * len(tokens)
    if not len(tokens) == len(token_ids) == len(segments):
        raise refused(f"{where}: the prompt has different numbers of tokens, ids and segments")
    if value_or(trace, "prompt_len", len(tokens)) != len(tokens):
        raise refused(f"{where}: prompt_len is not the number of the prompt's tokens")
    return Prompt(
        text=text,
        token_ids=tuple(map(ids.of, token_ids, tokens)),
        tokens=tuple(tokens),
        segments=tuple(segments),
    )


def _capture_v1(trace: validation.Trace, survey: Survey) -> CaptureReport:
    """The part of a report that follows from the steps."""
    candidates, evidence, lens = survey.topk
    available = value_or(trace, "logit_lens_available", survey.layers > 0)
    known = {
        "policy": CapturePolicy(candidates, evidence, lens, tensors="none"),
        "layers": survey.layers,
        "evidence_provenance": value_or(trace, "evidence_provenance", "not recorded"),
        "attention_layers": (survey.layers,) if survey.has_evidence else (),
        "logit_lens_available": available,
        "lens_reason": None if available else "not in the imported trace",
        "versions": "imported from trace version 1",
    }
    return CaptureReport(**{**validation.CAPTURE, **known})


def reply_parts(
    parts: Sequence[validation.Part] | None, steps: int, where: str
) -> tuple[Part, ...]:
    """The parts of a reply of ``steps`` steps, each of which begins where the last one ends."""
    checked: list[Part] = []
    before = 0
    for part in parts or ():
        start, end = value_or(part, "start", before), value_or(part, "end", before)
        if not before <= start <= end <= steps:
            raise refused(f"{where}, parts: they overlap or exceed its {steps:,} steps")
        before = end
        checked.append(Part(**{**part, "start": start, "end": end}))
    return tuple(checked)
