"""Heads that look at one thing, from the full attention tensors.

The tensors are large, so an even sample of the steps is read; heads keep their
habits, and the answer says how many steps it stands on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oki_trace.analysis.compare import floats
from oki_trace.analysis.questions import Answer, Picture, columns
from oki_trace.analysis.scope import Scope
from oki_trace.analysis.trove import Trove
from oki_trace.errors import NotFound, QuestionError
from oki_trace.records import Prompt
from oki_trace.store.reader import TraceReader

# What a head can look at, the more special first: a position counts to the first that fits.
THINGS = (
    "first token",
    "itself",
    "token before",
    "system",
    "user",
    "assistant",
    "template",
    "reply",
)
_SEGMENTS = {
    name: i for i, name in enumerate(THINGS) if name in ("system", "user", "assistant", "template")
}

_COLUMNS = columns("""
model name the model
layer number the layer
head number the head, from 0
looks_at name where most of its weight goes
share share mean weight it gives to that
spread number standard deviation of that over the steps
focus share mean of its largest single weight
first_token share mean weight on the first token
reply share mean weight on the reply's own tokens, but the newest two
""")

_STEPS_IN_SCOPE = """
SELECT step.message_id, step_index, position, scope.model_id
FROM step JOIN scope USING (message_id)
WHERE step.message_id IN (SELECT unnest($kept::BIGINT[]))
ORDER BY step.message_id, step_index
"""


def heads_answer(
    trove: Trove,
    scope: Scope | None = None,
    *,
    sample: int = 64,
    top: int = 20,
    sinks: bool = False,
) -> Answer:
    """The heads that give most of their weight to one thing, the steadiest first.

    ``sample``: how many steps are read. Heads that rest on the first token are
    counted, and left out unless ``sinks``. Raises QuestionError where no
    attention was kept.
    """
    scope = scope or Scope()
    sql = scope.sql() + _STEPS_IN_SCOPE
    # Where few replies kept their tensors, the sample must not miss them.
    kept = sorted(trove.reader.replies_with("attentions"))
    steps = trove.ask(sql, {**scope.parameters(), "kept": kept}).rows
    shares: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    layers: dict[str, tuple[int, ...]] = {}
    for model, of_layers, weights in _sampled(trove.reader, steps, sample):
        if layers.setdefault(model, of_layers) == of_layers:
            shares[model].append(weights)
    if not shares:
        raise QuestionError(
            "No attention tensors are kept of these replies: generate with --tensors half, exact "
            "or compact."
        )
    rows = [row for model, found in shares.items() for row in _rows(model, layers[model], found)]
    resting = sum(row[3] == THINGS[0] for row in rows)
    shown = [row for row in rows if sinks or row[3] != THINGS[0]]
    shown.sort(key=lambda row: -row[4])
    read = sum(map(len, shares.values()))
    about = (
        f"{read} of {len(steps):,} steps read, evenly spread; {resting} of {len(rows)} heads give "
        "most of their weight to the first token."
    )
    return Answer(
        "heads", "head", _COLUMNS, tuple(shown[:top]), Picture("head", ("share",)), about=about
    )


def shares_of_heads(
    weights: NDArray[np.floating], key_offset: int, position: int, prompt: Prompt
) -> NDArray[np.float64]:
    """What each head gives to each of THINGS, and its largest weight: (layers, heads, things + 1).

    ``weights`` (layers, heads, keys) looks from ``position`` - 1, where the newest
    token stands, at the positions from ``key_offset`` on.
    """
    positions = key_offset + np.arange(weights.shape[-1])
    kind = np.full(len(positions), THINGS.index("reply"))
    segments = np.array([_SEGMENTS[name] for name in prompt.segments])
    inside = positions < len(segments)
    kind[inside] = segments[positions[inside]]
    kind[positions == position - 2] = THINGS.index("token before")
    kind[positions == position - 1] = THINGS.index("itself")
    kind[positions == 0] = 0
    sums = weights.astype(np.float64) @ np.eye(len(THINGS))[kind]
    return np.concatenate([sums, weights.max(axis=-1, keepdims=True)], axis=-1)


def _sampled(
    reader: TraceReader, steps: tuple[tuple[int, int, int, str], ...], sample: int
) -> Iterator[tuple[str, tuple[int, ...], NDArray[np.float64]]]:
    """(model, layers, shares) of up to ``sample`` steps that kept their attention."""
    prompts: dict[int, Prompt] = {}
    found = 0
    for message_id, step_index, position, model in _evenly(steps, sample):
        try:
            tensor = reader.tensor(message_id, step_index, "attentions")
        except NotFound:
            continue
        if message_id not in prompts:
            prompts[message_id] = reader.prompt(message_id)
        shares = shares_of_heads(floats(tensor), tensor.key_offset, position, prompts[message_id])
        yield model, tensor.layers, shares
        found += 1
        if found == sample:
            return


def _evenly(
    steps: tuple[tuple[int, int, int, str], ...], sample: int
) -> Iterator[tuple[int, int, int, str]]:
    """The sample's steps, evenly spread; then others between them, should some have no tensor."""
    places = np.unique(np.linspace(0, len(steps) - 1, num=min(4 * sample, len(steps))).astype(int))
    for start in (0, 2, 1, 3):
        for place in places[start::4].tolist():
            yield steps[place]


def _rows(
    model: str, layers: tuple[int, ...], found: list[NDArray[np.float64]]
) -> Iterator[tuple[Any, ...]]:
    all_steps = np.stack(found)
    mean, spread = all_steps.mean(axis=0), all_steps.std(axis=0)
    for at, layer in enumerate(layers):
        for head in range(mean.shape[1]):
            shares = mean[at, head, :-1]
            if not shares.any():
                # A layer with fewer heads than others is padded.
                continue
            most = int(shares.argmax())
            yield (
                model,
                layer,
                head,
                THINGS[most],
                float(shares[most]),
                float(spread[at, head, most]),
                float(mean[at, head, -1]),
                float(shares[0]),
                float(shares[-1]),
            )
