"""A step and its full tensors, of what a file says.

``schema`` has checked each field by itself; here is checked what concerns
several. What is not said is not guessed (see ``replies``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from oki_trace.exchange import schema
from oki_trace.exchange.reading.replies import TokenIds
from oki_trace.exchange.refusal import refused
from oki_trace.exchange.schema import known
from oki_trace.exchange.trace_object import BLANK
from oki_trace.records import (
    Candidates,
    CaptureReport,
    Contender,
    Decision,
    Effect,
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


def step_record(
    values: schema.Step, index: int, start: TurnStart, ids: TokenIds, first: int, where: str
) -> Step:
    """Step ``index``; the file counts from ``first``."""
    if known(values, "step", index + first) != index + first:
        raise refused(f"{where}: it is not step {index + first}: steps are missing or out of order")
    position = len(start.prompt) + index
    if known(values, "position", position) != position:
        raise refused(f"{where}: position is not {position}")
    token = values["chosen_token"]
    token_id = ids.of(values.get("chosen_id"), token)
    topk = _candidates(values.get("logits_topk") or (), ids, where)
    found = np.flatnonzero(topk.token_ids == token_id)
    at = int(found[0]) if found.size else None
    prob = _number(values, "prob", NAN if at is None else float(topk.probs[at])) + 0.0
    margin = float(topk.probs[0] - topk.probs[1]) if len(topk.tokens) > 1 else NAN
    decision = values.get("decision")
    data = values.get("chosen_bytes")
    sampled_prob = values.get("sampled_prob")
    return Step(
        step_index=index,
        position=position,
        token_id=token_id,
        token=token,
        token_bytes=token.encode("utf-8") if data is None else data,
        is_special=known(values, "is_special", _SPECIAL.fullmatch(token) is not None),
        logit=_number(values, "logit", NAN if at is None else float(topk.logits[at])),
        prob=prob,
        logprob=_number(values, "logprob", _log(prob)),
        entropy=_number(values, "entropy"),
        rank=known(values, "rank", 0 if at is None else at + 1),
        margin=_number(values, "margin", margin) + 0.0,
        sampled_prob=None if sampled_prob is None else sampled_prob + 0.0,
        elapsed_ms=_number(values, "elapsed_ms") + 0.0,
        topk=topk,
        attention=_attention(values, start.capture, position, where),
        lens=_lens(values, index, token_id, start.capture.layers, ids, where),
        decision=_decision(decision, ids) if decision else None,
        digest=values.get("digest"),
        tensor_digest=values.get("tensor_digest"),
    )


def _log(prob: float) -> float:
    """JSON has no infinity: of a probability of 0, a logprob that is not there was one."""
    return math.log(prob) if prob > 0 else -math.inf if prob == 0 else NAN


def _candidates(entries: Sequence[schema.Candidate], ids: TokenIds, where: str) -> Candidates:
    where = f"{where}, logits_topk"
    _ranked(entries, where)
    logits, probs = _floats(entries, "logit"), _floats(entries, "prob")
    _falling(logits, where, "logit")
    _falling(probs, where, "prob")
    return Candidates(
        token_ids=np.array([ids.of(e.get("token_id"), e["token"]) for e in entries], np.int64),
        tokens=tuple([e["token"] for e in entries]),
        logits=logits,
        probs=probs,
        sampled_probs=_optional(entries, "sampled_prob"),
        noise=_optional(entries, "noise"),
    )


def _attention(
    values: schema.Step, capture: CaptureReport, position: int, where: str
) -> tuple[LayerAttention, ...]:
    """Of every layer; of the last alone where there is evidence and nothing else."""
    layers = values.get("attention") or []
    evidence = values.get("evidence") or []
    if not layers and evidence:
        final = capture.attention_layers[-1] if capture.attention_layers else capture.layers
        layers = [{"layer": final, "topk": [*evidence]}]
    numbers = [layer["layer"] for layer in layers]
    if numbers != sorted(set(numbers)):
        raise refused(f"{where}: attention has its layers twice, or out of order")
    if not capture.attention_layers and numbers:
        raise refused(f"{where}: attention is there, and none was announced")
    if numbers and not set(numbers) <= set(capture.attention_layers):
        raise refused(f"{where}: attention is of layers that were not announced")
    lists = [layer.get("topk") or [] for layer in layers]
    if sum(map(len, lists)) > schema.MAX_CELLS:
        raise refused(f"{where}: attention has more than {schema.MAX_CELLS:,} entries")
    # One array for all layers: a model has dozens, and each list is short.
    entries = list(chain.from_iterable(lists))
    positions = np.array([entry["position"] for entry in entries], dtype=np.int64)
    weights = _floats(entries, "weight")
    if positions.max(initial=-1) >= position:
        raise refused(f"{where}: attention looks at position {positions.max()}, ahead of itself")
    number_of_list = np.repeat(np.arange(len(lists)), [len(own) for own in lists])
    _falling(weights, f"{where}, attention", "weight", number_of_list)
    first, made = 0, []
    for layer, own in zip(layers, lists, strict=True):
        here = f"{where}, attention of layer {layer['layer']}"
        _ranked(own, here)
        if len({entry["position"] for entry in own}) != len(own):
            raise refused(f"{here}: a position is there twice")
        end = first + len(own)
        missing = _number(layer, "missing") + 0.0
        made.append(
            LayerAttention(layer["layer"], positions[first:end], weights[first:end], missing)
        )
        first = end
    if evidence and values.get("attention"):
        last = made[-1]
        same = [entry["position"] for entry in evidence] == last.positions.tolist()
        if not same or not np.array_equal(
            _floats(evidence, "weight"), last.weights, equal_nan=True
        ):
            raise refused(f"{where}: evidence is not the attention of the last layer")
    return tuple(made)


def _lens(
    values: schema.Step, index: int, token_id: int, layers: int, ids: TokenIds, where: str
) -> Lens | None:
    """A row for each layer of the model; one that the file does not have is blank."""
    rows: dict[int, schema.LensLayer] = {}
    for row in values.get("logit_lens") or ():
        here = f"{where}, logit_lens of layer {row['layer']}"
        if row["layer"] in rows:
            raise refused(f"{here}: it is there twice")
        if row["layer"] > layers:
            raise refused(f"{here}: the model has {layers:,} layers")
        _ranked(row.get("topk") or (), here)
        rows[row["layer"]] = row
    if not rows:
        return None
    count = layers + 1
    k = max(1, *(len(row.get("topk") or ()) for row in rows.values()))
    if count * k > schema.MAX_CELLS:
        raise refused(f"{where}: logit_lens has more than {schema.MAX_CELLS:,} entries")
    blanks: list[schema.LensToken] = [{"token": ""}] * k
    nothing: schema.LensLayer = {"layer": 0}
    cells: list[schema.LensToken] = []
    token_ids, tokens, of_layers = [], [], []
    for layer in range(count):
        row = rows.get(layer, nothing)
        entries = row.get("topk") or []
        own = [ids.of(entry.get("token_id"), entry["token"]) for entry in entries]
        short = k - len(own)
        entries = entries + blanks[:short]
        cells += entries
        token_ids.append(own + [BLANK] * short)
        tokens.append(tuple([entry["token"] for entry in entries]))
        rank, prob = row.get("chosen_rank"), row.get("chosen_prob")
        if token_id in own:
            at = own.index(token_id)
            rank = at + 1 if rank is None else rank
            prob = entries[at].get("prob") if prob is None else prob
        of_layers.append((rank or 0, prob, row.get("entropy"), row.get("kl")))
    chosen_rank, chosen_prob, entropy, kl = zip(*of_layers, strict=True)
    return Lens(
        step_index=index,
        token_ids=np.array(token_ids, dtype=np.int64),
        tokens=tuple(tokens),
        logits=_floats(cells, "logit").reshape(count, k),
        probs=_floats(cells, "prob").reshape(count, k),
        entropy=np.array(entropy, dtype=np.float32),
        chosen_rank=np.array(chosen_rank, dtype=np.int64),
        chosen_prob=np.array(chosen_prob, dtype=np.float32) + np.float32(0),
        kl=np.array(kl, dtype=np.float32),
    )


def _decision(values: schema.Decision, ids: TokenIds) -> Decision:
    runner_up = values.get("runner_up")
    return Decision(
        drawn=values["drawn"],
        effects=tuple(
            Effect(
                name=effect["name"],
                setting=effect["setting"],
                removed=effect["removed"],
                removed_mass=_number(effect, "removed_mass") + 0.0,
                chosen_prob=_number(effect, "chosen_prob") + 0.0,
            )
            for effect in values.get("processors") or ()
        ),
        candidates=values["candidates"],
        noise=values.get("noise"),
        greedy=_contender(values["greedy"], ids),
        runner_up=_contender(runner_up, ids) if runner_up else None,
    )


def _contender(values: schema.Contender, ids: TokenIds) -> Contender:
    return Contender(
        token_id=ids.of(values.get("token_id"), values["token"]),
        token=values["token"],
        prob=_number(values, "sampled_prob") + 0.0,
        noise=values.get("noise"),
    )


def tensor_records(
    found: Sequence[TensorRecord], of: Step, capture: CaptureReport, where: str
) -> tuple[TensorRecord, ...]:
    """The full tensors of a step, if they can be its own."""
    if found and capture.policy.tensors == "none":
        raise refused(f"{where}: it has tensors, and its policy keeps none")
    names = [tensor.name for tensor in found]
    if len(set(names)) != len(names):
        raise refused(f"{where}: a tensor is there twice")
    for tensor in found:
        if why := _misfit(tensor, of, capture):
            raise refused(f"{where}: {tensor.name} {why}")
    return tuple(found)


def _misfit(tensor: TensorRecord, step: Step, capture: CaptureReport) -> str | None:
    shape = tensor.array.shape
    dimensions = {"logits": 1, "hidden_states": 2, "attentions": 3}[tensor.name]
    if len(shape) != dimensions or not tensor.array.size:
        return f"have the shape {shape}"
    if tensor.name == "logits" and step.token_id >= shape[0]:
        return f"are {shape[0]:,}, and its token is {step.token_id:,}"
    if tensor.name == "hidden_states" and shape[0] != capture.layers + 1:
        return f"are of {shape[0]:,} layers instead of {capture.layers + 1:,}"
    if tensor.name == "attentions":
        layers = list(tensor.layers)
        if len(layers) != shape[0] or not set(layers) <= set(capture.attention_layers):
            return "are of layers that were not announced"
        if tensor.key_offset + shape[2] > step.position:
            return f"look beyond position {step.position - 1}"
    return None


# ------------------------------------------------------------------------- within


def _number(values: Any, name: str, otherwise: float = NAN) -> float:
    value = values.get(name)
    return otherwise if value is None else value


def _floats(entries: Sequence[Any], name: str) -> Any:
    """As 32-bit floats, what is missing as NaN and -0 as 0."""
    values = np.array([entry.get(name) for entry in entries], dtype=np.float32)
    return values + np.float32(0)


def _optional(entries: Sequence[Any], name: str) -> Any:
    """None where no entry has it."""
    if all(entry.get(name) is None for entry in entries):
        return None
    return _floats(entries, name)


def _ranked(entries: Iterable[Any], where: str) -> None:
    for rank, entry in enumerate(entries, start=1):
        if entry.get("rank") not in (None, rank):
            raise refused(f"{where}: the ranks of its entries are not 1, 2, 3 and so on")


def _falling(values: Any, where: str, name: str, number_of_list: Any = None) -> None:
    """The most likely, or the most attended, comes first, in each of several lists."""
    finite = np.isfinite(values)
    values = values[finite]
    before, after = values[:-1], values[1:]
    rises = after > before + _ORDER * np.maximum(1, np.abs(before))
    if number_of_list is not None:
        numbers = number_of_list[finite]
        rises &= numbers[1:] == numbers[:-1]
    if rises.any():
        raise refused(f"{where}: its entries are not in the order of their {name}")
