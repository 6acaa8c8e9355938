"""Builds a step and its full tensors from the validated fields of a file.

``validation`` has checked each field by itself; this module checks several together.
Nothing is invented (see ``replies``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np

from oki_trace.exchange.reading import validation
from oki_trace.exchange.reading.lenses import LensReader
from oki_trace.exchange.reading.lists import (
    check_falling,
    check_ranks,
    floats,
    optional_floats,
)
from oki_trace.exchange.reading.replies import TokenIds
from oki_trace.exchange.reading.validation import value_or
from oki_trace.exchange.refusal import refused
from oki_trace.records import (
    Candidates,
    CaptureReport,
    Contender,
    Decision,
    LayerAttention,
    LayerRouting,
    Step,
    TensorRecord,
    TurnStart,
)

NAN = float("nan")

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
    lens, lenses = LensReader(index, token_id, start.capture, ids, where).read(values)
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
        lens=lens,
        lenses=lenses,
        router=_router(values, start.capture.layers, where),
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
    check_ranks(entries, where)
    logits, probs = floats(entries, "logit"), floats(entries, "prob")
    check_falling(logits, where, "logit")
    check_falling(probs, where, "prob")
    return Candidates(
        token_ids=np.array([ids.of(e.get("token_id"), e["token"]) for e in entries], np.int64),
        tokens=tuple([e["token"] for e in entries]),
        logits=logits,
        probs=probs,
        sampled_probs=optional_floats(entries, "sampled_prob"),
        noise=optional_floats(entries, "noise"),
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
    weights = floats(entries, "weight")
    if positions.max(initial=-1) >= position:
        raise refused(
            f"{where}: attention reaches position {positions.max()}, but it is at {position}"
        )
    list_numbers = np.repeat(np.arange(len(lists)), [len(entries) for entries in lists])
    check_falling(weights, f"{where}, attention", "weight", list_numbers)
    begin = 0
    records = []
    for layer, entries in zip(layers, lists, strict=True):
        here = f"{where}, attention of layer {layer['layer']}"
        check_ranks(entries, here)
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
        weights = floats(evidence, "weight")
        if not same or not np.array_equal(weights, last.weights, equal_nan=True):
            raise refused(f"{where}: evidence is not the attention of the last layer")
    return tuple(records)


def _router(values: validation.Step, layers: int, where: str) -> tuple[LayerRouting, ...]:
    """The experts of the layers that have any."""
    routing = []
    numbers = [layer["layer"] for layer in values.get("router") or ()]
    if numbers != sorted(set(numbers)):
        raise refused(f"{where}: router has a layer twice, or out of order")
    if numbers and not 1 <= numbers[0] <= numbers[-1] <= layers:
        raise refused(f"{where}: router has a layer that the model does not have")
    for layer in values.get("router") or ():
        here = f"{where}, router of layer {layer['layer']}"
        entries = layer.get("topk") or []
        if not entries:
            raise refused(f"{here}: it has no expert")
        check_ranks(entries, here)
        experts = [entry["expert"] for entry in entries]
        if len(set(experts)) != len(experts):
            raise refused(f"{here}: it has an expert twice")
        weights = floats(entries, "weight")
        check_falling(weights, here, "weight")
        routing.append(LayerRouting(layer["layer"], np.array(experts, dtype=np.int64), weights))
    return tuple(routing)


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
