"""Builds a step and its full tensors from the validated fields of a file.

``validation`` has checked each field by itself; this module checks several together.
Nothing is invented (see ``replies``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.replies import TokenIds
from oki_trace.exchange.reading.validation import value_or
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import (
    Candidates,
    CaptureReport,
    Contender,
    Decision,
    LayerAttention,
    Lens,
    Step,
    TensorRecord,
    TurnStart,
)

NAN = float("nan")

# How far the entries of a list may be out of order: exp() is not monotone to the last bit.
_ORDER = 1e-5
_SPECIAL = re.compile(r"<\|[^<>|]{1,60}\|>|</?(s|eos|bos|pad)>")


class StepReader:
    """Builds the steps of one reply: the generated ones in order, and the given ones in theirs.

    The file counts generated steps from ``first``. Raises ExchangeError.
    """

    def __init__(self, start: TurnStart, ids: TokenIds, first: int, where: str) -> None:
        self._start = start
        self._ids = ids
        self._first = first
        self._where = where
        self._generated = 0
        self._given = 0
        self._last_position = 0

    def name_of_next(self, *, given: bool) -> str:
        """The next step of its kind, as errors name it."""
        kind, count = ("prompt step", self._given) if given else ("step", self._generated)
        return f"{self._where}, {kind} {count}"

    def read(self, values: validation.Step, *, given: bool) -> Step:
        """The next step; ``given``: it is in the place of given ones."""
        where = self.name_of_next(given=given)
        if given != (value_or(values, "origin", "given" if given else "sampled") == "given"):
            raise refused(f"{where}: its origin cannot be {values['origin']!r}")
        place = self._next_given if given else self._next_generated
        return _record(values, *place(values, where), self._start, self._ids, where)

    def _next_generated(self, values: validation.Step, where: str) -> tuple[int, int]:
        """(step_index, position)."""
        index, number = self._generated, self._generated + self._first
        self._generated += 1
        if value_or(values, "step", number) != number:
            raise refused(f"{where}: it is not step {number}: steps are missing or out of order")
        position = len(self._start.prompt) + index
        if value_or(values, "position", position) != position:
            raise refused(f"{where}: position is not {position}")
        return index, position

    def _next_given(self, values: validation.Step, where: str) -> tuple[int, int]:
        self._given += 1
        position, prompt = values.get("position"), self._start.prompt
        if values.get("step") is not None or values.get("decision") is not None:
            raise refused(f"{where}: a given token has no step number and no decision")
        if position is None or not 1 <= position < len(prompt):
            raise refused(f"{where}: position is not that of a prompt token after the first")
        if position <= self._last_position:
            raise refused(f"{where}: positions are not in ascending order")
        self._last_position = position
        if (
            self._ids.of(values.get("chosen_id"), values["chosen_token"])
            != (prompt.token_ids[position])
        ):
            raise refused(f"{where}: it is not the prompt's token at position {position}")
        return -1, position


def _record(
    values: validation.Step,
    index: int,
    position: int,
    start: TurnStart,
    ids: TokenIds,
    where: str,
) -> Step:
    token = values["chosen_token"]
    token_id = ids.of(values.get("chosen_id"), token)
    topk = _candidates(values.get("logits_topk") or (), ids, where)
    rank, logit, prob = 0, NAN, NAN
    (chosen,) = np.nonzero(topk.token_ids == token_id)
    if chosen.size:
        at = int(chosen[0])
        rank, logit, prob = at + 1, float(topk.logits[at]), float(topk.probs[at])
    prob = value_or(values, "prob", prob)
    margin = float(topk.probs[0] - topk.probs[1]) if len(topk.tokens) > 1 else NAN
    decision = values.get("decision")
    return Step(
        step_index=index,
        position=position,
        token_id=token_id,
        token=token,
        token_bytes=value_or(values, "chosen_bytes", token.encode("utf-8")),
        is_special=value_or(values, "is_special", _SPECIAL.fullmatch(token) is not None),
        logit=value_or(values, "logit", logit),
        prob=prob,
        logprob=value_or(values, "logprob", _log(prob)),
        entropy=value_or(values, "entropy", NAN),
        rank=value_or(values, "rank", rank),
        margin=value_or(values, "margin", margin),
        sampled_prob=values.get("sampled_prob"),
        elapsed_ms=value_or(values, "elapsed_ms", NAN),
        topk=topk,
        attention=_attention(values, start.capture, position, where),
        lens=_lens(values, index, token_id, start.capture.layers, ids, where),
        decision=_decision(decision, ids) if decision else None,
        origin="given" if index < 0 else value_or(values, "origin", "sampled"),
        digest=values.get("digest"),
        tensor_digest=values.get("tensor_digest"),
    )


def _log(prob: float) -> float:
    """JSON has no infinity: the missing logprob of a probability of 0 was one."""
    return math.log(prob) if prob > 0 else -math.inf if prob == 0 else NAN


def _candidates(entries: Sequence[validation.Candidate], ids: TokenIds, where: str) -> Candidates:
    where = f"{where}, logits_topk"
    _check_ranks(entries, where)
    logits, probs = _floats(entries, "logit"), _floats(entries, "prob")
    _check_falling(logits, where, "logit")
    _check_falling(probs, where, "prob")
    return Candidates(
        token_ids=np.array([ids.of(e.get("token_id"), e["token"]) for e in entries], np.int64),
        tokens=tuple([e["token"] for e in entries]),
        logits=logits,
        probs=probs,
        sampled_probs=_optional_floats(entries, "sampled_prob"),
        noise=_optional_floats(entries, "noise"),
    )


def _attention(
    values: validation.Step, capture: CaptureReport, position: int, where: str
) -> tuple[LayerAttention, ...]:
    """The attention of every layer, or of the last alone if the file has only evidence."""
    layers = values.get("attention") or []
    evidence = values.get("evidence") or []
    if not layers and evidence:
        final = capture.attention_layers[-1] if capture.attention_layers else capture.layers
        layers = [{"layer": final, "topk": [*evidence]}]
    numbers = [layer["layer"] for layer in layers]
    if numbers != sorted(set(numbers)):
        raise refused(f"{where}: attention has a layer twice, or out of order")
    if not set(numbers) <= set(capture.attention_layers):
        raise refused(f"{where}: attention has layers that capture does not list")
    lists = [layer.get("topk") or [] for layer in layers]
    if sum(map(len, lists)) > validation.MAX_CELLS:
        raise refused(f"{where}: attention has more than {validation.MAX_CELLS:,} entries")
    # One array for all layers: a model has dozens, and each list is short.
    entries = list(chain.from_iterable(lists))
    positions = np.array([entry["position"] for entry in entries], dtype=np.int64)
    weights = _floats(entries, "weight")
    if positions.max(initial=-1) >= position:
        raise refused(
            f"{where}: attention reaches position {positions.max()}, but it is at {position}"
        )
    list_numbers = np.repeat(np.arange(len(lists)), [len(entries) for entries in lists])
    _check_falling(weights, f"{where}, attention", "weight", list_numbers)
    begin = 0
    records = []
    for layer, entries in zip(layers, lists, strict=True):
        here = f"{where}, attention of layer {layer['layer']}"
        _check_ranks(entries, here)
        if len({entry["position"] for entry in entries}) != len(entries):
            raise refused(f"{here}: it has a position twice")
        end = begin + len(entries)
        missing = value_or(layer, "missing", NAN)
        own = (positions[begin:end], weights[begin:end])
        records.append(LayerAttention(layer["layer"], *own, missing))
        begin = end
    if evidence and values.get("attention"):
        last = records[-1]
        same = [entry["position"] for entry in evidence] == last.positions.tolist()
        weights = _floats(evidence, "weight")
        if not same or not np.array_equal(weights, last.weights, equal_nan=True):
            raise refused(f"{where}: evidence is not the attention of the last layer")
    return tuple(records)


def _lens(
    values: validation.Step, index: int, token_id: int, layers: int, ids: TokenIds, where: str
) -> Lens | None:
    """A row for each layer of the model; a layer that the file does not have is blank."""
    rows: dict[int, validation.LensLayer] = {}
    for row in values.get("logit_lens") or ():
        here = f"{where}, logit_lens of layer {row['layer']}"
        if row["layer"] in rows:
            raise refused(f"{here}: it occurs twice")
        if row["layer"] > layers:
            raise refused(f"{here}: the model has {layers:,} layers")
        _check_ranks(row.get("topk") or (), here)
        rows[row["layer"]] = row
    if not rows:
        return None
    count = layers + 1
    k = max(1, *(len(row.get("topk") or ()) for row in rows.values()))
    if count * k > validation.MAX_CELLS:
        raise refused(f"{where}: logit_lens has more than {validation.MAX_CELLS:,} entries")
    blanks: list[validation.LensToken] = [{"token": ""}] * k
    missing: validation.LensLayer = {"layer": 0}
    cells: list[validation.LensToken] = []
    token_ids, tokens, numbers = [], [], []
    for layer in range(count):
        row = rows.get(layer, missing)
        entries = row.get("topk") or []
        own_ids = [ids.of(entry.get("token_id"), entry["token"]) for entry in entries]
        rank, prob = row.get("chosen_rank"), row.get("chosen_prob")
        if token_id in own_ids:
            at = own_ids.index(token_id)
            rank = at + 1 if rank is None else rank
            prob = entries[at].get("prob") if prob is None else prob
        numbers.append((rank or 0, prob, row.get("entropy"), row.get("kl")))
        short = k - len(entries)
        entries = entries + blanks[:short]
        cells += entries
        token_ids.append(own_ids + [BLANK] * short)
        tokens.append(tuple([entry["token"] for entry in entries]))
    ranks, probs, entropy, kl = zip(*numbers, strict=True)
    return Lens(
        step_index=index,
        token_ids=np.array(token_ids, dtype=np.int64),
        tokens=tuple(tokens),
        logits=_floats(cells, "logit").reshape(count, k),
        probs=_floats(cells, "prob").reshape(count, k),
        entropy=np.array(entropy, dtype=np.float32),
        chosen_rank=np.array(ranks, dtype=np.int64),
        chosen_prob=np.array(probs, dtype=np.float32) + np.float32(0),
        kl=np.array(kl, dtype=np.float32),
    )


def _decision(values: validation.Decision, ids: TokenIds) -> Decision:
    def contender(token: validation.Contender) -> Contender:
        text, prob = token["token"], value_or(token, "sampled_prob", NAN)
        return Contender(ids.of(token.get("token_id"), text), text, prob, token.get("noise"))

    runner_up = values.get("runner_up")
    return Decision(
        drawn=values["drawn"],
        effects=tuple(values.get("processors") or ()),
        candidates=values["candidates"],
        noise=values.get("noise"),
        greedy=contender(values["greedy"]),
        runner_up=contender(runner_up) if runner_up else None,
    )


def check_tensors(
    tensors: Sequence[TensorRecord], step: Step, capture: CaptureReport, where: str
) -> tuple[TensorRecord, ...]:
    """The full tensors of a step. Raises ExchangeError if they cannot belong to it."""
    if tensors and capture.policy.tensors == "none":
        raise refused(f"{where}: it has tensors, but its policy keeps none")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise refused(f"{where}: it has a tensor twice")
    for tensor in tensors:
        if misfit := _misfit(tensor, step, capture):
            raise refused(f"{where}: {tensor.name} {misfit}")
    return tuple(tensors)


def _misfit(tensor: TensorRecord, step: Step, capture: CaptureReport) -> str | None:
    shape = tensor.array.shape
    dimensions = {"logits": 1, "hidden_states": 2, "attentions": 3}[tensor.name]
    if len(shape) != dimensions or not tensor.array.size:
        return f"have the shape {shape}"
    if tensor.name == "logits" and step.token_id >= shape[0]:
        return f"have {shape[0]:,} entries, but its token id is {step.token_id:,}"
    if tensor.name == "hidden_states" and shape[0] != capture.layers + 1:
        return f"have {shape[0]:,} layers instead of {capture.layers + 1:,}"
    if tensor.name == "attentions":
        layers = list(tensor.layers)
        if len(layers) != shape[0] or not set(layers) <= set(capture.attention_layers):
            return "have layers that capture does not list"
        if tensor.key_offset + shape[2] > step.position:
            return f"extend beyond position {step.position - 1}"
    return None


# ------------------------------------------------------------------------- lists


def _floats(entries: Sequence[Any], name: str) -> Any:
    """As 32-bit floats: a missing number is NaN, and -0 becomes 0."""
    values = np.array([entry.get(name) for entry in entries], dtype=np.float32)
    return values + np.float32(0)


def _optional_floats(entries: Sequence[Any], name: str) -> Any:
    """None where no entry has the number."""
    if all(entry.get(name) is None for entry in entries):
        return None
    return _floats(entries, name)


def _check_ranks(entries: Iterable[Any], where: str) -> None:
    for rank, entry in enumerate(entries, start=1):
        if entry.get("rank") not in (None, rank):
            raise refused(f"{where}: the ranks of its entries are not 1, 2, 3 and so on")


def _check_falling(values: Any, where: str, name: str, list_numbers: Any = None) -> None:
    """The largest value comes first, in each of several lists."""
    finite = np.isfinite(values)
    values = values[finite]
    before, after = values[:-1], values[1:]
    rises = after > before + _ORDER * np.maximum(1, np.abs(before))
    if list_numbers is not None:
        numbers = list_numbers[finite]
        rises &= numbers[1:] == numbers[:-1]
    if rises.any():
        raise refused(f"{where}: its entries are not in the order of their {name}")
