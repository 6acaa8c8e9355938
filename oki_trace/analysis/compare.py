"""Two steps, two replies, two models: how far their distributions are apart.

From the full logits where both sides kept them and have the same vocabulary,
from the lists of candidates otherwise; each distance says which of the two it
is. The statements' functions read the tensors: see ``functions``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from oki_trace.analysis.distance import Distance
from oki_trace.analysis.pairs import one_vocabulary, step_distances
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.questions import Answer, Picture, columns, standing_alone
from oki_trace.analysis.scope import Scope
from oki_trace.errors import QuestionError

# Steps of two models that are read: what half a second is enough for.
SAMPLE = 640

_DISTANCES = """
kl number KL(first ‖ second), in nats
kl_reverse number KL(second ‖ first), in nats
js number Jensen-Shannon divergence, in nats: at most 0.693
tv share total variation: half the sum of absolute differences
"""
_BASIS = "basis name full logits: exact; top-k: from the candidates, an estimate that errs low"
_STEPS = columns(
    "step number the step\nchosen token the first says\nother token the second says"
    "\nsame_before name whether both have said the same so far"
    + _DISTANCES
    + "shared number candidates that stand in both lists"
    "\ntop_rank number the rank in the second of what the first finds likeliest\n" + _BASIS
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
    "\nsteps number steps up to where they part"
    "\nread number steps of these whose distributions were compared: all, or an even sample"
    + _DISTANCES
    + "shared number mean of the candidates that stand in both lists"
    "\ntop_alike share steps where both find the same token likeliest\n" + _BASIS
)

# A row a step of two replies. A token's text tells tokens of two vocabularies apart, but
# for pieces of a character, which all look alike: there its number does.
_BOTH = """
both_say AS (
  SELECT pair.first, pair.second, one.step_index AS step, one.token AS chosen, two.token AS other,
    one.token = two.token
      AND (one.token_id = two.token_id OR NOT contains(one.token, chr(65533))) AS same
  FROM pair JOIN step AS one ON one.message_id = pair.first
  JOIN step AS two ON two.message_id = pair.second AND two.step_index = one.step_index
),
so_far AS (
  SELECT both_say.*, pair.same_prompt AND coalesce(bool_and(same) OVER before, true) AS same_before
  FROM both_say JOIN pair USING (first, second)
  WINDOW before AS (
    PARTITION BY first, second ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
  )
),"""

_OF_REPLIES = (
    """\
WITH pair AS (
  SELECT one.id AS first, two.id AS second,
    coalesce(one.prompt_hash = two.prompt_hash, false) AS same_prompt
  FROM message AS one, message AS two
  WHERE one.id = $first AND two.id = $second
),"""
    + _BOTH
    + """
measured AS MATERIALIZED (
  SELECT *, distance(first, step, second, step) AS d FROM so_far
)
SELECT step, chosen, other, if(same_before, 'yes', 'no') AS same_before, d.kl AS kl,
  d.kl_reverse AS kl_reverse, d.js AS js, d.tv AS tv, d.shared AS shared, d.top_rank AS top_rank,
  d.basis AS basis
FROM measured
ORDER BY step
"""
)

_OF_MODELS = (
    """,
pair AS (
  SELECT any_value(question.content) AS prompt,
    min(m.id) FILTER (m.model_id = $first_model) AS first,
    min(m.id) FILTER (m.model_id = $second_model) AS second, true AS same_prompt
  FROM message AS m JOIN scope ON m.id = scope.message_id
  LEFT JOIN message AS question
    ON question.conversation_id = m.conversation_id AND question.position = m.position - 1
  WHERE m.tokens > 0
  GROUP BY m.prompt_hash
  HAVING first IS NOT NULL AND second IS NOT NULL
  ORDER BY first
  LIMIT $top
),"""
    + _BOTH
    + """
placed AS (
  SELECT *, count(*) OVER () AS of_all, row_number() OVER (ORDER BY first, step) - 1 AS place,
    count(*) FILTER (chosen = other) OVER two AS alike, count(*) OVER two AS steps
  FROM so_far WHERE same_before
  WINDOW two AS (PARTITION BY first, second)
),
measured AS MATERIALIZED (
  SELECT *, distance(first, step, second, step) AS d
  FROM placed WHERE place * $sample % of_all < $sample OR step = 0
)
SELECT any_value(prompt) AS prompt, first AS reply, second AS other, any_value(alike) AS alike,
  any_value(steps) AS steps, count(*) AS read, avg(d.kl) AS kl, avg(d.kl_reverse) AS kl_reverse,
  avg(d.js) AS js, avg(d.tv) AS tv, avg(d.shared) AS shared,
  avg((d.top_rank IS NOT DISTINCT FROM 1)::INT) AS top_alike,
  string_agg(DISTINCT d.basis, ' and ' ORDER BY d.basis) AS basis
