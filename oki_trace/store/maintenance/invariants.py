"""Checks the invariants of a step: numbers that are stored more than once must agree.

The probability is in the step, in the candidates, in the lens at the last layer and
in the logits; the evidence is in the rows and in the attentions. Each function yields
a sentence for every disagreement beyond the precision of float32 and of the tensor's
codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from oki_trace.records import LayerAttention, Message, Origin, Step, TensorRecord
from oki_trace.store.codecs import compact
from oki_trace.store.maintenance.lens_checks import lenses_agree
from oki_trace.store.maintenance.tolerance import ROUNDING, is_close, is_falling

_PACKING = "+zstd"
# The relative error of a decoded value from rounding it to its own dtype.
_ROUNDED_TO = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def rows_agree(message: Message, step: Step, *, complete: bool) -> Iterator[str]:
    """Compare the rows of a step with each other. ``complete``: no part of the reply is missing."""
    is_given = step.step_index < 0
    if is_given != (step.origin == "given"):
        yield f"its origin is {step.origin}, but its step_index says otherwise"
    if step.origin not in get_args(Origin):
        yield f"its origin is {step.origin!r}"
    if is_given and step.decision is not None:
        yield "it is a given token and has a decision"
    if (
        not is_given
        and message.prompt_len is not None
        and step.position != message.prompt_len + step.step_index
    ):
        yield f"it is at position {step.position}, but the prompt has {message.prompt_len} tokens"
    yield from _candidates_agree(message, step)
    yield from _attention_agrees(message, step)
    yield from lenses_agree(message, step, complete=complete)
    yield from _router_agrees(message, step)


def _candidates_agree(message: Message, step: Step) -> Iterator[str]:
    top = step.topk
    if not is_close(step.prob, math.exp(step.logprob), ROUNDING):
        yield f"its probability {step.prob:.6g} is not that of its logprob {step.logprob:.6g}"
    if not len(top.tokens):
        yield "it has no candidates"
        return
    if message.policy is not None and len(top.tokens) > message.policy.topk_logits:
        yield f"it has {len(top.tokens)} candidates, more than requested"
    if not is_falling(top.probs) or not is_falling(top.logits):
        yield "the candidates are not in the order of their probabilities"
    if step.rank <= len(top.tokens) and not is_close(
        float(top.logits[step.rank - 1]), step.logit, ROUNDING
    ):
        yield f"the candidate of rank {step.rank} is not the token that was chosen"
    if len(top.probs) > 1 and not is_close(
        step.margin, float(top.probs[0]) - float(top.probs[1]), ROUNDING
    ):
        yield f"its margin is {step.margin:.6g}, but its candidates give another margin"
    place = np.flatnonzero(top.token_ids == step.token_id)
    if step.sampled_prob is not None and top.sampled_probs is not None and place.size:
        sampled = float(top.sampled_probs[place[0]])
        if not is_close(step.sampled_prob, sampled, ROUNDING):
            yield f"its probability when drawn is {step.sampled_prob:.6g}, not {sampled:.6g}"


def _attention_agrees(message: Message, step: Step) -> Iterator[str]:
    announced = message.capture.attention_layers if message.capture else ()
    layers = tuple(layer.layer for layer in step.attention)
    if layers != announced:
        yield f"it has attention of layers {_list(layers)} instead of {_list(announced)}"
    for layer in step.attention:
        if not is_falling(layer.weights):
            yield f"the attention of layer {layer.layer} is not in the order of its weights"
        outside = (layer.positions < 0) | (layer.positions >= step.position)
        if outside.any() or len(set(layer.positions.tolist())) != len(layer.positions):
            yield f"the attention of layer {layer.layer} names impossible positions"
        if float(layer.weights.sum()) + layer.missing > 1 + 1e-3:
            yield f"the attention of layer {layer.layer} adds up to more than 1"


def _router_agrees(message: Message, step: Step) -> Iterator[str]:
    layers = message.capture.layers if message.capture else 0
    for routing in step.router:
        where = f"the router of layer {routing.layer}"
        if layers and not 1 <= routing.layer <= layers:
            yield f"{where} is of no layer of the model"
        if len(set(routing.experts.tolist())) != len(routing.experts):
            yield f"{where} names an expert twice"
        if not is_falling(routing.weights):
            yield f"{where} is not in the order of its weights"


def names_agree(message: Message, step: Step, names: Set[str]) -> Iterator[str]:
    """Compare the names of a step's tensors with those that the capture report announces.

    All of them may have been pruned, or left out of the file that was imported.
    """
    capture = message.capture
    if capture is None:
        return
    policy = capture.policy.for_prompt if step.step_index < 0 else capture.policy
    expected: set[str] = set()
    if policy.tensors != "none":
        expected = {"logits", *(["attentions"] if capture.attention_layers else [])}
    # Pruning begins with the first step, in the transaction that marks the reply as pruned.
    if names and message.tensors_pruned_at is not None and step.step_index == 0:
        yield "it has tensors, although they were pruned"
    if not names and (message.tensors_pruned_at is not None or capture.tensors_left_out):
        return
    if missing := sorted(expected - names):
        yield f"it has no {' and no '.join(missing)}, although the settings keep them"
    if policy.tensors == "none" and names:
        yield f"it has {', '.join(sorted(names))}, although the settings keep no tensors"


def tensor_agrees(message: Message, step: Step, tensor: TensorRecord, codec: str) -> Iterator[str]:
    """Compare a full tensor with the rows of its step."""
    kind = codec.removesuffix(_PACKING)
    values = tensor.to_float32()
    if tensor.name == "logits":
        yield from _logits_agree(step, values, kind, _ROUNDED_TO.get(tensor.dtype, 0.0))
    elif tensor.name == "attentions":
        yield from _attentions_agree(step, tensor, values, kind)
    elif message.capture is not None:
        shape = (message.capture.layers + 1, message.capture.width)
        if values.shape != shape:
            yield f"its hidden states have the shape {values.shape} instead of {shape}"


def _logits_agree(
    step: Step, logits: NDArray[np.float32], kind: str, rounding: float
) -> Iterator[str]:
    if logits.ndim != 1 or not 0 <= step.token_id < logits.size:
        yield f"its logits have the shape {logits.shape}, but its token is {step.token_id}"
        return
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return
    wide = logits.astype(np.float64)
    largest = wide.max()
    weights = np.exp(wide - largest)
    normaliser = weights.sum()
    probs = weights / normaliser
    is_exact = kind in ("raw", "zstd")
    prob = float(probs[step.token_id])
    tolerance = ROUNDING if is_exact else compact.PROB_BOUND
    if not is_close(step.prob, prob, tolerance, relative=False):
        yield f"its probability is {step.prob:.6g}, but its logits give {prob:.6g}"
    present = probs > 0
    entropy = -float((probs[present] * np.log(probs[present])).sum())
    if not is_close(step.entropy, entropy, 1e-3 if is_exact else 2e-2):
        yield f"its entropy is {step.entropy:.6g}, but its logits give {entropy:.6g}"
    ids, rows = step.topk.token_ids, step.topk.logits.astype(np.float64)
    if not len(ids):
        return
    if ids.min() < 0 or ids.max() >= logits.size:
        yield "its candidates name tokens outside the logits"
        return
    size = np.where(np.isfinite(rows), np.abs(rows), 0.0)
    slack = _logit_slack(largest - wide[ids], kind) + ROUNDING * size
    if kind == "companded":
        slack += rounding * size
    # Equal infinities are equal; an export cannot represent NaN and infinities at all.
    with np.errstate(invalid="ignore"):
        near = (np.abs(wide[ids] - rows) <= slack) | (wide[ids] == rows) | np.isnan(rows)
    if not near.all():
        yield "the logits of its candidates are not those of the full logits"
    elif np.isfinite(rows[-1]):
        of_last_rank = np.partition(wide, -len(ids))[-len(ids)]
        if of_last_rank > rows[-1] + 2 * slack[-1]:
            yield "its candidates are not the most likely tokens of the full logits"


def _logit_slack(gaps: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """The error that the codec allows for each logit, by its distance from the largest."""
    if kind == "half":
        return np.asarray(gaps * 2.0**-11 + 1e-3)
    if kind == "companded":
        fine, coarse = compact.GRIDS[0]
        return np.asarray(np.minimum(fine * np.exp2(gaps / 2), coarse) * 0.55 + ROUNDING)
    return np.full_like(gaps, ROUNDING)


def _attentions_agree(
    step: Step, tensor: TensorRecord, weights: NDArray[np.float32], kind: str
) -> Iterator[str]:
    layers = tuple(layer.layer for layer in step.attention)
    if weights.ndim != 3 or tensor.layers != layers or len(layers) != len(weights):
        yield (
            f"its attentions are of layers {_list(tensor.layers)}, but its rows of {_list(layers)}"
        )
        return
    if tensor.key_offset + weights.shape[2] != step.position:
        yield f"its attentions end at position {tensor.key_offset + weights.shape[2]}"
        return
    error = {"half": 2.0**-11, "cumulative": compact.WEIGHT_STEP}.get(kind, 0.0) + ROUNDING
    if not np.isfinite(weights).all():
        return
    if weights.min(initial=0.0) < 0 or weights.sum(axis=2, dtype=np.float64).max() > 1 + error:
        yield "its attentions are not weights: a row is negative or adds up to more than 1"
        return
    for layer, rows in zip(step.attention, weights, strict=True):
        yield from _evidence_agrees(layer, rows, tensor.key_offset, error)


def _evidence_agrees(
    layer: LayerAttention, rows: NDArray[np.float32], key_offset: int, error: float
) -> Iterator[str]:
    # A head that a layer does not have is all zeros.
    heads = max(1, int(rows.any(axis=1).sum()))
    mean = rows.sum(axis=0, dtype=np.float64) / heads
    columns = layer.positions - key_offset
    if columns.min(initial=0) < 0 or columns.max(initial=0) >= mean.size:
        yield f"the attention of layer {layer.layer} names positions outside its window"
    elif not np.allclose(mean[columns], layer.weights, rtol=ROUNDING, atol=error):
        yield f"the attention of layer {layer.layer} is not the mean of its heads"
    total = float(mean.sum()) + layer.missing
    if abs(total - 1) > error + ROUNDING:
        yield f"the attention of layer {layer.layer} and its missing share add up to {total:.5f}"


def _list(layers: tuple[int, ...]) -> str:
    if len(layers) > 3 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "none"
