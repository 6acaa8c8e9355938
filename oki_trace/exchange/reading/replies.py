"""What is known of a reply before its steps, of what a file says.

``schema`` has checked each field by itself; here is checked what concerns
several. What a trace does not say is not guessed: a number becomes NaN, a rank
0, and a token known by its text alone gets an id below ``BLANK``, one for each
text, so that equal texts are still the same token. The one exception: of a
token that was chosen, whose id is known, every mention by text is that token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from oki_trace.errors import UsageError
from oki_trace.exchange import schema
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.schema import known
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import (
    CapturePolicy,
    CaptureReport,
    Generation,
    Part,
    Prompt,
    ReplyChecks,
    TemplateOptions,
    TurnStart,
)

# Tokens of a prompt that may have no text of their own, such as special ones.
_TEXTLESS = 100_000


class TokenIds:
    """Ids for the tokens of one reply that the file knows by their text alone."""

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
    """What the steps of version 1 tell that its head does not."""

    steps: int = 0
    first: int = 0
    layers: int = 0
    most: list[int] = field(default_factory=lambda: [1, 1, 1])
    attention: bool = False
    chosen: dict[str, int] = field(default_factory=dict)
    least_prompt: int = 0
    told_prompt: int | None = None
    in_prompt: dict[int, str] = field(default_factory=dict)

    def add(self, step: schema.Step) -> None:
        """The next step. Some trace writers count from 1."""
        index, self.steps = self.steps, self.steps + 1
        if self.steps > schema.MAX_STEPS:
            raise refused(f"a reply has more than {schema.MAX_STEPS:,} steps")
        if index == 0:
            self.first = int(step.get("step") == 1)
        token_id = step.get("chosen_id")
        if token_id is not None:
            self.chosen[step["chosen_token"]] = token_id
        rows = step.get("logit_lens") or ()
        self.layers = max([self.layers, *(row["layer"] for row in rows)])
        counts = (
            len(step.get("logits_topk") or ()),
            len(step.get("evidence") or ()),
            max([0, *(len(row.get("topk") or ()) for row in rows)]),
        )
        self.attention = self.attention or counts[1] > 0
        self.most = [max(pair) for pair in zip(self.most, counts, strict=True)]
        for entry in step.get("evidence") or ():
            position, relative = entry["position"], entry.get("relative")
            self.least_prompt = max(self.least_prompt, position - index + 1)
            if relative is not None and relative >= 0:
                self.told_prompt = position - relative
            self.in_prompt.setdefault(position, entry.get("token") or "")

    @property
    def prompt_len(self) -> int:
        """As evidence in the reply tells it; else the least with which no step looks ahead."""
        return self.least_prompt if self.told_prompt is None else self.told_prompt


def turn_start(trace: schema.Trace, ids: TokenIds, survey: Survey | None, where: str) -> TurnStart:
    """What is known of a reply before its steps; ``survey`` where it has no capture."""
    survey = survey or Survey()
    capture = trace.get("capture")
    return TurnStart(
        model_id=known(trace, "model_id", "unknown"),
        prompt=_prompt(trace, ids, survey, where),
        generation=_generation(trace.get("generation") or {}, survey.steps),
        capture=_report(capture, where) if capture else _report_v1(trace, survey),
    )


def _prompt(trace: schema.Trace, ids: TokenIds, survey: Survey, where: str) -> Prompt:
    text = known(trace, "prompt", "")
    tokens = trace.get("prompt_tokens")
    if tokens is None:
        length = known(trace, "prompt_len", survey.prompt_len)
        seen = {at: token for at, token in survey.in_prompt.items() if at < length}
        if not 0 <= length <= len(seen) + len(text.encode()) + _TEXTLESS:
            raise refused(f"{where}: prompt_len is {length:,}, more tokens than its prompt can be")
        tokens = [seen.get(position, "") for position in range(length)]
    token_ids = trace.get("prompt_token_ids") or [None] * len(tokens)
    segments = trace.get("prompt_segments") or ["template"] * len(tokens)
    if not len(tokens) == len(token_ids) == len(segments):
        raise refused(f"{where}: the prompt's tokens, ids and segments are not as many")
    if known(trace, "prompt_len", len(tokens)) != len(tokens):
        raise refused(f"{where}: prompt_len is not the number of the prompt's tokens")
    return Prompt(
        text=text,
        token_ids=tuple(ids.of(i, token) for i, token in zip(token_ids, tokens, strict=True)),
        tokens=tuple(tokens),
        segments=tuple(segments),
    )


def _generation(values: schema.Generation, steps: int) -> Generation:
    return Generation(
        do_sample=known(values, "do_sample", False),
        max_new_tokens=known(values, "max_new_tokens", steps),
        temperature=values.get("temperature"),
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        repetition_penalty=values.get("repetition_penalty"),
        seed=values.get("seed"),
        eos_token_ids=tuple(values.get("eos_token_ids") or ()),
        others=tuple(values.get("others") or ()),
        replaced=tuple(values.get("replaced") or ()),
    )


def _report(values: schema.Capture, where: str) -> CaptureReport:
    layers = values["layers"]
    attention = tuple(values.get("attention_layers") or ())
    if list(attention) != sorted(set(attention)) or max(attention, default=0) > layers:
        raise refused(f"{where}, capture: attention_layers are no layers in rising order")
    return CaptureReport(
        policy=known(values, "policy", CapturePolicy(tensors="none")),
        layers=layers,
        width=known(values, "width", 0),
        dtype=known(values, "dtype", "unknown"),
        device=known(values, "device", "unknown"),
        quantization=values.get("quantization"),
        evidence_provenance=known(values, "evidence_provenance", ""),
        attention_layers=attention,
        attention_check=values.get("attention_check"),
        logit_lens_available=known(values, "logit_lens_available", False),
        lens_reason=values.get("lens_reason"),
        lens_check=values.get("lens_check"),
        versions=known(values, "versions", "unknown"),
        lens_draft=values.get("lens_draft"),
        cache_check=values.get("cache_check"),
        speedups=values.get("speedups") or {},
        tensors_left_out=known(values, "tensors_left_out", False),
    )


def reply_parts(values: list[schema.Part] | None, steps: int, where: str) -> tuple[Part, ...]:
    """The parts of a reply of so many ``steps``, which follow one another."""
    parts = []
    before = 0
    for value in values or ():
        start, end = known(value, "start", before), known(value, "end", before)
        if not before <= start <= end <= steps:
            raise refused(f"{where}, parts: they do not follow one another in its {steps:,} steps")
        before = end
        name, arguments = value.get("name"), value.get("arguments")
        parts.append(Part(value["kind"], value["text"], start, end, name, arguments))
    return tuple(parts)


def template_options(values: schema.Template | None, where: str) -> TemplateOptions | None:
    """What the chat template was given."""
    if values is None:
        return None
    try:
        return TemplateOptions(values.get("arguments") or {}, tuple(values.get("tools") or ()))
    except UsageError as error:
        raise refused(f"{where}, template: {str(error).rstrip('.')}") from error


def reply_checks(values: schema.Checks | None) -> ReplyChecks | None:
    """How far the reply's numbers agreed with its model."""
    if values is None:
        return None
    return ReplyChecks(
        steps=tuple(values.get("steps") or ()),
        lens=values.get("lens"),
        draft=values.get("draft"),
        attention=values.get("attention"),
        fault=values.get("fault"),
        notes=tuple(values.get("notes") or ()),
    )


def _report_v1(trace: schema.Trace, survey: Survey) -> CaptureReport:
    """As much of a report as the steps themselves tell."""
    available = known(trace, "logit_lens_available", survey.layers > 0)
    return CaptureReport(
        policy=CapturePolicy(
            topk_logits=survey.most[0],
            topk_evidence=survey.most[1],
            topk_lens=survey.most[2],
            tensors="none",
        ),
        layers=survey.layers,
        width=0,
        dtype="unknown",
        device="unknown",
        quantization=None,
        evidence_provenance=known(trace, "evidence_provenance", "not said"),
        attention_layers=(survey.layers,) if survey.attention else (),
        attention_check=None,
        logit_lens_available=available,
        lens_reason=None if available else "not in the imported trace",
        lens_check=None,
        versions="imported from trace version 1",
    )
