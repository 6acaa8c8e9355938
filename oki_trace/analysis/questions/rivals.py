"""rivals: intermediate layers that predict another token with confidence."""

from __future__ import annotations

from oki_trace.analysis.lens_choice import ONE_LENS, require_rows
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


def _run(session: QuerySession, request: Request) -> Answer:
    return require_rows(session, request, run_statement(session, request))


RIVALS = Question(
    "rivals",
    "Layers",
    "Confident intermediate answers",
    "Steps at which an intermediate layer gives a high probability to a token that is not chosen.",
    "The rival is the layer's most likely token, if the layer is read as if it were the last and "
    "the token is not the chosen one. Later layers of the model replace it.",
    {
        "step": View(
            """
WITH scope AS ($scope),
rivals AS (
  SELECT step_id, arg_max(layer, top_prob) AS layer, arg_max(top_token, top_prob) AS rival,
    max(top_prob) AS rival_prob, count(*) AS layers
  FROM lens_layer JOIN scope USING (message_id)
  WHERE step_index IS NOT NULL AND lens = $lens AND layer >= $from_layer
    AND top_prob >= $least AND chosen_rank > 1
  GROUP BY step_id
  ORDER BY rival_prob DESC, step_id
  LIMIT $top
)
SELECT conversation_id AS conversation, message_id AS message, step_index AS step, rivals.layer,
  rival, rival_prob, token AS chosen, prob, rivals.layers
FROM rivals JOIN step ON step.id = rivals.step_id JOIN message ON message.id = message_id
ORDER BY rival_prob DESC, step.id
""",
            (
                Column("conversation", "name", "the conversation"),
                Column("message", "name", "the reply"),
                Column("step", "name", "the step"),
                Column("layer", "number", "the layer that is most confident of the rival"),
                Column("rival", "token", "the most likely token at that layer"),
                Column("rival_prob", "share", "its probability at that layer"),
                Column("chosen", "token", "the chosen token"),
                Column("prob", "share", "its probability in the end", label="probability"),
                Column("layers", "number", "how many layers have such a rival"),
            ),
            {
                "probability": Drawing(
                    "ranked", ("rival", "chosen", "message", "step"), ("rival_prob", "prob")
                )
            },
        ),
        "layer": View(
            """
WITH scope AS ($scope)
SELECT model_id AS model, layer, count(*) AS steps,
  avg((chosen_rank > 1 AND top_prob >= $least)::INT) AS share
FROM lens_layer JOIN scope USING (message_id)
WHERE step_index IS NOT NULL AND lens = $lens AND layer >= $from_layer
GROUP BY model_id, layer
ORDER BY model, layer
""",
            (
                Column("model", "name", "the model"),
                Column("layer", "number", "the layer"),
                Column("steps", "number", "steps"),
                Column("share", "share", "share of the steps at which the layer has a rival"),
            ),
            {"share of the steps": Drawing("columns", ("layer",), ("share",))},
        ),
    },
    {
        "least": Option(0.5, "Minimum probability", "the minimum probability of the rival"),
        "from_layer": Option(2, "From layer", "the first layer: 0 mostly repeats its input", 0),
        "top": Option(20, "Rows", "how many steps"),
        "lens": ONE_LENS,
    },
    run=_run,
)
