"""From records to what the page's elements draw: pure functions, no Streamlit.

Text leaves here as plain strings with spaces and line ends made visible where
a token stands alone, and as it is where it is part of a running text.
"""

from __future__ import annotations

import codecs
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
            "text": visible(s.token) if s.is_special else (text or "◌"),
            "value": None if value is None else round(value, 3),
            "mark": s.is_special or not text,
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
        return [1 - s.margin for s in steps], "1", "0 (a near tie)"
    if colour == "settle layer":
        depth = max(layers, 1)
        shades = [None if s.settle_layer is None else s.settle_layer / depth for s in steps]
        return shades, "layer 0", f"{layers}"
    raw = [-s.logprob if colour == "surprisal" else s.entropy for s in steps]
    top = max([1.0, *raw])
    return [value / top for value in raw], "0", f"{top:.1f} nats"


def hover(step: StepSummary) -> str:
    """A token's numbers in a few lines."""
    settled = (
        "not settled" if step.settle_layer is None else f"settled at layer {step.settle_layer}"
    )
    return (
        f"{visible(step.token)}  (id {step.token_id}, step {step.step_index})\n"
        f"prob {step.prob:.3f} · rank {step.rank}\n"
        f"surprisal {-step.logprob:.2f} nats · entropy {step.entropy:.2f} nats\n"
        f"margin {step.margin:.3f} · {settled}"
    )


def most_surprising(steps: Sequence[StepSummary]) -> int | None:
    """The step with the least likely token: where to look first."""
    return min(steps, key=lambda s: s.logprob).step_index if steps else None


def facts_data(step: Step, summary: StepSummary, total: int) -> Json:
    """What the head of the step panel shows."""
    settled = "–" if summary.settle_layer is None else f"layer {summary.settle_layer}"
    facts = [
        ("prob", f"{step.prob:.3f}", "The model's own probability, before any sampling setting"),
        ("rank", str(step.rank), "1 is the most likely token"),
        ("surprisal", f"{step.surprisal:.2f} nats", "-log prob of the chosen token"),
        ("entropy", f"{step.entropy:.2f} nats", "of the whole next-token distribution"),
        ("settled", settled, "The first layer from which the chosen token stays on top"),
    ]
    if step.sampled_prob is not None:
        facts.insert(
            1, ("sampled", f"{step.sampled_prob:.3f}", "Its probability after temperature and cuts")
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
            "prob": prob,
            "sampled": None if sampled is None else float(sampled[k]),
            "chosen": token_id == step.token_id,
            "title": f"rank {k + 1} · id {token_id} · logit {logit:.2f} · prob {prob:.5f}",
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
) -> Json:
    """The text the model saw, each piece shaded by its weight; ``position`` is the newest's end."""
    seen = [s for s in steps if s.position < position]
    texts = [*prompt.tokens, *running_text(seen)]
    kinds = [*prompt.segments, *["reply"] * len(seen)]
    top = max(weights.values(), default=0.0) or 1.0
    pieces = []
    for at, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        weight = weights.get(at, 0.0)
        pieces.append(
            {
                "text": text,
                "value": round(weight / top, 3),
                "kind": kind,
                "title": f"position {at} · {kind} · weight {weight:.4f}",
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
                        "prob": prob,
                        "chosen": token_id == step.token_id,
                        "title": f"layer {layer}, rank {k + 1}: {visible(text)} {prob:.4f}",
                    }
                    for k, (token_id, text, prob) in enumerate(
                        zip(ids, lens.tokens[layer], probs, strict=False)
                    )
                ],
                "rank": int(lens.chosen_rank[layer]),
                "settled": layer == settle,
                "title": f"entropy {lens.entropy[layer]:.2f} nats · "
                f"KL to the final layer {lens.kl[layer]:.2f} nats · "
                f"chosen token {lens.chosen_prob[layer]:.4f}",
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
        "prob": round(prob, 3),
        "same": int(lens.token_ids[layer, 0]) == step.token_id,
        "settled": lens.settle_layer == layer,
        "title": f"layer {layer}, step {step.step_index + 1}: {text} {prob:.3f}\n"
        f"chosen {visible(step.token)}: rank {int(lens.chosen_rank[layer]):,}",
    }
