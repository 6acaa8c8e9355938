"""What the layers would have said, as the page's elements draw it: pure functions, no Streamlit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dashboard.viewdata.attention import encoded, map_steps
from dashboard.viewdata.replies import Json, figure, known
from oki_trace.records import Lens, LensGrid, Step, StepSummary
from oki_trace.sanitize import visible

LABEL_LENGTH = 60


def lens_data(step: Step, lens: Lens, pinned: Sequence[str] | None = ()) -> Json:
    """What each layer would have said, the last layer first; all that was kept of it.

    ``pinned``: the tokens whose curves are drawn; None where there are no curves to pin to.
    """
    settle = lens.settle_layer
    rows = []
    for layer in range(len(lens.tokens) - 1, -1, -1):
        ids = lens.token_ids[layer].tolist()
        probs = lens.probs[layer].tolist()
        rows.append(
            {
                "layer": layer,
                "cells": [
                    {
                        "text": visible(text),
                        "label": label(text),
                        "prob": known(prob),
                        "shown": figure(prob, 2),
                        "chosen": token_id == step.token_id,
                        "pinned": label(text) in (pinned or ()),
                        "title": f"layer {layer}, rank {k + 1}: {visible(text)} "
                        f"{figure(prob, 4)}"
                        + ("" if pinned is None else "\nclick to pin its curve"),
                    }
                    for k, (token_id, text, prob) in enumerate(
                        zip(ids, lens.tokens[layer], probs, strict=False)
                    )
                ],
                "rank": int(lens.chosen_rank[layer]),
                "settled": layer == settle,
                "title": f"chosen token: rank {int(lens.chosen_rank[layer]):,}, "
                f"prob {figure(float(lens.chosen_prob[layer]), 4)}\n"
                f"entropy {figure(float(lens.entropy[layer]), 2, ' nats')} · "
                f"KL to the final layer {figure(float(lens.kl[layer]), 2, ' nats')}",
            }
        )
    return {"rows": rows, "pins": pinned is not None}


def label(token: str) -> str:
    """A token's name on a chip or a curve."""
    shown = visible(token)
    return shown if len(shown) <= LABEL_LENGTH else f"{shown[: LABEL_LENGTH - 1]}…"


# ------------------------------------------------- what each layer made of the one before


def changes_data(step: Step, lens: Lens, columns: int = 2) -> Json:
    """What each layer promoted and suppressed: its probabilities less the layer before's.

    Of a token that is in only one of the two lists the other probability is not
    known, only that it is at most the last one of that list: the change is then
    a bound, and ``exact`` is false. The chosen token is known in every layer.
    """
    rows = []
    for layer in range(len(lens.tokens) - 1, 0, -1):
        found = _changes(step, lens, layer)
        up = [one for one in found if one[1] > 0][:columns]
        down = [one for one in reversed(found) if one[1] < 0][:columns]
        rows.append(
            {
                "layer": layer,
                "up": [_change(one, step) for one in up],
                "down": [_change(one, step) for one in down],
            }
        )
    return {"rows": rows, "columns": columns}


Change = tuple[str, float, bool, int]


def _changes(step: Step, lens: Lens, layer: int) -> list[Change]:
    """(token, change, exact, id) of layer ``layer``, the most promoted first."""
    tokens: dict[int, str] = {}
    probs: list[dict[int, float]] = []
    for at in (layer - 1, layer):
        ids = lens.token_ids[at].tolist()
        tokens.update(zip(ids, lens.tokens[at], strict=True))
        probs.append(
            {i: p for i, p in zip(ids, lens.probs[at].tolist(), strict=True) if math.isfinite(p)}
        )
    before, after = probs
    if not before or not after:
        return []
    least = [min(before.values()), min(after.values())]
    chosen = [float(lens.chosen_prob[at]) for at in (layer - 1, layer)]
    if all(map(math.isfinite, chosen)):
        tokens.setdefault(step.token_id, step.token)
        before[step.token_id], after[step.token_id] = chosen
    found = []
    for token_id, token in tokens.items():
        old, new = before.get(token_id), after.get(token_id)
        if old is not None and new is not None:
            found.append((token, new - old, True, token_id))
        elif new is not None:
            found.append((token, max(new - least[0], 0.0), False, token_id))
        elif old is not None:
            found.append((token, min(least[1] - old, 0.0), False, token_id))
    return sorted(found, key=lambda one: -one[1])


