"""From records to what the page's elements draw: pure functions, no Streamlit.

Text leaves here as plain strings with spaces and line ends made visible where
a token stands alone, and as it is where it is part of a running text.
"""

from __future__ import annotations

import codecs
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from oki_trace.records import Lens, Prompt, Step, StepSummary

Colour = Literal["surprisal", "entropy", "margin", "settle layer"]
COLOURS: tuple[Colour, ...] = ("surprisal", "entropy", "margin", "settle layer")

Json = dict[str, Any]

MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Controls, direction marks and other spaces: nothing to see, or worse.
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})


def visible(token: str) -> str:
    """A token standing alone: spaces, line ends and control characters shown."""
    return "".join(_shown(character) for character in token) or "∅"


def _shown(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if unicodedata.category(character) in INVISIBLE:
        return f"<U+{ord(character):04X}>"
    return character


def clickable(text: str) -> str:
    """A piece of running text; a line end has a mark before it, being no wider than nothing."""
    return text.replace("\n", "⏎\n")


def known(value: float) -> float | None:
    """``value``, or None where it is no number: an import may lack it, float16 may overflow."""
    return value if math.isfinite(value) else None


def figure(value: float, digits: int, unit: str = "") -> str:
    """``value`` with so many digits, a dash where it is no number."""
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "–"


def running_text(steps: Sequence[StepSummary]) -> list[str]:
    """Each token's part of the reply's text: a character stands with the token that ends it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(step.token_bytes) for step in steps]


def reply_data(
    steps: Sequence[StepSummary],
    *,
    colour: Colour,
    layers: int,
    chosen: int | None,
    live: bool,
    keys: bool,
    status: str,
    bad: bool,
) -> Json:
    """What the reply element draws (see ``components/reply.js``)."""
    values, low, high = scale(steps, colour, layers)
    texts = running_text(steps)
    tokens = [
        {
            "text": visible(s.token) if s.is_special else (clickable(text) or "◌"),
            "value": None if value is None else round(value, 3),
            "mark": s.is_special or not text.strip("\n"),
            "title": hover(s),
        }
        for s, text, value in zip(steps, texts, values, strict=True)
    ]
    return {
        "tokens": tokens,
        "chosen": chosen,
        "keys": keys,
        "live": live,
        "blue": colour == "settle layer",
        "name": colour if steps else "",
        "low": low,
        "high": high,
        "status": status,
        "bad": bad,
    }


def scale(
    steps: Sequence[StepSummary], colour: Colour, layers: int
) -> tuple[list[float | None], str, str]:
    """A shade from 0 to 1 for each step, and what the two ends stand for."""
    if colour == "margin":
        return [known(1 - s.margin) for s in steps], "1", "0 (a near tie)"
    if colour == "settle layer":
        depth = max(layers, 1)
        shades = [None if s.settle_layer is None else s.settle_layer / depth for s in steps]
        return shades, "0", f"{layers}"
    raw = [known(-s.logprob if colour == "surprisal" else s.entropy) for s in steps]
    top = max([1.0, *(value for value in raw if value is not None)])
    return [None if value is None else value / top for value in raw], "0", f"{top:.1f} nats"


def hover(step: StepSummary) -> str:
    """A token's numbers in a few lines."""
    settled = (
        "not settled" if step.settle_layer is None else f"settled at layer {step.settle_layer}"
    )
    return (
        f"{visible(step.token)}  (id {step.token_id}, step {step.step_index})\n"
        f"prob {figure(step.prob, 3)} · rank {step.rank}\n"
        f"surprisal {figure(-step.logprob, 2, ' nats')} · "
        f"entropy {figure(step.entropy, 2, ' nats')}\n"
        f"margin {figure(step.margin, 3)} · {settled}"
    )


def most_surprising(steps: Sequence[StepSummary]) -> int | None:
    """The step with the least likely token: where to look first."""
    rated = [s for s in steps if math.isfinite(s.logprob)] or steps[:1]
    return min(rated, key=lambda s: s.logprob).step_index if rated else None


def facts_data(step: Step, summary: StepSummary, total: int) -> Json:
    """What the head of the step panel shows."""
    settled = "–" if summary.settle_layer is None else f"layer {summary.settle_layer}"
    facts = [
        ("prob", figure(step.prob, 3), "The model's own probability, before any sampling setting"),
        ("rank", str(step.rank), "1 is the most likely token"),
        ("surprisal", figure(step.surprisal, 2, " nats"), "-log prob of the chosen token"),
        ("entropy", figure(step.entropy, 2, " nats"), "of the whole next-token distribution"),
        ("settled", settled, "The first layer from which the chosen token stays on top"),
    ]
    if step.sampled_prob is not None:
        facts.insert(
            1,
            ("sampled", figure(step.sampled_prob, 3), "Its probability after temperature and cuts"),
        )
    return {
        "where": f"step {step.step_index + 1} of {total} · position {step.position}",
        "hint": "← →",
        "what": visible(step.token),
        "facts": [{"name": n, "value": v, "title": t} for n, v, t in facts],
    }


def bars_data(step: Step) -> Json:
    """What the bars of the candidates show."""
    top = step.topk
    sampled = top.sampled_probs
    rows = [
        {
            "text": visible(text),
            "prob": known(prob),
            "sampled": None if sampled is None else known(float(sampled[k])),
            "chosen": token_id == step.token_id,
            "title": f"rank {k + 1} · id {token_id} · logit {figure(logit, 2)} · "
            f"prob {figure(prob, 5)}",
        }
        for k, (token_id, text, logit, prob) in enumerate(
            zip(
                top.token_ids.tolist(),
                top.tokens,
                top.logits.tolist(),
                top.probs.tolist(),
                strict=True,
            )
        )
    ]
    return {"rows": rows, "sampled": sampled is not None}


def evidence_data(
    prompt: Prompt,
    steps: Sequence[StepSummary],
    position: int,
    weights: Mapping[int, float],
    left_out: int | None = None,
) -> Json:
    """The text the model saw, each piece shaded by its weight; ``position`` is the newest's end.

    ``left_out`` is a position whose weight is told but not shown as a shade.
    """
    seen = [s for s in steps if s.position < position]
    texts = [*prompt.tokens, *running_text(seen)]
    kinds = [*prompt.segments, *["reply"] * len(seen)]
    shaded = {at: w for at, w in weights.items() if at != left_out and math.isfinite(w)}
    top = max(shaded.values(), default=0.0) or 1.0
    pieces = []
    for at, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        weight = figure(weights.get(at, 0.0), 4)
        pieces.append(
            {
                "text": clickable(text) or "◌",
                "value": round(shaded.get(at, 0.0) / top, 3),
                "kind": kind,
                "title": f"position {at} · {kind} · weight {weight}"
                + (" · left out" if at == left_out else ""),
            }
        )
    return {"pieces": pieces, "seam": len(prompt)}


def positions(weights: np.ndarray, offset: int) -> dict[int, float]:
    """Weights by absolute position, from a row whose first key stands at ``offset``."""
    return {offset + i: float(w) for i, w in enumerate(weights) if w > 0}


def lens_data(step: Step, lens: Lens, columns: int = 3) -> Json:
    """What each layer would have said, the last layer first."""
    settle = lens.settle_layer
    rows = []
    for layer in range(len(lens.tokens) - 1, -1, -1):
        ids = lens.token_ids[layer].tolist()[:columns]
        probs = lens.probs[layer].tolist()[:columns]
        rows.append(
            {
                "layer": layer,
                "cells": [
                    {
                        "text": visible(text),
                        "prob": known(prob),
                        "chosen": token_id == step.token_id,
                        "title": f"layer {layer}, rank {k + 1}: {visible(text)} {figure(prob, 4)}",
                    }
                    for k, (token_id, text, prob) in enumerate(
                        zip(ids, lens.tokens[layer], probs, strict=False)
                    )
                ],
                "rank": int(lens.chosen_rank[layer]),
                "settled": layer == settle,
                "title": f"entropy {figure(float(lens.entropy[layer]), 2, ' nats')} · "
                f"KL to the final layer {figure(float(lens.kl[layer]), 2, ' nats')} · "
                f"chosen token {figure(float(lens.chosen_prob[layer]), 4)}",
            }
        )
    return {"rows": rows}


def map_data(steps: Sequence[Step], layers: Sequence[int], chosen: int | None) -> Json:
    """The lens over these steps: the top token of each layer, shaded by its probability."""
    ready = [(s, s.lens) for s in steps if s.lens is not None]
    return {
        "steps": [
            {"index": s.step_index, "text": visible(s.token), "title": f"step {s.step_index + 1}"}
            for s, _ in ready
        ],
        "layers": list(layers),
        "cells": [[_map_cell(s, lens, layer) for s, lens in ready] for layer in layers],
        "chosen": chosen,
    }


def _map_cell(step: Step, lens: Lens, layer: int) -> Json:
    text, prob = visible(lens.tokens[layer][0]), float(lens.probs[layer, 0])
    return {
        "text": text,
        "prob": known(round(prob, 3)),
        "same": int(lens.token_ids[layer, 0]) == step.token_id,
        "settled": lens.settle_layer == layer,
        "title": f"layer {layer}, step {step.step_index + 1}: {text} {figure(prob, 3)}\n"
        f"chosen {visible(step.token)}: rank {int(lens.chosen_rank[layer]):,}",
    }
