"""The data of Logit Lens views, for a step or a reply: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from dashboard.viewdata.attention import base64_array
from dashboard.viewdata.map_columns import MapColumn, column_data
from dashboard.viewdata.wording import Json, finite, format_number
from oki_trace.records import Lens, LensGrid, Step
from oki_trace.sanitize import visible

LABEL_LENGTH = 60


def lens_data(step: Step, lens: Lens, pinned: Sequence[str] | None = ()) -> Json:
    """The data of ``components/lens.js``: the kept tokens of each layer, the last layer first.

    ``pinned`` are the tokens whose curves are drawn; None on a page without curves.
    """
    settle = lens.settle_layer
    rows = []
    for row, layer in reversed(list(enumerate(lens.layer_numbers.tolist()))):
        ids = lens.token_ids[row].tolist()
        probs = lens.probs[row].tolist()
        rows.append(
            {
                "layer": layer,
                "cells": [
                    {
                        "text": visible(text),
                        "label": short_label(text),
                        "prob": finite(prob),
                        "shown": format_number(prob, 2),
                        "chosen": token_id == step.token_id,
                        "pinned": short_label(text) in (pinned or ()),
                        "title": f"layer {layer}, rank {k + 1}: {visible(text)} "
                        f"{format_number(prob, 4)}"
                        + ("" if pinned is None else "\nclick to pin its curve"),
                    }
                    for k, (token_id, text, prob) in enumerate(
                        zip(ids, lens.tokens[row], probs, strict=False)
                    )
                ],
                "rank": int(lens.chosen_rank[row]),
                "settled": layer == settle,
                "title": f"chosen token: rank {int(lens.chosen_rank[row]):,}, "
                f"prob {format_number(float(lens.chosen_prob[row]), 4)}\n"
                f"entropy {format_number(float(lens.entropy[row]), 2, ' nats')} · "
                f"KL to the final layer {format_number(float(lens.kl[row]), 2, ' nats')}",
            }
        )
    return {"rows": rows, "pins": pinned is not None}


def short_label(token: str) -> str:
    """The name of a token on a chip or a curve."""
    shown = visible(token)
    return shown if len(shown) <= LABEL_LENGTH else f"{shown[: LABEL_LENGTH - 1]}…"


def changes_data(step: Step, lens: Lens, columns: int = 2) -> Json:
    """The data of ``components/changes.js``: the tokens that each layer promoted and suppressed.

    A change is the probability at a layer minus that at the layer read before. If a token
    is in only one of the two lists, its other probability is at most the last one of
    the other list: the change is then a bound, and ``exact`` is false. The chosen
    token's probability is known at every layer.
    """
    rows = []
    numbers = lens.layer_numbers.tolist()
    for row in range(len(numbers) - 1, 0, -1):
        changes = _changes(step, lens, row)
        up = [change for change in changes if change.delta > 0][:columns]
        down = [change for change in reversed(changes) if change.delta < 0][:columns]
        rows.append(
            {
                "layer": numbers[row],
                "up": [_change_data(change, step) for change in up],
                "down": [_change_data(change, step) for change in down],
            }
        )
    return {"rows": rows, "columns": columns}


class Change(NamedTuple):
    """How much a layer changed the probability of a token; a bound if not ``exact``."""

    token: str
    delta: float
    exact: bool
    token_id: int


def _changes(step: Step, lens: Lens, row: int) -> list[Change]:
    """The changes at a row of the lens, the most promoted first."""
    tokens: dict[int, str] = {}
    probs: list[dict[int, float]] = []
    for at in (row - 1, row):
        ids = lens.token_ids[at].tolist()
        tokens.update(zip(ids, lens.tokens[at], strict=True))
        probs.append(
            {i: p for i, p in zip(ids, lens.probs[at].tolist(), strict=True) if math.isfinite(p)}
        )
    before, after = probs
    if not before or not after:
        return []
    least = [min(before.values()), min(after.values())]
    chosen = [float(lens.chosen_prob[at]) for at in (row - 1, row)]
    if all(map(math.isfinite, chosen)):
        tokens.setdefault(step.token_id, step.token)
        before[step.token_id], after[step.token_id] = chosen
    changes = []
    for token_id, token in tokens.items():
        old, new = before.get(token_id), after.get(token_id)
        if old is not None and new is not None:
            changes.append(Change(token, new - old, True, token_id))
        elif new is not None:
            changes.append(Change(token, max(new - least[0], 0.0), False, token_id))
        elif old is not None:
            changes.append(Change(token, min(least[1] - old, 0.0), False, token_id))
    return sorted(changes, key=lambda change: -change.delta)


def _change_data(change: Change, step: Step) -> Json:
    token, delta, exact, token_id = change
    sign = "+" if delta > 0 else "−"
    size = format_number(abs(delta), 2)
    bound = "" if exact else "at least "
    limit = "" if exact or size[0] == "<" else "≥" if delta > 0 else "≤"
    return {
        "text": visible(token),
        "label": short_label(token),
        "delta": delta,
        "exact": exact,
        "shown": f"{limit}{sign}{size}",
        "chosen": token_id == step.token_id,
        "title": f"{visible(token)}: probability {bound}{abs(delta):.4f} "
        f"{'more' if delta > 0 else 'less'} than at the layer before"
        + ("" if exact else "; the token was kept at only one of the two layers"),
    }


def curve_rows(step: Step, lens: Lens, pinned: Sequence[str] = ()) -> list[Json]:
    """Rank and probability by layer of the chosen token, the runner-up and the pinned tokens.

    A row for each token and layer, the tokens in that order. The chosen token is known
    at every layer; for the others, a layer that did not keep the token has a gap, not a zero.
    """
    candidates = zip(step.topk.tokens, step.topk.token_ids.tolist(), strict=True)
    runner_up = next((short_label(t) for t, i in candidates if i != step.token_id), None)
    kinds = {short_label(step.token): "chosen"}
    if runner_up is not None:
        kinds.setdefault(runner_up, "runner-up")
    for name in pinned:
        kinds.setdefault(name, "pinned")
    rows: list[Json] = []
    for name, kind in kinds.items():
        layers = lens.layer_numbers.tolist()
        for row, (layer, tokens) in enumerate(zip(layers, lens.tokens, strict=True)):
            rank, prob = None, None
            if kind == "chosen":
                rank = int(lens.chosen_rank[row])
                prob = finite(float(lens.chosen_prob[row]))
            elif (at := next((k for k, t in enumerate(tokens) if short_label(t) == name), -1)) >= 0:
                rank, prob = at + 1, finite(float(lens.probs[row, at]))
            rows.append({"token": name, "kind": kind, "layer": layer, "rank": rank, "prob": prob})
    return rows


def layer_rows(lens: Lens) -> list[Json]:
    """Entropy, and KL divergence from the final layer, for each layer, in nats."""
    return [
        {"layer": layer, "entropy": finite(float(entropy)), "kl": finite(float(kl))}
        for layer, entropy, kl in zip(
            lens.layer_numbers.tolist(), lens.entropy, lens.kl, strict=True
        )
    ]


def pinnable_tokens(step: Step, lens: Lens) -> list[str]:
    """The tokens that have a curve: the candidates, then the kept tokens of the layers."""
    texts = [*step.topk.tokens, *(text for row in reversed(lens.tokens) for text in row)]
    return [
        name for name in dict.fromkeys(map(short_label, texts)) if name != short_label(step.token)
    ]


def joined_lens(grids: Sequence[tuple[LensGrid, int]]) -> LensGrid:
    """Grids one after another as one, each with the shift from its steps to column numbers.

    A layer at which a grid was not read is blank. Grids with another number of layers than the
    last are left out.
    """
    grids = [(grid, shift) for grid, shift in grids if len(grid.step_index)] or list(grids[-1:])
    last = _last_layer(grids[-1][0])
    grids = [(_widened(grid), shift) for grid, shift in grids if _last_layer(grid) == last]
    tokens: dict[str, int] = {}
    top = []
    for grid, _ in grids:
        index = [tokens.setdefault(token, len(tokens)) for token in grid.tokens]
        top.append(np.array(index, dtype=np.int64)[grid.top])

    def together(name: str) -> np.ndarray:
        return np.concatenate([getattr(grid, name) for grid, _ in grids])

    return LensGrid(
        step_index=np.concatenate([grid.step_index + shift for grid, shift in grids]),
        tokens=tuple(tokens),
        top=np.concatenate(top),
        top_id=together("top_id"),
        top_prob=together("top_prob"),
        entropy=together("entropy"),
        chosen_rank=together("chosen_rank"),
        chosen_prob=together("chosen_prob"),
        kl=together("kl"),
    )


def _last_layer(grid: LensGrid) -> int:
    layers = grid.layers
    return grid.top.shape[1] - 1 if layers is None else int(layers.max(initial=-1))


def _widened(grid: LensGrid) -> LensGrid:
    """The grid with all layers up to its last; one that was not read is blank, of rank 0."""
    count = _last_layer(grid) + 1
    if grid.layers is None or grid.top.shape[1] == count:
        return replace(grid, layers=None)

    def widened(values: np.ndarray, blank: float) -> np.ndarray:
        wide = np.full((len(values), count), blank, dtype=values.dtype)
        wide[:, grid.layers] = values
        return wide

    return replace(
        grid,
        tokens=(*grid.tokens, ""),
        top=widened(grid.top, len(grid.tokens)),
        top_id=widened(grid.top_id, -1),
        chosen_rank=widened(grid.chosen_rank, 0),
        **{
            name: widened(getattr(grid, name), np.nan)
            for name in ("top_prob", "entropy", "chosen_prob", "kl")
        },
        layers=None,
    )


def lens_map(grid: LensGrid, columns: Sequence[MapColumn]) -> Json:
    """The data of ``components/map.js``: the lens over a window of columns.

    ``grid.step_index`` has numbers of columns. The arrays are (columns, layers) in C
    order, little-endian, in base64.
    """
    by_number = {column.number: column for column in columns}
    window = [by_number[n] for n in grid.step_index.tolist() if n in by_number]
    grid_rows = np.isin(grid.step_index, [column.number for column in window])
    chosen = np.array([column.step.token_id for column in window], dtype=np.int64).reshape(-1, 1)
    layers = grid.top.shape[1]
    settled = [column.step.settle_layer for column in window]
    return {
        "kind": "lens",
        **column_data(window),
        "layers": layers,
        "words": [visible(token)[:40] for token in grid.tokens],
        "settled": [-1 if layer is None else layer for layer in settled],
        "top": base64_array(grid.top[grid_rows].astype("<u4")),
        "same": base64_array((grid.top_id[grid_rows] == chosen).astype("u1")),
        "prob": base64_array(grid.top_prob[grid_rows].astype("<f4")),
        "entropy": base64_array(grid.entropy[grid_rows].astype("<f4")),
        "rank": base64_array(grid.chosen_rank[grid_rows].astype("<u4")),
        "chosen_prob": base64_array(grid.chosen_prob[grid_rows].astype("<f4")),
        "kl": base64_array(grid.kl[grid_rows].astype("<f4")),
    }


Curve = Literal["rank", "probability", "entropy and KL"]
CURVES: tuple[Curve, ...] = get_args(Curve)