def _change(change: Change, step: Step) -> Json:
    token, delta, exact, token_id = change
    sign = "+" if delta > 0 else "−"
    size = figure(abs(delta), 2)
    bound = "" if exact else "at least "
    limit = "" if exact or size[0] == "<" else "≥" if delta > 0 else "≤"
    return {
        "text": visible(token),
        "label": label(token),
        "delta": delta,
        "exact": exact,
        "shown": f"{limit}{sign}{size}",
        "chosen": token_id == step.token_id,
        "title": f"{visible(token)}: probability {bound}{abs(delta):.4f} "
        f"{'more' if delta > 0 else 'less'} than one layer before"
        + ("" if exact else "; it is among the kept tokens of only one of the two layers"),
    }


# ------------------------------------------------------------------------- curves


def curves(step: Step, lens: Lens, pinned: Sequence[str] = ()) -> list[Json]:
    """Rank and probability through the layers: the chosen token, the runner-up, the pinned ones.

    One row a token and layer, in that order. The chosen token is known at every
    layer; of the others a layer that does not have it among its kept tokens has
    no value: a gap, not a zero.
    """
    rows: list[Json] = []
    mine = label(step.token)
    for layer in range(len(lens.tokens)):
        rows.append(
            {
                "token": mine,
                "kind": "chosen",
                "layer": layer,
                "rank": int(lens.chosen_rank[layer]),
                "prob": known(float(lens.chosen_prob[layer])),
            }
        )
    other = next(
        (
            t
            for t, i in zip(step.topk.tokens, step.topk.token_ids, strict=True)
            if i != step.token_id
        ),
        None,
    )
    names = [] if other is None else [(label(other), "runner-up")]
    names += [(name, "pinned") for name in pinned if name not in (mine, *(n for n, _ in names))]
    for name, kind in names:
        if name == mine:
            continue
        for layer, texts in enumerate(lens.tokens):
            at = next((k for k, text in enumerate(texts) if label(text) == name), None)
            rows.append(
                {
                    "token": name,
                    "kind": kind,
                    "layer": layer,
                    "rank": None if at is None else at + 1,
                    "prob": None if at is None else known(float(lens.probs[layer, at])),
                }
            )
    return rows


def by_layer(lens: Lens) -> list[Json]:
    """Entropy and KL to the final layer, a row a layer, in nats."""
    return [
        {"layer": layer, "entropy": known(float(entropy)), "kl": known(float(kl))}
        for layer, (entropy, kl) in enumerate(zip(lens.entropy, lens.kl, strict=True))
    ]


def pinnable(step: Step, lens: Lens) -> list[str]:
    """The tokens that have a value somewhere: the candidates, then what the layers said."""
    texts = [*step.topk.tokens, *(text for row in reversed(lens.tokens) for text in row)]
    return [name for name in dict.fromkeys(map(label, texts)) if name != label(step.token)]


# ---------------------------------------------------------------- the whole reply


def lens_map(grid: LensGrid, steps: Sequence[StepSummary]) -> Json:
    """The lens over a stretch of the reply: steps across, layers down.

    The arrays are (steps, layers) in C order, little-endian, in base64.
    """
    by_index = {s.step_index: s for s in steps}
    window = [by_index[index] for index in grid.step_index.tolist() if index in by_index]
    grid_rows = np.isin(grid.step_index, [s.step_index for s in window])
    chosen = np.array([s.token_id for s in window], dtype=np.int64).reshape(-1, 1)
    layers = grid.top.shape[1]
    return {
        "kind": "lens",
        "steps": map_steps(window),
        "layers": layers,
        "words": [visible(token)[:40] for token in grid.tokens],
        "settled": [-1 if s.settle_layer is None else s.settle_layer for s in window],
        "top": encoded(grid.top[grid_rows].astype("<u4")),
        "same": encoded((grid.top_id[grid_rows] == chosen).astype("u1")),
        "prob": encoded(grid.top_prob[grid_rows].astype("<f4")),
        "entropy": encoded(grid.entropy[grid_rows].astype("<f4")),
        "rank": encoded(grid.chosen_rank[grid_rows].astype("<u4")),
        "chosen_prob": encoded(grid.chosen_prob[grid_rows].astype("<f4")),
        "kl": encoded(grid.kl[grid_rows].astype("<f4")),
    }


Curve = Literal["rank", "probability", "entropy and KL"]
CURVES: tuple[Curve, ...] = ("rank", "probability", "entropy and KL")
