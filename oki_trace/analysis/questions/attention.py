"""attention: how attention is divided among the parts of the text, by layer and by step."""

from __future__ import annotations

from oki_trace.analysis.question import Column, Drawing, Question, View
from oki_trace.analysis.scope import compose

SHARES = ("first_token", "system", "user", "assistant", "template", "reply", "rest", "missing")
_STACKED = ("reply", "assistant", "user", "system", "template", "first_token", "rest", "missing")

_MODEL = Column("model", "name", "the model")
_LAYER = Column("layer", "number", "the layer")
_FROM_STEP = Column("from_step", "number", "steps from this one up to the next row's")
_COLUMNS = (
    Column("steps", "number", "steps"),
    Column("first_token", "share", "on position 0, which receives surplus attention"),
    Column("system", "share", "on the system message"),
    Column("user", "share", "on the user's messages"),
    Column("assistant", "share", "on earlier replies"),
    Column("template", "share", "on the chat template around the messages"),
    Column("reply", "share", "on this reply's own tokens"),
    Column("rest", "share", "on positions below the recorded ones"),
    Column("missing", "share", "on no position: a learned sink"),
)


def _by_step(rows: str, key: str = "", steps: str = "steps") -> str:
    """The statement of a view with a row for each range of steps, and for each ``key`` there.

    ``rows`` are the rows of attention_layer. They are summed by step first, so that the range of
    a step is worked out once.
    """
    sums = "".join(f",\n    sum(attention_layer.{share}) AS {share}" for share in SHARES)
    means = "".join(f",\n  sum(of_step.{share}) / sum(row_count) AS {share}" for share in SHARES)
    return compose(
        """
WITH scope AS ($scope),
of_step AS (
  SELECT step_index, ${key}count(*) AS row_count, count(*) FILTER (is_evidence) AS steps$sums
  FROM $rows
  GROUP BY ALL
)
SELECT
  CASE WHEN step_index < 2 THEN step_index ELSE (2 ** floor(log2(step_index)))::INT END
    AS from_step,
  ${key}sum($steps) AS steps$means
FROM of_step
GROUP BY ALL
ORDER BY ALL
""",
        key=key,
        sums=sums,
        rows=rows,
        steps=steps,
        means=means,
    )


_ROWS = "attention_layer JOIN scope USING (message_id) WHERE step_index IS NOT NULL"
_MEANS = ", ".join(f"avg(attention_layer.{share}) AS {share}" for share in SHARES)

ATTENTION = Question(
    "attention",
    "Attention",
    "Parts of the text",
    "How attention is divided among the parts of the prompt, the reply itself and the first token.",
    "Attention from the newest position, averaged over heads, on the most attended positions that "
    "are recorded for each layer; rest is the share of all other positions. Attention shows which "
    "positions a step reads, not why.",
    {
        "layer": View(
            compose(
                """
WITH scope AS ($scope)
SELECT model_id AS model, layer, count(*) AS steps, $means
FROM $rows
GROUP BY model_id, layer
ORDER BY model, layer
""",
                means=_MEANS,
                rows=_ROWS,
            ),
            (_MODEL, _LAYER, *_COLUMNS),
            {"shares": Drawing("stacked", ("layer",), _STACKED)},
            bar="first_token",
        ),
        "step": View(
            _by_step(_ROWS),
            (_FROM_STEP, *_COLUMNS),
            {"shares": Drawing("stacked", ("from_step",), _STACKED)},
            bar="first_token",
        ),
        "evidence": View(
            _by_step(f"{_ROWS} AND is_evidence"),
            (_FROM_STEP, *_COLUMNS),
            {"shares": Drawing("stacked", ("from_step",), _STACKED)},
            label="by step, final layer",
            bar="first_token",
        ),
        "grid": View(
            _by_step(_ROWS, key="layer, ", steps="row_count"),
            (_FROM_STEP, _LAYER, *_COLUMNS),
            {
                share: Drawing("cells", ("from_step",), (share,), across="layer")
                for share in _STACKED
            },
            label="by step and layer",
        ),
    },
)
