"""Two steps, two replies, two models: how far their distributions are apart.

From the full logits where both sides kept them and have the same vocabulary,
from the lists of candidates otherwise; each distance says which of the two it
is. Tensors are read one at a time, through the reader.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np

from oki_trace.analysis.distance import Distance, Probs, between, between_lists, softmax
from oki_trace.analysis.questions import Answer, Picture, columns
from oki_trace.analysis.scope import Scope
from oki_trace.analysis.trove import Trove
from oki_trace.errors import NotFound, QuestionError
from oki_trace.records import Candidates, Tensor
from oki_trace.store.reader import TraceReader


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that either side considered. None: below that side's list, and no logits to ask."""

    token: str
    rank_a: int | None
    rank_b: int | None
    prob_a: float | None
    prob_b: float | None

    @property
    def risen(self) -> int | None:
        """How many ranks it gained from a to b."""
        if self.rank_a is None or self.rank_b is None:
            return None
        return self.rank_a - self.rank_b


@dataclass(frozen=True, slots=True)
class StepComparison:
    """Two steps. ``shared`` and ``only_*`` are the tokens in both lists, or in one alone."""

    distance: Distance
    shared: tuple[Candidate, ...]
    only_a: tuple[Candidate, ...]
    only_b: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class StepDistance:
    """A step of two replies. ``same_before``: all their tokens before it were the same."""

    step: int
    said_a: str
    said_b: str
    same_before: bool
    distance: Distance


def compare_steps(reader: TraceReader, a: tuple[int, int], b: tuple[int, int]) -> StepComparison:
    """Two steps, each (message id, step index). Raises NotFound."""
    first, second = reader.step(*a), reader.step(*b)
    return _compare(_Pair(reader, (*a, first.topk), (*b, second.topk)))


def compare_replies(
    reader: TraceReader, a: int, b: int, *, only_same: bool = False
) -> Iterator[StepDistance]:
    """Two replies, step by step, as far as both go; ``only_same``: up to where they part."""
    same = _same_prompt(reader, a, b)
    if only_same and not same:
        return
    # Neither lens nor attention is needed: they are nearly all of a step's rows.
    steps = reader.steps(a), reader.steps(b)
    tops_a, tops_b = reader.candidates(a), reader.candidates(b)
    for first, second in zip(*steps, strict=False):
        if only_same and not same:
            return
        n = first.step_index
        pair = _Pair(reader, (a, n, tops_a.get(n, _NONE)), (b, n, tops_b.get(n, _NONE)))
        yield StepDistance(n, first.token, second.token, same, pair.distance)
        same = same and first.token_bytes == second.token_bytes


def _same_prompt(reader: TraceReader, a: int, b: int) -> bool:
    """Whether both replies follow the same words."""
    return _before(reader, a) == _before(reader, b)


def _before(reader: TraceReader, message_id: int) -> list[tuple[str, str]]:
    message = reader.message(message_id)
    history = reader.messages(message.conversation_id)
    return [(m.role, m.content) for m in history if m.position < message.position]


_NONE = Candidates(np.zeros(0, np.int64), (), np.zeros(0, np.float32), np.zeros(0, np.float32))
# A message, a step of it, and that step's candidates.
_Side = tuple[int, int, Candidates]


class _Pair:
    """Two steps' distributions: full where both have their logits, else as lists."""

    def __init__(self, reader: TraceReader, a: _Side, b: _Side) -> None:
        self.tops = a[2], b[2]
        self.one_vocabulary = _one_vocabulary(*self.tops)
        self.lists = _list(a[2], self.one_vocabulary), _list(b[2], self.one_vocabulary)
        self.full: tuple[Probs, Probs] | None = None
        if self.one_vocabulary:
            self.full = _both(_full(reader, a[0], a[1]), _full(reader, b[0], b[1]))

    @property
    def distance(self) -> Distance:
        return between(*self.full) if self.full is not None else between_lists(*self.lists)


def _compare(pair: _Pair) -> StepComparison:
    full, lists = pair.full, pair.lists
    names = {
        token: name for top in pair.tops for token, name in _names(top, pair.one_vocabulary).items()
    }
    ranks = tuple({token: i for i, token in enumerate(one, start=1)} for one in lists)

    def candidate(token: Hashable) -> Candidate:
        if full is None:
            found = [
                (rank.get(token), probs.get(token))
                for rank, probs in zip(ranks, lists, strict=True)
            ]
        else:
            found = [(1 + int((p > p[token]).sum()), float(p[token])) for p in full]  # type: ignore[call-overload]
        (rank_a, prob_a), (rank_b, prob_b) = found
        return Candidate(names[token], rank_a, rank_b, prob_a, prob_b)

    return StepComparison(
        pair.distance,
        tuple(candidate(token) for token in lists[0] if token in lists[1]),
        tuple(candidate(token) for token in lists[0] if token not in lists[1]),
        tuple(candidate(token) for token in lists[1] if token not in lists[0]),
    )


def _one_vocabulary(a: Candidates, b: Candidates) -> bool:
    """Whether ids mean the same on both sides, as far as the two lists show."""
    texts = dict(zip(a.token_ids.tolist(), a.tokens, strict=True))
    known = all(token_id >= 0 for token_id in (*a.token_ids.tolist(), *b.token_ids.tolist()))
    return known and all(
        texts.get(token_id, text) == text
        for token_id, text in zip(b.token_ids.tolist(), b.tokens, strict=True)
    )


def _list(top: Candidates, by_id: bool) -> dict[Hashable, float]:
    keys = top.token_ids.tolist() if by_id else top.tokens
    return dict(zip(keys, map(float, top.probs), strict=True))


