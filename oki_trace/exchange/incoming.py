"""Traces as records again, of version 2 and of version 1: the latter is the former with less.

What a trace does not say is not guessed. A number becomes NaN, a rank 0, and a
token known by its text alone gets an id below ``BLANK``, one for each text, so
that equal texts are still the same token. The one exception: of a token that
was chosen, whose id is known, every mention by text is that token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np

from oki_trace.errors import ExchangeError, UsageError
from oki_trace.exchange.fields import NAN, Fields, wrong
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import (
    Candidates,
    CapturePolicy,
    CaptureReport,
    Contender,
    Decision,
    Effect,
    Generation,
    LayerAttention,
    Lens,
    ModelChoice,
    Prompt,
    Sampling,
    Segment,
    Step,
    TensorMode,
    TurnStart,
)

# Limits; docs/formats.md states them.
MAX_PROMPT = 4_000_000
MAX_STEPS = 1_000_000
MAX_MESSAGES = 10_000
MAX_ENTRIES = 1_000
MAX_LAYERS = 1_000
MAX_LENS_CELLS = 200_000

_SPECIAL = re.compile(r"<\|[^<>|]{1,60}\|>|</?(s|eos|bos|pad)>")


class TokenIds:
    """Ids for the tokens of one reply that the file knows by their text alone."""

    def __init__(self, known: Sequence[tuple[str, int]] = ()) -> None:
        self._by_text = dict(known)
        self._next = BLANK - 1

    def of(self, token_id: int | None, text: str) -> int:
        if token_id is not None:
            return token_id
        if text not in self._by_text:
            self._by_text[text] = self._next
            self._next -= 1
        return self._by_text[text]


# ------------------------------------------------------------------------ the head


def turn_start(trace: Fields, ids: TokenIds, first_steps: Sequence[Any] = ()) -> TurnStart:
    """What is known of a reply before its steps.

    ``first_steps``, of version 1, say what its head does not: how long the
    prompt was, and which tokens stand in it.
    """
    capture = trace.object("capture")
    generation = trace.object("generation")
    return TurnStart(
        model_id=trace.text("model_id", "unknown", most=10_000),
        prompt=_prompt(trace, ids, first_steps),
        generation=_generation(generation or Fields({}, trace.where), len(first_steps)),
        capture=_report(capture, trace) if capture else _report_v1(trace, first_steps),
    )


def _prompt(trace: Fields, ids: TokenIds, steps: Sequence[Any]) -> Prompt:
    text = trace.text("prompt", "")
    tokens = trace.texts("prompt_tokens", MAX_PROMPT, None)
    if tokens is None:
        length, seen = _seen_in_prompt(trace, steps)
        tokens = tuple(seen.get(position, "") for position in range(length))
    known = trace.list("prompt_token_ids", MAX_PROMPT, [None] * len(tokens))
    segments = trace.texts("prompt_segments", MAX_PROMPT, ("template",) * len(tokens))
    if not len(tokens) == len(known) == len(segments):
        raise wrong(f"{trace.where}: the prompt's tokens, ids and segments are not as many")
    if trace.integer("prompt_len", len(tokens)) != len(tokens):
        raise trace.wrong("prompt_len", "is not the number of the prompt's tokens")
    if not set(segments) <= set(get_args(Segment)):
        raise trace.wrong("prompt_segments", "names a segment there is not")
    if not all(i is None or (type(i) is int and 0 <= i < 2**31) for i in known):
        raise trace.wrong("prompt_token_ids", "is no list of token ids")
    return Prompt(
        text=text,
        token_ids=tuple(ids.of(i, token) for i, token in zip(known, tokens, strict=True)),
        tokens=tokens,
        segments=cast("tuple[Segment, ...]", segments),
    )


def _seen_in_prompt(trace: Fields, steps: Sequence[Any]) -> tuple[int, dict[int, str]]:
    """The prompt's length, and those of its tokens that some step's evidence names.

    Where no length is given, evidence in the reply tells it; else it is the
    least that lets every step have seen only what stood before it.
    """
    seen: dict[int, str] = {}
    least, told = 0, None
    for index, step in enumerate(steps):
        for entry in Fields(step, f"step {index}").objects("evidence", MAX_ENTRIES):
            position = entry.integer("position", high=MAX_PROMPT + MAX_STEPS)
            least = max(least, position - index + 1)
            relative = entry.integer("relative", None, low=-MAX_PROMPT)
            if relative is not None and relative >= 0:
                told = position - relative
            seen.setdefault(position, entry.text("token", ""))
    length = trace.integer("prompt_len", least if told is None else told, high=MAX_PROMPT)
    return length, {position: token for position, token in seen.items() if position < length}


def _generation(fields: Fields, steps: int) -> Generation:
    return Generation(
        do_sample=fields.flag("do_sample", False),
        max_new_tokens=fields.integer("max_new_tokens", steps, high=2**53),
        temperature=fields.number("temperature", None),
        top_p=fields.number("top_p", None),
        top_k=fields.integer("top_k", None, high=2**53),
        repetition_penalty=fields.number("repetition_penalty", None),
        seed=fields.integer("seed", None, high=2**64),
        eos_token_ids=fields.integers("eos_token_ids", MAX_ENTRIES, ()),
        others=fields.texts("others", MAX_ENTRIES, ()),
        replaced=fields.texts("replaced", MAX_ENTRIES, ()),
    )


def _report(fields: Fields, trace: Fields) -> CaptureReport:
    kept = fields.object("policy")
    return CaptureReport(
        policy=policy(kept) if kept else CapturePolicy(tensors="none"),
        layers=fields.integer("layers", high=MAX_LAYERS),
        width=fields.integer("width", 0),
        dtype=fields.text("dtype", "unknown", most=100),
        device=fields.text("device", "unknown", most=100),
        quantization=fields.text("quantization", None, most=1000),
        evidence_provenance=trace.text("evidence_provenance", ""),
        attention_layers=fields.integers("attention_layers", MAX_LAYERS, ()),
        attention_check=fields.number("attention_check", None),
        logit_lens_available=trace.flag("logit_lens_available", False),
        lens_reason=fields.text("lens_reason", None),
        lens_check=fields.number("lens_check", None),
        versions=fields.text("versions", "unknown", most=10_000),
        lens_draft=fields.number("lens_draft", None),
    )


def _report_v1(trace: Fields, steps: Sequence[Any]) -> CaptureReport:
    """As much of a report as the steps themselves tell."""
    layers, most, attention = 0, [1, 1, 1], False
    for index, step in enumerate(steps):
        fields = Fields(step, f"step {index}")
        rows = list(fields.objects("logit_lens", MAX_LAYERS + 1))
        layers = max([layers, *(row.integer("layer", high=MAX_LAYERS) for row in rows)])
        counts = (
            len(fields.list("logits_topk", MAX_ENTRIES, [])),
            len(fields.list("evidence", MAX_ENTRIES, [])),
            max([0, *(len(row.list("topk", MAX_ENTRIES, [])) for row in rows)]),
        )
        attention = attention or counts[1] > 0
        most = [max(pair) for pair in zip(most, counts, strict=True)]
    available = trace.flag("logit_lens_available", layers > 0)
    return CaptureReport(
        policy=CapturePolicy(most[0], most[1], most[2], "none"),
        layers=layers,
        width=0,
        dtype="unknown",
        device="unknown",
        quantization=None,
        evidence_provenance=trace.text("evidence_provenance", "not said"),
        attention_layers=(layers,) if attention else (),
        attention_check=None,
        logit_lens_available=available,
        lens_reason=None if available else "not in the imported trace",
        lens_check=None,
        versions="imported from trace version 1",
    )


def policy(fields: Fields) -> CapturePolicy:
    mode = fields.text("tensors", "none")
    try:
        return CapturePolicy(
            fields.integer("topk_logits", 10),
            fields.integer("topk_evidence", 10),
            fields.integer("topk_lens", 5),
            cast("TensorMode", mode),
        )
    except UsageError as error:
        raise _as_told(fields, error) from error


def sampling(fields: Fields) -> Sampling:
    try:
        return Sampling(
            fields.integer("max_new_tokens", 256, high=2**53),
            fields.number("temperature", None),
            fields.number("top_p", None),
            fields.integer("top_k", None, high=2**53),
            fields.number("repetition_penalty", None),
            fields.integer("seed", None, high=2**63),
        )
    except UsageError as error:
        raise _as_told(fields, error) from error


def choice(fields: Fields) -> ModelChoice:
    return ModelChoice(
        fields.text("model_id", most=10_000),
        fields.flag("use_4bit", False),
        fields.text("dtype", "auto", most=100),
        fields.text("device", "auto", most=100),
    )


def _as_told(fields: Fields, error: UsageError) -> ExchangeError:
    return wrong(f"{fields.where}: {str(error).rstrip('.')}")


# ------------------------------------------------------------------------- a step


def step(fields: Fields, index: int, start: TurnStart, ids: TokenIds, first: int = 0) -> Step:
    """Step ``index``; the file counts from ``first``."""
    if fields.integer("step", index + first) != index + first:
        raise fields.wrong("step", f"is not {index + first}: steps are missing, or out of order")
    prompt_len = len(start.prompt)
    position = fields.integer("position", prompt_len + index)
    if position != prompt_len + index:
        raise fields.wrong("position", f"is not {prompt_len + index}")
    token = fields.text("chosen_token")
    token_id = ids.of(fields.integer("chosen_id", None), token)
    topk = _candidates(list(fields.objects("logits_topk", MAX_ENTRIES)), ids)
    found = np.flatnonzero(topk.token_ids == token_id)
    at = int(found[0]) if found.size else None
    prob = fields.number("prob", NAN if at is None else float(topk.probs[at]))
    margin = float(topk.probs[0] - topk.probs[1]) if len(topk.tokens) > 1 else NAN
    decision = fields.object("decision")
    return Step(
        step_index=index,
        position=position,
        token_id=token_id,
        token=token,
        token_bytes=_bytes(fields, token),
        is_special=fields.flag("is_special", _SPECIAL.fullmatch(token) is not None),
        logit=fields.number("logit", NAN if at is None else float(topk.logits[at])),
        prob=prob,
        logprob=fields.number("logprob", math.log(prob) if prob > 0 else NAN),
        entropy=fields.number("entropy"),
        rank=fields.integer("rank", 0 if at is None else at + 1),
        margin=fields.number("margin", margin),
        sampled_prob=fields.number("sampled_prob", None),
        elapsed_ms=fields.number("elapsed_ms"),
        topk=topk,
        attention=_attention(fields, start.capture, position),
        lens=_lens(fields, index, token_id, ids),
        decision=_decision(decision, ids) if decision else None,
    )


def _bytes(fields: Fields, token: str) -> bytes:
    text = fields.text("chosen_bytes", None, most=100_000)
    if text is None:
        return token.encode("utf-8", errors="replace")
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise fields.wrong("chosen_bytes", "are no hexadecimal bytes") from error


def _entry(entry: Fields, ids: TokenIds) -> tuple[int, str, float, float]:
    token = entry.text("token")
    token_id = ids.of(entry.integer("token_id", None), token)
    return token_id, token, entry.number("logit"), entry.number("prob")


def _candidates(entries: Sequence[Fields], ids: TokenIds) -> Candidates:
    rows = [_entry(entry, ids) for entry in entries]
    return Candidates(
        token_ids=np.array([row[0] for row in rows], dtype=np.int64),
        tokens=tuple(row[1] for row in rows),
        logits=np.array([row[2] for row in rows], dtype=np.float32),
        probs=np.array([row[3] for row in rows], dtype=np.float32),
        sampled_probs=_optional(entries, "sampled_prob"),
        noise=_optional(entries, "noise"),
    )


def _optional(entries: Sequence[Fields], name: str) -> Any:
    if not any(name in entry for entry in entries):
        return None
    return np.array([entry.number(name) for entry in entries], dtype=np.float32)


def _attention(fields: Fields, capture: CaptureReport, position: int) -> tuple[LayerAttention, ...]:
    """Of every layer; of the last alone where there is evidence and nothing else."""
    layers = list(fields.objects("attention", MAX_LAYERS))
    if not layers and "evidence" in fields and fields.list("evidence", MAX_ENTRIES):
        entries = list(fields.objects("evidence", MAX_ENTRIES))
        last = capture.attention_layers[-1] if capture.attention_layers else capture.layers
        return (_attended(entries, last, NAN, position),)
    found = tuple(
        _attended(
            list(layer.objects("topk", MAX_ENTRIES)),
            layer.integer("layer", high=MAX_LAYERS),
            layer.number("missing"),
            position,
        )
        for layer in layers
    )
    numbers = [layer.layer for layer in found]
    if numbers != sorted(set(numbers)):
        raise fields.wrong("attention", "has its layers twice, or out of order")
    return found


def _attended(
    entries: Sequence[Fields], layer: int, missing: float, position: int
) -> LayerAttention:
    return LayerAttention(
        layer=layer,
        positions=np.array(
            [entry.integer("position", high=position - 1) for entry in entries], dtype=np.int64
        ),
        weights=np.array([entry.number("weight") for entry in entries], dtype=np.float32),
        missing=missing,
    )


def _lens(fields: Fields, index: int, token_id: int, ids: TokenIds) -> Lens | None:
    rows: dict[int, Fields] = {}
    for row in fields.objects("logit_lens", MAX_LAYERS + 1):
        layer = row.integer("layer", high=MAX_LAYERS)
        if layer in rows:
            raise row.wrong("layer", "is there twice")
        rows[layer] = row
    if not rows:
        return None
    entries = {
        layer: [_entry(entry, ids) for entry in row.objects("topk", MAX_ENTRIES)]
        for layer, row in rows.items()
    }
    count, k = max(rows) + 1, max(map(len, entries.values()))
    if count * k > MAX_LENS_CELLS:
        raise fields.wrong("logit_lens", f"has more than {MAX_LENS_CELLS:,} entries")
    blank = (BLANK, "", NAN, NAN)
    cells = [[*(of := entries.get(layer, [])), *[blank] * (k - len(of))] for layer in range(count)]
    nothing = Fields({}, fields.where)
    ranks, probs = [], []
    for layer, row_cells in enumerate(cells):
        at = next((n for n, cell in enumerate(row_cells) if cell[0] == token_id), None)
        row = rows.get(layer, nothing)
        ranks.append(row.integer("chosen_rank", 0 if at is None else at + 1))
        probs.append(row.number("chosen_prob", NAN if at is None else row_cells[at][3]))

    def column(place: int, dtype: Any) -> Any:
        values = [[cell[place] for cell in row_cells] for row_cells in cells]
        return np.array(values, dtype=dtype).reshape(count, k)

    return Lens(
        step_index=index,
        token_ids=column(0, np.int64),
        tokens=tuple(tuple(cell[1] for cell in row_cells) for row_cells in cells),
        logits=column(2, np.float32),
        probs=column(3, np.float32),
        entropy=_per_layer(rows, count, "entropy"),
        chosen_rank=np.array(ranks, dtype=np.int64),
        chosen_prob=np.array(probs, dtype=np.float32),
        kl=_per_layer(rows, count, "kl"),
    )


def _per_layer(rows: dict[int, Fields], count: int, name: str) -> Any:
    values = [rows[n].number(name) if n in rows else NAN for n in range(count)]
    return np.array(values, dtype=np.float32)


def _decision(fields: Fields, ids: TokenIds) -> Decision:
    greedy = fields.object("greedy")
    if greedy is None:
        raise fields.wrong("greedy", "is missing")
    runner_up = fields.object("runner_up")
    return Decision(
        drawn=fields.flag("drawn"),
        effects=tuple(
            Effect(
                effect.text("name", most=1000),
                effect.text("setting", most=1000),
                effect.integer("removed", high=2**53),
                effect.number("removed_mass"),
                effect.number("chosen_prob"),
            )
            for effect in fields.objects("processors", MAX_ENTRIES)
        ),
        candidates=fields.integer("candidates"),
        noise=fields.number("noise", None),
        greedy=_contender(greedy, ids),
        runner_up=_contender(runner_up, ids) if runner_up else None,
    )


def _contender(fields: Fields, ids: TokenIds) -> Contender:
    token = fields.text("token")
    return Contender(
        token_id=ids.of(fields.integer("token_id", None), token),
        token=token,
        prob=fields.number("sampled_prob"),
        noise=fields.number("noise", None),
    )


def chosen_tokens(steps: Sequence[Any]) -> list[tuple[str, int]]:
    """(text, id) of the chosen tokens that have an id."""
    found = []
    for index, step in enumerate(steps):
        fields = Fields(step, f"step {index}")
        token_id = fields.integer("chosen_id", None)
        if token_id is not None:
            found.append((fields.text("chosen_token"), token_id))
    return found
