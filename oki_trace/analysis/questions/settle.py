"""settle: the layer from which the chosen token stays on top of the Logit Lens."""

from __future__ import annotations

from oki_trace.analysis.lens_choice import ONE_LENS, ORIGIN, require_rows
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import (
    Answer,
    Column,
    Drawing,
    Question,
    Request,
    View,
    run_statement,
)
from oki_trace.analysis.scope import OF_KIND, compose
from oki_trace.records import LOGIT

_MEANS = (
    Column("steps", "number", "steps"),
    Column("settled", "share", "steps whose token stays on top in the end: 1 for greedy decoding"),
    Column("layer", "number", "mean layer from which the token stays on top"),
    Column("depth", "share", "the same layer as a share of the model's depth"),
    Column("in_last_layer", "share", "steps that settle only in the last layer"),
    Column("prob_at_layer", "share", "mean probability of the token at that layer"),
    Column("prob", "share", "mean probability of the token in the end", label="probability"),
)


# Where each step settles for another lens than the Logit Lens, whose result ``step`` has.
_READ = """
(
  SELECT step.* REPLACE (read.layer AS settle_layer, read.layers AS layers,
    read.prob AS settle_prob)
  FROM step JOIN (
    SELECT step_id, max(layer) AS layers,
      min(layer) FILTER (layer > last_other) AS layer,
      arg_min(chosen_prob, layer) FILTER (layer > last_other) AS prob
    FROM (
      SELECT step_id, layer, chosen_prob,
        coalesce(max(CASE WHEN chosen_rank <> 1 THEN layer END) OVER (PARTITION BY step_id), -1)
          AS last_other
      FROM lens_layer JOIN scope USING (message_id)
      WHERE lens = $lens
    )
    GROUP BY step_id
  ) AS read ON read.step_id = step.id
) AS step""".strip()


def _means(steps: str, key: str, group: str, order: str) -> str:
    """The statement of a view that has a row for each ``group`` of steps."""
    return compose(
        """
WITH scope AS ($scope)
SELECT $key,
  count(*) AS steps,
  avg((settle_layer IS NOT NULL)::INT) AS settled,
  avg(settle_layer) AS layer,
  avg(settle_layer / layers) AS depth,
  avg((settle_layer = layers)::INT) AS in_last_layer,
  avg(settle_prob) AS prob_at_layer,
  avg(prob) AS prob
FROM $steps JOIN scope USING (message_id)
WHERE $of_kind AND layers IS NOT NULL
GROUP BY $group
ORDER BY $order
""",
        steps=steps,
        of_kind=OF_KIND,
        key=key,
        group=group,
        order=order,
    )


def _views(steps: str) -> dict[str, View]:
    """The views of steps with their ``settle_layer``, ``settle_prob`` and ``layers``."""
    return {
        "layer": View(
            compose(
                """
WITH scope AS ($scope)
SELECT model_id AS model, settle_layer AS layer, count(*) AS steps,
  count(*) / sum(count(*)) OVER (PARTITION BY model_id) AS share,
  sum(count(*)) OVER so_far / sum(count(*)) OVER (PARTITION BY model_id) AS cumulative_share,
  avg(settle_prob) AS prob_at_layer
FROM $steps JOIN scope USING (message_id)
WHERE $of_kind AND layers IS NOT NULL
GROUP BY model_id, settle_layer
WINDOW so_far AS (PARTITION BY model_id ORDER BY settle_layer NULLS LAST)
ORDER BY model, layer NULLS LAST
""",
                steps=steps,
                of_kind=OF_KIND,
            ),
            (
                Column("model", "name", "the model"),
                Column("layer", "number", "first layer at which the token stays on top, if any"),
                Column("steps", "number", "steps"),
                Column("share", "share", "share of the model's steps", label="settles here"),
                Column("cumulative_share", "share", "share that has settled by this layer"),
                _MEANS[5],
            ),
            {
                "steps": Drawing("columns", ("layer",), ("share",), line="cumulative_share"),
                "probability": Drawing("lines", ("layer",), ("prob_at_layer",)),
            },
        ),
        "model": View(
            _means(steps, "model_id AS model, any_value(layers) AS layers", "model_id", "model"),
            (
                Column("model", "name", "the model"),
                Column("layers", "number", "its last layer"),
                *_MEANS,
            ),
            {"depth": Drawing("ranked", ("model",), ("depth", "in_last_layer"))},
        ),
        "position": View(
            _means(
                steps,
                "CASE WHEN step_index < 2 THEN step_index"
                " ELSE (2 ** floor(log2(step_index)))::INT END AS from_step",
                "from_step",
                "from_step",
            ),
            (Column("from_step", "number", "steps from this one up to the next row's"), *_MEANS),
            {
                "depth": Drawing("lines", ("from_step",), ("depth", "in_last_layer")),
                "probability": Drawing("lines", ("from_step",), ("prob", "prob_at_layer")),
            },
        ),
        "class": View(
            _means(steps, "token_class AS class", "class", "depth DESC"),
            (Column("class", "name", "kind of token"), *_MEANS),
            {
                "depth": Drawing("ranked", ("class",), ("depth", "in_last_layer")),
                "probability": Drawing("ranked", ("class",), ("prob", "prob_at_layer")),
            },
        ),
    }


_OF_LENS = _views(_READ)


def _run(session: QuerySession, request: Request) -> Answer:
    sql = None if request.options["lens"] == LOGIT else _OF_LENS[request.view].sql
    return require_rows(session, request, run_statement(session, request, sql))


SETTLE = Question(
    "settle",
    "Settling",
    "Where tokens settle",
    "The first layer from which the chosen token stays on top of a lens.",
    "A token that the context makes likely often settles early. Where a token settles in the last "
    "layer, the layer before still ranks another token first. The lens reads early layers badly, "
    "so a token may be decided before the lens shows it.",
    _views("step"),
    {"lens": ONE_LENS, "origin": ORIGIN},
    run=_run,
)
