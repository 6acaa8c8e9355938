"""compare: the distances between the distributions of two steps, two replies or two models.

The SQL function ``distance`` computes every distance, from the full logits if both sides kept
them and share a vocabulary, else from the candidate lists. Its ``basis`` says which.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from oki_trace.analysis.distance import Distance
from oki_trace.analysis.one_text import has_given_text, one_text
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import (
    Answer,
    Column,
    Drawing,
    Option,
    Question,
    Request,
    View,
    run_statement,
)
from oki_trace.analysis.questions import compare_text
from oki_trace.analysis.reply_alignment import Alignment, align_replies
from oki_trace.analysis.scope import compose
from oki_trace.analysis.step_distance import StepKey, one_vocabulary, step_distances
from oki_trace.errors import QuestionError

# Steps of two models that are read: what half a second is enough for.
SAMPLE = 640

# The steps of both replies side by side, up to the end of the shorter one; a branch begins beside
# the step of its reply from which it departs. A token's text tells the tokens of two vocabularies
# apart; pieces of a character all look alike, so there the id does.
_ALIGNED = """\
paired AS (
  SELECT pair.first, pair.second, one.step_index AS step, two.step_index AS other_step,
    one.token AS chosen, two.token AS other, one.token = two.token
      AND (one.token_id = two.token_id OR NOT contains(one.token, chr(65533))) AS same
  FROM pair JOIN step AS one ON one.message_id = pair.first
  JOIN step AS two ON two.message_id = pair.second
    AND two.step_index - pair.second_from = one.step_index - pair.first_from
),
aligned AS (
  SELECT paired.*, pair.same_text AND coalesce(bool_and(same) OVER before, true) AS same_before
  FROM paired JOIN pair USING (first, second)
  WINDOW before AS (
    PARTITION BY first, second ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
  )
)"""

_REPLIES = compose(
    """
WITH pair AS (
  SELECT $first AS first, $second AS second, $first_from AS first_from,
    $second_from AS second_from, $same_text AS same_text
),
$aligned,
measured AS MATERIALIZED (
  SELECT *, distance(first, step, second, other_step) AS d FROM aligned
)
SELECT step, chosen, other, if(same_before, 'yes', 'no') AS same_before, d.kl AS kl,
  d.kl_reverse AS kl_reverse, d.js AS js, d.tv AS tv, d.tv_most AS tv_most, d.shared AS shared,
  d.top_rank AS top_rank, d.basis AS basis
FROM measured
ORDER BY step
""",
    aligned=_ALIGNED,
)

_MODELS = compose(
    """
WITH scope AS ($scope),
pair AS (
  SELECT any_value(question.content) AS prompt,
    min(m.id) FILTER (m.model_id = $first) AS first,
    min(m.id) FILTER (m.model_id = $second) AS second, 0 AS first_from, 0 AS second_from,
    true AS same_text
  FROM message AS m JOIN scope ON m.id = scope.message_id
  LEFT JOIN message AS question
    ON question.id = m.parent_id
  WHERE m.tokens > 0
  GROUP BY m.prompt_hash
  HAVING first IS NOT NULL AND second IS NOT NULL
  ORDER BY first
  LIMIT $top
),
$aligned,
numbered AS (
  SELECT *, count(*) OVER () AS all_steps, row_number() OVER (ORDER BY first, step) - 1 AS number,
    count(*) FILTER (chosen = other) OVER of_pair AS common_prefix, count(*) OVER of_pair AS steps
  FROM aligned WHERE same_before
  WINDOW of_pair AS (PARTITION BY first, second)
),
measured AS MATERIALIZED (
  SELECT *, distance(first, step, second, other_step) AS d
  FROM numbered WHERE number * $sample % all_steps < $sample OR step = 0
)
SELECT any_value(prompt) AS prompt, first AS reply, second AS other,
  any_value(common_prefix) AS common_prefix, any_value(steps) AS steps, count(*) AS steps_read,
  avg(d.kl) AS kl, avg(d.kl_reverse) AS kl_reverse, avg(d.js) AS js, avg(d.tv) AS tv,
  avg(d.tv_most) AS tv_most, avg(d.shared) AS shared,
  avg((d.top_rank IS NOT DISTINCT FROM 1)::INT) AS same_top,
  string_agg(DISTINCT d.basis, ' and ' ORDER BY d.basis) AS basis
