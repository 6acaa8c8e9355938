"""The data of attention views, for a step or a reply: pure functions."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dashboard.viewdata.map_columns import MapColumn, column_data
from dashboard.viewdata.replies import token_texts
from dashboard.viewdata.wording import Json, format_number, mark_line_ends
from oki_trace.records import AttentionPoints, Prompt, Step, StepSummary, TensorRecord
from oki_trace.sanitize import visible

MEAN = "mean of heads"
MEAN_EVERYWHERE = "mean, every position"
MAXIMUM = "maximum of heads"


def head_options(count: int | None) -> list[str]:
    """The choices of heads: without the full tensor (``count`` is None) the kept mean alone."""
    if count is None:
        return [MEAN]
    return [MEAN, MEAN_EVERYWHERE, MAXIMUM, *(f"head {number}" for number in range(count))]


def head_weights(tensor: TensorRecord, layer: int, head: str) -> tuple[np.ndarray, int]:
    """One layer's weights, (keys,), and the position of the first key.

    ``head`` is one of ``head_options``. Raises ValueError for a layer without attention.
    """
    rows = tensor.to_float32()[tensor.layers.index(layer)]
    if head in (MEAN, MEAN_EVERYWHERE):
        return rows.mean(0), tensor.key_offset
    if head == MAXIMUM:
        return rows.max(0), tensor.key_offset
    return rows[int(head.split()[-1])], tensor.key_offset


def weights_by_position(weights: np.ndarray, offset: int) -> dict[int, float]:
    """Weights by absolute position; ``offset`` is the position of the first key."""
    return {offset + i: float(w) for i, w in enumerate(weights) if w > 0}


def kept_weights(step: Step, layer: int) -> dict[int, float]:
    """The kept weights of ``layer`` by position, heads averaged."""
    kept = next(one for one in step.attention if one.layer == layer)
    return dict(zip(kept.positions.tolist(), kept.weights.tolist(), strict=True))


def sink_positions(prompt: Prompt, steps: Sequence[StepSummary]) -> frozenset[int]:
    """The attention sinks: the first position, the chat template's, special tokens."""
    template = (at for at, segment in enumerate(prompt.segments) if segment == "template")
    return frozenset([0, *template, *(s.position for s in steps if s.is_special)])


@dataclass(frozen=True)
class Evidence:
    """Weights by position: those to show, which add up to 1 if ``scaled``, and those left out."""

    shown: Mapping[int, float]
    left_out: Mapping[int, float]
    scaled: bool


def without_positions(
    weights: Mapping[int, float], without: Iterable[int] = (), *, scale: bool = True
) -> Evidence:
    """``weights`` without some positions, the others scaled so that they add up to 1.

    ``scale=False`` for weights that are no distribution, such as a maximum over heads.
    """
    known = {at: weight for at, weight in weights.items() if math.isfinite(weight)}
    out = frozenset(without)
    shown = {at: weight for at, weight in known.items() if at not in out}
    total = sum(shown.values())
    scaled = bool(out) and scale and total > 0
    if scaled:
        shown = {at: weight / total for at, weight in shown.items()}
    return Evidence(shown, {at: w for at, w in known.items() if at in out}, scaled)


def evidence_data(
    prompt: Prompt, steps: Sequence[StepSummary], position: int, evidence: Evidence
) -> Json:
    """The data of ``components/evidence.js``: the text before ``position``, shaded by weight."""
    seen = [s for s in steps if s.position < position]
    texts = [*prompt.tokens, *token_texts(seen)][:position]
    kinds = [*prompt.segments, *["reply"] * len(seen)][:position]
    top = max(evidence.shown.values(), default=0.0) or 1.0
    pieces = []
    for at, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        title = f"position {at} · {kind}"
        if at in evidence.left_out:
            title += f" · weight {format_number(evidence.left_out[at], 4)}, left out"
        elif at in evidence.shown:
            name = "share of the shown weight" if evidence.scaled else "weight"
            title += f" · {name} {format_number(evidence.shown[at], 4)}"
        pieces.append(
            {
                "text": mark_line_ends(text) or "◌",
                "value": round(evidence.shown.get(at, 0.0) / top, 3),
                "weight": evidence.shown.get(at),
                "kind": kind,
                "out": at in evidence.left_out,
                "title": title,
            }
        )
    return {"pieces": pieces, "seam": len(prompt)}


def evidence_notes(evidence: Evidence, head: str, kept: int, no_tensors: str | None) -> str:
    """The caption of the evidence: what it leaves out, and what it was made from.

    ``no_tensors``: why the full tensors are missing; None if they are there.
    """
    first = evidence.left_out.get(0, 0.0)
    template = sum(weight for at, weight in evidence.left_out.items() if at != 0)
    shares = [
        f"{format_number(100 * weight, 0, ' %')} of the attention on {where}"
        for weight, where in ((first, "the first token"), (template, "the template"))
        if weight > 0
    ]
    notes = []
    if shares and head == MAXIMUM:
        notes.append("The rest is not scaled: a maximum over heads is not a distribution.")
    elif shares:
        rest = "; the rest is scaled to add up to 1" if evidence.scaled else ""
        notes.append(f"Left out: {' and '.join(shares)}{rest}.")
    if head == MEAN:
        notes.append(f"The {kept} most attended positions.")
        if no_tensors is not None:
            notes.append(f"Single heads need the full tensors, {no_tensors}.")
    notes.append("Attention shows where the model looked, not why.")
    return " ".join(notes)


def full_attention_points(
    tensors: Iterable[tuple[int, TensorRecord]], layer: int, head: str
) -> AttentionPoints:
    """The weights of a layer at every position, from (step_index, full tensor) pairs."""
    steps, at, weights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for index, tensor in tensors:
        row, offset = head_weights(tensor, layer, head)
        kept = np.flatnonzero(row > 0)
        steps.append(np.full(len(kept), index, np.int64))
        at.append(kept + offset)
        weights.append(row[kept])
    return AttentionPoints(np.concatenate(steps), np.concatenate(at), np.concatenate(weights))


def joined_points(points: Sequence[tuple[AttentionPoints, int]]) -> AttentionPoints:
    """Attention one after another as one, each with the shift from its steps to column numbers."""
    return AttentionPoints(
        np.concatenate([one.step_index + shift for one, shift in points]),
        np.concatenate([one.position for one, _ in points]),
        np.concatenate([one.weight for one, _ in points]),
    )


def attention_map(
    prompt: Prompt,
    steps: Sequence[StepSummary],
    points: AttentionPoints,
    columns: Sequence[MapColumn],
    without: frozenset[int],
) -> Json:
    """The data of ``components/map.js``: the attention of ``columns``.

    ``steps`` are those of the reply. ``points.step_index`` has numbers of columns.
    """
    last = max((column.step.position for column in columns), default=0)
    earlier = [s for s in steps if s.position < last]
    numbers = np.array([column.number for column in columns], dtype=np.int64)
    column = np.searchsorted(numbers, points.step_index)
    column[~np.isin(points.step_index, numbers)] = -1
    return {
        "kind": "attention",
        **column_data(columns),
        "positions": [visible(text)[:40] for text in (*prompt.tokens, *(s.token for s in earlier))][
            :last
        ],
        "seam": len(prompt),
        "without": sorted(without),
        "points": {  # column -1 is not in the map
            "column": base64_array(column.astype("<i4")),
            "position": base64_array(points.position.astype("<i4")),
            "weight": base64_array(points.weight.astype("<f4")),
        },
    }


def base64_array(array: np.ndarray) -> str:
    """The bytes of an array as text, which the browser reads faster than a list of numbers."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