FROM measured JOIN pair USING (first, second)
GROUP BY first, second
ORDER BY first
"""
)

_OF_STEPS = """\
WITH one AS (
  SELECT * FROM topk_entry WHERE message_id = $first AND step_index = $first_step
),
two AS (
  SELECT * FROM topk_entry WHERE message_id = $second AND step_index = $second_step
),
listed AS (
  SELECT coalesce(one.token, two.token) AS token, one.prob AS prob, two.prob AS other_prob,
    one.rank AS rank, two.rank AS other_rank, {ids},
    CASE WHEN two.rank IS NULL THEN 'first' WHEN one.rank IS NULL THEN 'second'
      ELSE 'both' END AS listed
  FROM one FULL JOIN two ON {key}
),
full_logits AS MATERIALIZED (
  SELECT *, token_rank($first, $first_step, id) AS s,
    token_rank($second, $second_step, other_id) AS t
  FROM listed
),
known AS (
  SELECT token, coalesce(s.prob, prob) AS prob, coalesce(t.prob, other_prob) AS other_prob,
    coalesce(s.rank, rank) AS rank, coalesce(t.rank, other_rank) AS other_rank, listed
  FROM full_logits
)
SELECT token, prob, other_prob, rank, other_rank, rank - other_rank AS risen, listed
FROM known
ORDER BY greatest(coalesce(prob, 0), coalesce(other_prob, 0)) DESC, token
"""
_BY_ID = {
    "key": "one.token_id = two.token_id",
    "ids": "coalesce(one.token_id, two.token_id) AS id, "
    "coalesce(two.token_id, one.token_id) AS other_id",
}
# Numbers mean other tokens in another vocabulary.
_BY_TEXT = {
    "key": "one.token = two.token",
    "ids": "one.token_id AS id, two.token_id AS other_id",
}


def steps_answer(trove: QuerySession, a: tuple[int, int], b: tuple[int, int]) -> Answer:
    """Two steps, each (message id, step index): a row a candidate, the likelier first; the
    distance in ``about``. Raises NotFound.
    """
    tops = [trove.reader.step(*step).topk for step in (a, b)]
    (found,) = step_distances(trove.reader, [(*a, *b)])
    assert found is not None
    sql = _OF_STEPS.format(**(_BY_ID if one_vocabulary(*tops) else _BY_TEXT))
    given = {"first": a[0], "first_step": a[1], "second": b[0], "second_step": b[1]}
    return _answer(
        trove, "step", sql, given, _CANDIDATES, Picture("token", ("prob", "other_prob"))
    ).told(_told(found.distance))


def replies_answer(trove: QuerySession, a: int, b: int) -> Answer:
    """Two replies: a row a step, as far as both go; how far they are alike in ``about``.
    Raises NotFound, and QuestionError for a message that is no reply, or has no step.
    """
    for message in (a, b):
        if not trove.reader.message(message).tokens:
            raise QuestionError(
                f"Message {message} has no steps to compare: name two replies, as "
                "`oki-trace show N` lists them."
            )
    given = {"first": a, "second": b}
    answer = _answer(trove, "reply", _OF_REPLIES, given, _STEPS, Picture("step", ("js",)))
    said = list(zip(answer.column("chosen"), answer.column("other"), strict=True))
    alike = next((i for i, (one, other) in enumerate(said) if one != other), len(said))
    about = f"{alike} {'token' if alike == 1 else 'tokens'} alike."
    together = [row for row in answer.rows if row[3] == "yes"]
    if together:
        mean = _mean([_distance(answer, row) for row in together], [1] * len(together))
        about += f" Up to where they part: {_told(mean)}"
    return answer.told(about)


def models_answer(
    trove: QuerySession,
    a: str,
    b: str,
    scope: Scope | None = None,
    *,
    top: int = 20,
    sample: int = SAMPLE,
) -> Answer:
    """Two models on the same prompts: a row a prompt, the first reply of each, compared up to
    where they part: later they answer different texts. Of all these steps, ``sample`` are
    read, evenly spread, and the first of each reply. Raises QuestionError without any.
    """
    scope = scope or Scope()
    given = {
        **scope.parameters(),
        "first_model": a,
        "second_model": b,
        "top": top,
        "sample": sample,
    }
    answer = _answer(
        trove, "model", scope.sql() + _OF_MODELS, given, _PAIRS, Picture("prompt", ("js",))
    )
    if not answer.rows:
        raise QuestionError(
            f"No prompt was put to both {a} and {b}: put the same words to both, then ask again."
        )
    steps = list(answer.column("steps"))
    mean = _mean([_distance(answer, row) for row in answer.rows], steps)
    count, read = sum(steps), sum(answer.column("read"))
    of_all = f"{count:,} steps" if read == count else f"{read:,} of {count:,} steps, evenly spread,"
    return answer.told(f"{of_all} of {len(answer.rows)} prompts: {_told(mean)}")


def _answer(
    trove: QuerySession,
    view: str,
    sql: str,
    given: dict[str, Any],
    shown: tuple[Any, ...],
    picture: Picture,
) -> Answer:
    rows = trove.ask(sql, given).rows
    return Answer("compare", view, shown, rows, picture, standing_alone(sql, given))


def _distance(answer: Answer, row: tuple[Any, ...]) -> Distance:
    named = dict(zip((column.name for column in answer.columns), row, strict=True))
    return Distance(*(named[name] for name in ("kl", "kl_reverse", "js", "tv", "basis")))


def _mean(distances: list[Distance], weights: list[int]) -> Distance:
    bases = " and ".join(sorted({d.basis for d in distances}))
    values = np.array([(d.kl, d.kl_reverse, d.js, d.tv) for d in distances])
    kl, kl_reverse, js, tv = np.average(values, axis=0, weights=weights).tolist()
    return Distance(kl, kl_reverse, js, tv, bases)


def _told(d: Distance) -> str:
    return (
        f"KL {d.kl:z.4f} nats (back {d.kl_reverse:z.4f}), JS {d.js:z.4f} nats, TV {d.tv:.4f}, "
        f"from {d.basis}."
    )