FROM measured JOIN pair USING (first, second)
GROUP BY first, second
ORDER BY first
""",
    aligned=_ALIGNED,
)

_STEPS = """
WITH one AS (
  SELECT * FROM topk_entry WHERE message_id = $first AND step_index = $first_step
),
two AS (
  SELECT * FROM topk_entry WHERE message_id = $second AND step_index = $second_step
),
listed AS (
  SELECT coalesce(one.token, two.token) AS token, one.prob AS prob, two.prob AS other_prob,
    one.rank AS rank, two.rank AS other_rank, $ids,
    CASE WHEN two.rank IS NULL THEN 'first' WHEN one.rank IS NULL THEN 'second'
      ELSE 'both' END AS listed_in
  FROM one FULL JOIN two ON $key
),
full_logits AS MATERIALIZED (
  SELECT *, token_rank($first, $first_step, id) AS s,
    token_rank($second, $second_step, other_id) AS t
  FROM listed
),
known AS (
  SELECT token, coalesce(s.prob, prob) AS prob, coalesce(t.prob, other_prob) AS other_prob,
    coalesce(s.rank, rank) AS rank, coalesce(t.rank, other_rank) AS other_rank, listed_in
  FROM full_logits
)
SELECT token, prob, other_prob, rank, other_rank, rank - other_rank AS rank_gain, listed_in
FROM known
ORDER BY greatest(coalesce(prob, 0), coalesce(other_prob, 0)) DESC, token
"""
_BY_ID = compose(
    _STEPS,
    key="one.token_id = two.token_id",
    ids="coalesce(one.token_id, two.token_id) AS id,\n"
    "    coalesce(two.token_id, one.token_id) AS other_id",
)
# Ids mean other tokens in another vocabulary.
_BY_TEXT = compose(
    _STEPS, key="one.token = two.token", ids="one.token_id AS id, two.token_id AS other_id"
)


def _run(session: QuerySession, request: Request) -> Answer:
    """Raises NotFound for a message or a step, and QuestionError when there is no step."""
    return {"step": _steps, "reply": _replies, "model": _models}[request.view](session, request)


def _steps(session: QuerySession, request: Request) -> Answer:
    """A row for each candidate, the most likely first; the distance is in ``about``."""
    numbers = [int(number) for step in request.subjects for number in step.split(":")]
    first, first_step, second, second_step = numbers
    pairs = ((first, first_step), (second, second_step))
    lists = [session.reader.step(*pair).topk for pair in pairs]
    pair = StepKey(first, first_step), StepKey(second, second_step)
    (found,) = step_distances(session.reader, [pair])
    steps = {"first": first, "first_step": first_step, "second": second, "second_step": second_step}
    sql = _BY_ID if one_vocabulary(*lists) else _BY_TEXT
    answer = run_statement(session, request, sql, **steps)
    return replace(answer, about=_sentence(found.distance if found else None))


def _replies(session: QuerySession, request: Request) -> Answer:
    """A row for each step, as far as both replies go; their common prefix in ``about``.

    With a scored text among the two, a row for each token or piece of the text they share.
    """
    first, second = map(int, request.subjects)
    messages = [session.reader.message(message) for message in (first, second)]
    given = [has_given_text(session.reader, message) for message in messages]
    for message, is_given in zip(messages, given, strict=True):
        if not message.tokens and not is_given:
            raise QuestionError(
                f"Message {message.id} has no steps to compare: name two replies or scored texts, "
                "as `oki-trace show N` lists them."
            )
    if any(given):
        text = one_text(session.reader, *messages)
        if text.by == "character":
            return compare_text.by_character(session, request, (first, second), text)
        answer = compare_text.by_token(session, request, (first, second), text)
        mean = _sentence(_mean(answer, [1] * len(answer.rows)))
        return replace(answer, about=f"{answer.about} Mean distance: {mean}")
    aligned = align_replies(session.reader, *messages)
    answer = run_statement(
        session,
        request,
        first=first,
        second=second,
        first_from=aligned.first_from,
        second_from=aligned.second_from,
        same_text=aligned.same_text,
    )
    about = _common_prefix(aligned, answer)
    before = [same == "yes" for same in answer.column("same_before")]
    if any(before):
        about += f" Up to where they diverge: {_sentence(_mean(answer, before))}"
    return replace(answer, about=about)


def _common_prefix(aligned: Alignment, answer: Answer) -> str:
    """How many tokens both begin with, and which steps stand beside each other."""
    tokens = list(zip(answer.column("chosen"), answer.column("other"), strict=True))
    prefix = next((i for i, (one, other) in enumerate(tokens) if one != other), len(tokens))
    if aligned.kept_same:
        prefix = aligned.kept + (prefix if aligned.same_text else 0)
    about = f"The first {prefix} {'token is' if prefix == 1 else 'tokens are'} the same."
    if not aligned.kept_same:
        return about
    shorter, longer = ("second", "first") if aligned.first_from else ("first", "second")
    return (
        f"{about} The prompt of the {shorter} reply has {len(aligned.kept_same)} of the answer's "
        f"tokens: its step 0 stands beside step {aligned.first_from + aligned.second_from} of the "
        f"{longer}."
    )


def _models(session: QuerySession, request: Request) -> Answer:
    """A row for each prompt: the first reply of each model, compared up to where they diverge.

    Later steps follow different texts. Of all steps, ``sample`` are read, evenly spaced, and the
    first of each reply.
    """
    first, second = request.subjects
    answer = run_statement(session, request, first=first, second=second)
    if not answer.rows:
        raise QuestionError(
            f"No prompt has replies of both {first} and {second}: run the same prompt with both."
        )
    steps = answer.column("steps")
    count, read = sum(steps), sum(answer.column("steps_read"))
    of_all = f"{count:,} steps" if read == count else f"{read:,} of {count:,} steps, evenly spaced,"
    about = f"{of_all} of {len(answer.rows)} prompts: {_sentence(_mean(answer, steps))}"
    return replace(answer, about=about)


def _mean(answer: Answer, weights: Any) -> Distance | None:
    """The weighted mean of the rows whose distance is known."""
    names = [field.name for field in fields(Distance)]
    rows = zip(*(answer.column(name) for name in names), weights, strict=True)
    known = [row for row in rows if row[0] is not None and row[-1]]
    if not known:
        return None
    *numbers, bases, weights = zip(*known, strict=True)
    means = np.average(np.array(numbers), axis=1, weights=weights).tolist()
    basis = " and ".join(sorted(set(bases)))
    return Distance(**dict(zip(names, [*means, basis], strict=True)))


def _sentence(d: Distance | None) -> str:
    if d is None:
        return "the distance is not known."
    most = f" to {d.tv_most:.4f}" if d.tv_most - d.tv >= 5e-5 else ""
    return (
        f"KL {d.kl:z.4f} nats (reverse {d.kl_reverse:z.4f}), JS {d.js:z.4f} nats, "
        f"TV {d.tv:.4f}{most}, from {d.basis}."
    )


COMPARE = Question(
    "compare",
    "Compare",
    "Two steps, replies, models",
    "The distance between the distributions of two steps, two replies or two models.",
    "KL, Jensen-Shannon and total variation from the full logits if both were kept, else from "
    "the candidates. Only steps after the same text compare the models; later steps continue "
    "different texts. A reply and its score, or two scores of one text, have the same text "
    "throughout.",
    {
        "reply": View(
            _REPLIES,
            (
                Column("step", "number", "the step"),
                Column("chosen", "token", "the first reply's token"),
                Column("other", "token", "the second reply's token"),
                Column("same_before", "name", "whether the tokens so far are the same"),
                *compare_text.DISTANCES,
                Column("shared", "number", "candidates in both lists"),
                Column("top_rank", "number", "rank of the first's top token in the second"),
                compare_text.BASIS,
            ),
            {
                name: Drawing("columns", ("step",), (column,), colour="same_before")
                for name, column in (("JS", "js"), ("KL", "kl"), ("total variation", "tv"))
            },
            label="two replies",
            reads_tensors=True,
            compares="reply",
        ),
        "tokens": compare_text.TOKENS,
        "spans": compare_text.SPANS,
        "step": View(
            _BY_ID,
            (
                Column("token", "token", "a candidate"),
                Column("prob", "share", "its probability in the first", label="probability"),
                Column("other_prob", "share", "its probability in the second"),
                Column("rank", "number", "its rank in the first"),
                Column("other_rank", "number", "its rank in the second"),
                Column("rank_gain", "number", "ranks gained from the first to the second"),
                Column("listed_in", "name", "which lists of candidates have it"),
            ),
            {"probability": Drawing("ranked", ("token",), ("prob", "other_prob"))},
            label="two steps",
            compares="step",
        ),
        "model": View(
            _MODELS,
            (
                Column("prompt", "name", "the last message of the prompt"),
                Column("reply", "name", "the first model's reply"),
                Column("other", "name", "the second model's reply"),
                Column("common_prefix", "number", "tokens with which both begin"),
                Column("steps", "number", "steps up to where they diverge"),
                Column("steps_read", "number", "steps compared: all of these, or an even sample"),
                *compare_text.DISTANCES,
                Column("shared", "number", "mean number of candidates in both lists"),
                Column("same_top", "share", "steps at which both have the same most likely token"),
                compare_text.BASIS,
            ),
            {
                "JS": Drawing("ranked", ("prompt", "reply", "other"), ("js",)),
                "KL": Drawing("ranked", ("prompt",), ("kl",)),
            },
            label="two models",
            reads_tensors=True,
            compares="model",
        ),
    },
    {
        "sample": Option(SAMPLE, "Steps read", "how many steps are read, for models"),
        "top": Option(20, "Rows", "how many prompts, for models"),
    },
    _run,
)