def _names(top: Candidates, by_id: bool) -> dict[Hashable, str]:
    keys = top.token_ids.tolist() if by_id else top.tokens
    return dict(zip(keys, top.tokens, strict=True))


def _full(reader: TraceReader, message_id: int, step_index: int) -> Probs | None:
    try:
        return softmax(floats(reader.tensor(message_id, step_index, "logits")))
    except NotFound:
        return None


def _both(a: Probs | None, b: Probs | None) -> tuple[Probs, Probs] | None:
    return (a, b) if a is not None and b is not None and a.shape == b.shape else None


def floats(tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32: bfloat16 is held as its bits."""
    if tensor.dtype == "bfloat16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array.astype(np.float32)


# -------------------------------------------------------------------- as answers

_DISTANCES = """
kl number KL(first ‖ second), in nats
kl_back number KL(second ‖ first), in nats
js number Jensen-Shannon divergence, in nats: at most 0.693
tv share total variation: half the sum of absolute differences
basis name full logits: exact; top-k: from the lists of candidates, an estimate that errs low
"""
_STEPS = columns(
    "step number the step\nsaid token the first says\nother token the second says"
    "\nsame_before name whether both have said the same so far" + _DISTANCES
)
_CANDIDATES = columns("""
token token a candidate
prob share its probability in the first
other_prob share its probability in the second
rank number its rank in the first
other_rank number its rank in the second
risen number ranks gained from the first to the second
listed name in both lists, or in one alone
""")
_PAIRS = columns(
    "prompt name what was asked last\nreply name the first model's reply"
    "\nother name the second model's reply\nalike number tokens that both begin with"
    "\nsteps number steps compared: up to where they part" + _DISTANCES
)


def steps_answer(reader: TraceReader, a: tuple[int, int], b: tuple[int, int]) -> Answer:
    """Two steps: a row a candidate, the likelier first; the distance in ``about``."""
    found = compare_steps(reader, a, b)
    listed = [(c, "both") for c in found.shared]
    listed += [(c, "first") for c in found.only_a] + [(c, "second") for c in found.only_b]
    listed.sort(key=lambda pair: -max(pair[0].prob_a or 0.0, pair[0].prob_b or 0.0))
    rows = tuple(
        (c.token, c.prob_a, c.prob_b, c.rank_a, c.rank_b, c.risen, where) for c, where in listed
    )
    return Answer(
        "compare",
        "step",
        _CANDIDATES,
        rows,
        Picture("token", ("prob", "other_prob")),
        about=_told(found.distance),
    )


def replies_answer(reader: TraceReader, a: int, b: int) -> Answer:
    """Two replies: a row a step; how far they are alike in ``about``."""
    found = list(compare_replies(reader, a, b))
    rows = tuple(
        (c.step, c.said_a, c.said_b, "yes" if c.same_before else "no", *_values(c.distance))
        for c in found
    )
    alike = next((i for i, c in enumerate(found) if c.said_a != c.said_b), len(found))
    together = [c.distance for c in found if c.same_before]
    about = f"{alike} tokens alike."
    if together:
        about += f" Up to where they part: {_told(_mean(together))}"
    return Answer("compare", "reply", _STEPS, rows, Picture("step", ("js",)), about=about)


def models_answer(
    trove: Trove, a: str, b: str, scope: Scope | None = None, top: int = 20
) -> Answer:
    """Two models on the same prompts: a row a prompt, the first reply of each, compared up to
    where they part: later they answer different texts. Raises QuestionError without any.
    """
    scope = scope or Scope()
    sql = scope.sql() + _SAME_PROMPTS
    parameters = {**scope.parameters(), "first_model": a, "second_model": b, "top": top}
    rows = []
    total: list[Distance] = []
    for prompt, first, second in trove.ask(sql, parameters).rows:
        found = list(compare_replies(trove.reader, first, second, only_same=True))
        if found:
            mean = _mean([c.distance for c in found])
            alike = sum(c.said_a == c.said_b for c in found)
            rows.append((prompt, first, second, alike, len(found), *_values(mean)))
            total += [c.distance for c in found]
    if not rows:
        raise QuestionError(
            f"No prompt was put to both {a} and {b}: put the same words to both, then ask again."
        )
    return Answer(
        "compare",
        "model",
        _PAIRS,
        tuple(rows),
        Picture("prompt", ("js",)),
        about=f"{len(total)} steps of {len(rows)} prompts: {_told(_mean(total))}",
    )


_SAME_PROMPTS = """
SELECT any_value(question.content) AS prompt,
  min(m.id) FILTER (m.model_id = $first_model) AS first,
  min(m.id) FILTER (m.model_id = $second_model) AS second
FROM message AS m JOIN scope ON m.id = scope.message_id
LEFT JOIN message AS question
  ON question.conversation_id = m.conversation_id AND question.position = m.position - 1
WHERE m.tokens > 0
GROUP BY m.asked
HAVING first IS NOT NULL AND second IS NOT NULL
ORDER BY first
LIMIT $top
"""


def _values(distance: Distance) -> tuple[float, float, float, float, str]:
    return distance.kl, distance.kl_back, distance.js, distance.tv, distance.basis


def _mean(distances: list[Distance]) -> Distance:
    bases = " and ".join(sorted({d.basis for d in distances}))
    values = np.array([_values(d)[:4] for d in distances]).mean(axis=0)
    kl, kl_back, js, tv = values.tolist()
    return Distance(kl, kl_back, js, tv, bases)


def _told(d: Distance) -> str:
    return (
        f"KL {d.kl:.4f} nats (back {d.kl_back:.4f}), JS {d.js:.4f} nats, TV {d.tv:.4f}, "
        f"from {d.basis}."
    )
