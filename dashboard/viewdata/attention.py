"""Where the model looked, as the page's elements draw it: pure functions, no Streamlit."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dashboard.viewdata.replies import Json, clickable, figure, running_text
from oki_trace.records import AttentionPoints, Prompt, Step, StepSummary, TensorRecord
from oki_trace.sanitize import visible

MEAN = "mean of heads"
EVERY = "mean, every position"
MAXIMUM = "maximum of heads"


def heads(count: int | None) -> list[str]:
    """What can be chosen: the kept rows alone, or each of ``count`` heads of the full tensor."""
    if count is None:
        return [MEAN]
    return [MEAN, EVERY, MAXIMUM, *(f"head {number}" for number in range(count))]


def full_row(tensor: TensorRecord, layer: int, head: str) -> tuple[np.ndarray, int]:
    """One layer's weights by position from the first key on: (keys,), and that key's position.

    ``head`` is one of ``heads()``. Raises ValueError for a layer without attention.
    """
    rows = values(tensor)[tensor.layers.index(layer)]
    if head in (MEAN, EVERY):
        return rows.mean(0), tensor.key_offset
    if head == MAXIMUM:
        return rows.max(0), tensor.key_offset
    return rows[int(head.split()[-1])], tensor.key_offset


def values(tensor: TensorRecord) -> np.ndarray:
    """The numbers of a tensor, bfloat16 read from its bits."""
    if tensor.dtype == "bfloat16":  # held as its bits, the upper half of a float32
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)


def positions(weights: np.ndarray, offset: int) -> dict[int, float]:
    """Weights by absolute position, from a row whose first key stands at ``offset``."""
    return {offset + i: float(w) for i, w in enumerate(weights) if w > 0}


def kept_row(step: Step, layer: int) -> dict[int, float]:
    """The kept weights of ``layer`` by position, heads averaged."""
    kept = next(one for one in step.attention if one.layer == layer)
    return dict(zip(kept.positions.tolist(), kept.weights.tolist(), strict=True))


def parked(prompt: Prompt, steps: Sequence[StepSummary]) -> frozenset[int]:
    """The positions that attention is parked on: the first, the chat template's, special tokens."""
    template = (at for at, segment in enumerate(prompt.segments) if segment == "template")
    return frozenset([0, *template, *(s.position for s in steps if s.is_special)])


@dataclass(frozen=True)
class Evidence:
    """Weights to paint, by position, and those left out of it.

    ``shown`` adds up to 1 when ``scaled``; ``first`` and ``others`` are what was left out.
    """

    shown: Mapping[int, float]
    left_out: Mapping[int, float]
    scaled: bool

    @property
    def first(self) -> float:
        return self.left_out.get(0, 0.0)

    @property
    def others(self) -> float:
        return sum(weight for at, weight in self.left_out.items() if at != 0)


def evidence(
    weights: Mapping[int, float], without: Iterable[int] = (), *, scale: bool = True
) -> Evidence:
    """``weights`` without some positions, the others scaled so that they add up to 1.

    ``scale=False`` for what is no distribution, as a maximum over heads.
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
    prompt: Prompt, steps: Sequence[StepSummary], position: int, found: Evidence
) -> Json:
    """The text the model saw, each piece shaded by its weight; ``position`` is the newest's end."""
    seen = [s for s in steps if s.position < position]
    texts = [*prompt.tokens, *running_text(seen)]
    kinds = [*prompt.segments, *["reply"] * len(seen)]
    top = max(found.shown.values(), default=0.0) or 1.0
    pieces = []
    for at, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        title = f"position {at} · {kind}"
        if at in found.left_out:
            title += f" · weight {figure(found.left_out[at], 4)}, left out"
        elif at in found.shown:
            name = "share of what is shown" if found.scaled else "weight"
            title += f" · {name} {figure(found.shown[at], 4)}"
        pieces.append(
            {
                "text": clickable(text) or "◌",
                "value": round(found.shown.get(at, 0.0) / top, 3),
                "weight": found.shown.get(at),
                "kind": kind,
                "out": at in found.left_out,
                "title": title,
            }
        )
    return {"pieces": pieces, "seam": len(prompt)}


def notes(found: Evidence, head: str, kept: int, absence: str | None) -> str:
    """What has to be said beside the picture: what it leaves out, and what it rests on.

    ``absence``: why the full tensors are not there; None where they are.
    """
    said = []
    parts = [
        f"{figure(100 * weight, 0, ' %')} of the attention on {where}"
        for weight, where in ((found.first, "the first token"), (found.others, "the template"))
        if weight > 0
    ]
    if parts and head == MAXIMUM:
        said.append("What is left is not scaled: a maximum over heads is no distribution.")
    elif parts:
        rest = "; the rest is scaled to add up to 1" if found.scaled else ""
        said.append(f"Left out: {' and '.join(parts)}{rest}.")
    if head == MEAN:
        said.append(f"The {kept} most attended positions.")
        if absence is not None:
            said.append(f"Single heads are not there: they need the full tensors, {absence}.")
    said.append("Attention shows where the model looked, not why.")
    return " ".join(said)


# ------------------------------------------------------------------ the whole reply


def points(found: AttentionPoints, first: int) -> Json:
    """The kept weights as the map takes them; column 0 is step ``first``."""
    return {
        "column": encoded((found.step_index - first).astype("<i4")),
        "position": encoded(found.position.astype("<i4")),
        "weight": encoded(found.weight.astype("<f4")),
    }


def full_points(
    tensors: Iterable[tuple[int, TensorRecord]], layer: int, head: str
) -> AttentionPoints:
    """The same from full tensors, every position: (step_index, tensor) in, points out."""
    steps, at, weights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for index, tensor in tensors:
        row, offset = full_row(tensor, layer, head)
        kept = np.flatnonzero(row > 0)
        steps.append(np.full(len(kept), index, np.int64))
        at.append(kept + offset)
        weights.append(row[kept])
    return AttentionPoints(np.concatenate(steps), np.concatenate(at), np.concatenate(weights))


def attention_map(
    prompt: Prompt,
    steps: Sequence[StepSummary],
    found: AttentionPoints,
    first: int,
    end: int,
    without: frozenset[int],
) -> Json:
    """Where each step from ``first`` up to ``end`` looked: steps across, positions down."""
    window = [s for s in steps if first <= s.step_index < end]
    last = max((s.position for s in window), default=0)
    earlier = [s for s in steps if s.position < last]
    return {
        "kind": "attention",
        "steps": map_steps(window),
        "positions": [visible(text)[:40] for text in (*prompt.tokens, *(s.token for s in earlier))][
            :last
        ],
        "seam": len(prompt),
        "without": sorted(without),
        "points": points(found, first),
    }


def map_steps(window: Sequence[StepSummary]) -> list[Json]:
    """The columns of a map of the reply."""
    return [
        {
            "index": s.step_index,
            "text": visible(s.token)[:40],
            "position": s.position,
            "surprisal": s.surprisal if math.isfinite(s.logprob) else None,
        }
        for s in window
    ]


def encoded(array: np.ndarray) -> str:
    """The array's bytes as text, which the browser reads at once, unlike a list of numbers."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
