"""Heads that look at one thing, from the full attention tensors.

The tensors are large, so an even sample of the steps is read; heads keep their
habits, and the answer says how many steps it stands on.
"""

from __future__ import annotations

from oki_trace.analysis.head_targets import HEAD_TARGETS
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.questions import Answer, Picture, columns, standing_alone
from oki_trace.analysis.scope import Scope
from oki_trace.errors import QuestionError

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

_EACH = range(1, len(HEAD_TARGETS) + 1)
_SQL = (
    """,
kept AS (
  SELECT message_id, model_id FROM scope WHERE keeps(message_id, 'attentions')
),
placed AS (
  SELECT message_id, step_index, model_id, count(*) OVER () AS steps,
    row_number() OVER (ORDER BY message_id, step_index) - 1 AS place
  FROM step JOIN kept USING (message_id)
),
read AS MATERIALIZED (
  SELECT model_id AS model, steps, unnest(head_shares(message_id, step_index)) AS h
  FROM placed WHERE place * $sample % steps < $sample
),
means AS (
  SELECT model, h.layer AS layer, h.head AS head, count(*) AS seen, any_value(steps) AS steps,
    avg(h.focus) AS focus,
    ["""
    + ", ".join(f"avg(h.shares[{i}])" for i in _EACH)
    + """] AS shares,
    ["""
    + ", ".join(f"stddev_pop(h.shares[{i}])" for i in _EACH)
    + """] AS spreads
  FROM read GROUP BY model, h.layer, h.head
),
habits AS (
  SELECT *, list_position(shares, list_max(shares)) AS most FROM means WHERE list_max(shares) > 0
)
SELECT model, layer, head, """
    + str(list(HEAD_TARGETS))
    + """[most] AS looks_at,
  shares[most] AS share, spreads[most] AS spread, focus, shares[1] AS first_token,
  shares[-1] AS reply"""
)
_ORDER = "\nORDER BY share DESC, model, layer, head\n"
_ALL = _SQL + ", seen, steps\nFROM habits" + _ORDER
_WITH_HABITS = _SQL + "\nFROM habits\nWHERE most > 1" + _ORDER + "LIMIT $top\n"


def heads_answer(
    trove: QuerySession, scope: Scope | None = None, *, sample: int = 64, top: int = 20
) -> Answer:
    """The heads that give most of their weight to one thing, the steadiest first.

    ``sample``: how many steps are read. Heads that rest on the first token are
    counted and left out. Raises QuestionError where no attention was kept.
    """
    scope = scope or Scope()
    given = {**scope.parameters(), "sample": sample}
    # All of them, to count those that are left out: the tensors are read once.
    found = trove.ask(scope.sql() + _ALL, given).rows
    if not found:
        raise QuestionError(
            "No attention tensors are kept of these replies: generate with --tensors half, exact "
            "or compact."
        )
    rows = tuple(row[:-2] for row in found if row[3] != HEAD_TARGETS[0])
    read = sum({row[0]: row[-2] for row in found}.values())
    about = (
        f"{read} of {found[0][-1]:,} steps read, evenly spread; {len(found) - len(rows)} of "
        f"{len(found)} heads give most of their weight to the first token."
    )
    return Answer(
        "heads",
        "head",
        _COLUMNS,
        rows[:top],
        Picture("head", ("share",)),
        standing_alone(scope.sql() + _WITH_HABITS, {**given, "top": top}),
        about,
    )
