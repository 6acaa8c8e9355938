"""heads: attention heads that give most of their weight to one kind of position.

The attention tensors are large, so only an even sample of the steps is read. A head's targets vary
little from step to step, and the answer says how many steps it is based on.
"""

from __future__ import annotations

from oki_trace.analysis.head_targets import HEAD_TARGETS
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import Answer, Column, Drawing, Option, Question, Request, View
from oki_trace.analysis.scope import compose
from oki_trace.errors import QuestionError


def _statement(columns: str, where: str, limit: str) -> str:
    each = range(1, len(HEAD_TARGETS) + 1)
    return compose(
        """
WITH scope AS ($scope),
with_tensors AS (
  SELECT message_id, model_id FROM scope WHERE keeps(message_id, 'attentions')
),
numbered AS (
  SELECT message_id, step_index, model_id, count(*) OVER () AS steps,
    row_number() OVER (ORDER BY message_id, step_index) - 1 AS number
  FROM step JOIN with_tensors USING (message_id)
  WHERE step_index IS NOT NULL
),
sampled AS MATERIALIZED (
  SELECT model_id AS model, steps, unnest(head_shares(message_id, step_index)) AS h
  FROM numbered WHERE number * $sample % steps < $sample
),
means AS (
  SELECT model, h.layer AS layer, h.head AS head, count(*) AS steps_read,
    any_value(steps) AS steps, avg(h.focus) AS focus,
    [$shares] AS shares,
    [$spreads] AS spreads
  FROM sampled GROUP BY model, h.layer, h.head
),
targets AS (
  SELECT *, list_position(shares, list_max(shares)) AS most FROM means WHERE list_max(shares) > 0
)
SELECT model, layer, head, $targets[most] AS looks_at,
  shares[most] AS share, spreads[most] AS spread, focus, shares[1] AS first_token,
  shares[-1] AS reply$columns
FROM targets$where
ORDER BY share DESC, model, layer, head$limit
""",
        shares=", ".join(f"avg(h.shares[{i}])" for i in each),
        spreads=", ".join(f"stddev_pop(h.shares[{i}])" for i in each),
        targets=str(list(HEAD_TARGETS)),
        columns=columns,
        where=where,
        limit=limit,
    )


# All heads, to count those that are left out: the tensors are read once.
_ALL = _statement(", steps_read, steps", "", "")


def _run(session: QuerySession, request: Request) -> Answer:
    """Raises QuestionError where no attention tensors are stored."""
    rows = session.ask(*request.bind(_ALL)).rows
    if not rows:
        raise QuestionError(
            "No attention tensors are stored for these replies: generate with --tensors half, "
            "exact or compact."
        )
    others = tuple(row[:-2] for row in rows if row[3] != HEAD_TARGETS[0])
    steps_read = sum({row[0]: row[-2] for row in rows}.values())
    about = (
        f"{steps_read} of {rows[0][-1]:,} steps read, evenly spaced; {len(rows) - len(others)} of "
        f"{len(rows)} heads give most of their weight to the first token."
    )
    return request.answer(others[: int(request.options["top"])], *request.bind(), about)


HEADS = Question(
    "heads",
    "Attention",
    "Specialised heads",
    "Attention heads that give most of their weight to one kind of position, the strongest first.",
    "The shares come from the full attention tensors of a sample of the steps. Heads that attend "
    "mostly to the first token are counted but not listed: they usually add little at these steps.",
    {
        "head": View(
            _statement("", "\nWHERE most > 1", "\nLIMIT $top"),
            (
                Column("model", "name", "the model"),
                Column("layer", "number", "the layer"),
                Column("head", "number", "the head, from 0"),
                Column("looks_at", "name", "the positions that get most of its weight"),
                Column("share", "share", "mean weight on these positions"),
                Column("spread", "number", "standard deviation of that weight over the steps"),
                Column("focus", "share", "mean of its largest single weight"),
                Column("first_token", "share", "mean weight on the first token"),
                Column("reply", "share", "mean weight on the reply, without its newest two tokens"),
            ),
            {
                "where they are": Drawing(
                    "dots", ("head",), ("share",), colour="looks_at", across="layer"
                ),
                "how much": Drawing(
                    "ranked", ("layer", "head", "looks_at"), ("share",), spread="spread"
                ),
            },
            reads_tensors=True,
        ),
    },
    {
        "sample": Option(64, "Steps read", "how many steps are read"),
        "top": Option(20, "Rows", "how many heads"),
    },
    _run,
)
