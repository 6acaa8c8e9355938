"""uncertainty: the model's least certain steps, and the tokens that it nearly chose."""

from __future__ import annotations

from oki_trace.analysis.question import Column, Drawing, Option, Question, View
from oki_trace.analysis.scope import OF_ORIGIN, ORIGINS, compose


def _least_certain(order: str) -> str:
    """The statement for the first steps in an ``order``, with the alternatives to each."""
    return compose(
        """
WITH scope AS ($scope),
chosen AS (
  SELECT step.* FROM step JOIN scope USING (message_id)
  WHERE entropy IS NOT NULL AND $of_origin
  ORDER BY $order, message_id, step.position
  LIMIT $top
),
alternatives AS (
  SELECT step_id, list(topk_entry.token ORDER BY topk_entry.rank) AS tokens,
    list(topk_entry.prob ORDER BY topk_entry.rank) AS probs
  FROM topk_entry JOIN chosen
    ON topk_entry.message_id = chosen.message_id AND step_id = chosen.id
  WHERE topk_entry.token_id <> chosen.token_id AND topk_entry.rank <= 4
  GROUP BY step_id
)
SELECT conversation_id AS conversation, message_id AS message, step_index AS step, token AS chosen,
  prob, entropy, margin, alternatives.tokens[:3] AS alternatives,
  alternatives.probs[:3] AS alternative_probs, chosen.position AS position
FROM chosen LEFT JOIN alternatives ON step_id = chosen.id JOIN message ON message.id = message_id
ORDER BY $order, message_id, chosen.position
""",
        order=order,
        of_origin=OF_ORIGIN,
    )


_STEP = (
    Column("conversation", "name", "the conversation"),
    Column("message", "name", "the reply"),
    Column("step", "name", "the step; none for a given token"),
    Column("chosen", "token", "the chosen token"),
    Column("prob", "share", "its probability", label="probability"),
    Column("entropy", "number", "entropy of the distribution", "nats"),
    Column("margin", "number", "probability of the first candidate minus that of the second"),
    Column("alternatives", "tokens", "the most likely other tokens, in order"),
    Column("alternative_probs", "number", "their probabilities"),
    Column("position", "name", "the token's position"),
)

UNCERTAINTY = Question(
    "uncertainty",
    "Uncertainty",
    "Least certain steps",
    "The model's least certain steps, and the tokens that it nearly chose.",
    "Entropy measures how spread out the whole distribution is; margin is the lead of the first "
    "candidate over the second. High entropy with a large margin means one clear favourite among "
    "many alternatives; a small margin means a near tie.",
    {
        "entropy": View(
            _least_certain("entropy DESC"),
            _STEP,
            {"entropy": Drawing("ranked", ("chosen", "message", "step"), ("entropy",))},
        ),
        "margin": View(
            _least_certain("margin"),
            _STEP,
            {"margin": Drawing("ranked", ("chosen", "message", "step"), ("margin",))},
        ),
        "reply": View(
            compose(
                """
WITH scope AS ($scope)
SELECT conversation_id AS conversation, message_id AS message, any_value(message.model_id) AS model,
  count(*) AS steps, avg(-logprob) AS surprisal, avg(step.entropy) AS entropy,
  arg_max_null(step_index, step.entropy) AS step, arg_max(token, step.entropy) AS chosen,
  arg_max(prob, step.entropy) AS prob, max(step.entropy) AS max_entropy,
  arg_max(step.position, step.entropy) AS position
FROM step JOIN scope USING (message_id) JOIN message ON message.id = message_id
WHERE step.entropy IS NOT NULL AND $of_origin
GROUP BY conversation_id, message_id
ORDER BY max_entropy DESC, message
LIMIT $top
""",
                of_origin=OF_ORIGIN,
            ),
            (
                Column("conversation", "name", "the conversation"),
                Column("message", "name", "the reply"),
                Column("model", "name", "the model"),
                Column("steps", "number", "its steps"),
                Column("surprisal", "number", "mean -log probability of its tokens", "nats"),
                Column("entropy", "number", "mean entropy", "nats"),
                Column("step", "name", "the least certain step; none for a given token"),
                Column("chosen", "token", "the token chosen at that step"),
                Column("prob", "share", "its probability", label="probability"),
                Column("max_entropy", "number", "the entropy at that step", "nats"),
                Column("position", "name", "the token's position"),
            ),
            {
                "entropy": Drawing("ranked", ("message", "model"), ("max_entropy", "entropy")),
                "surprisal": Drawing("ranked", ("message", "model"), ("surprisal",)),
            },
        ),
        "token": View(
            compose(
                """
WITH scope AS ($scope)
SELECT runner_up_token AS runner_up, count(*) AS steps, avg(runner_up_prob) AS prob,
  mode(token) AS chosen_instead, avg(margin) AS margin
FROM step JOIN scope USING (message_id)
WHERE runner_up_prob >= $least AND $of_origin
GROUP BY runner_up
ORDER BY steps DESC, runner_up
LIMIT $top
""",
                of_origin=OF_ORIGIN,
            ),
            (
                Column("runner_up", "token", "the most likely token that was not chosen"),
                Column("steps", "number", "how many steps"),
                Column("prob", "share", "its mean probability at these", label="probability"),
                Column("chosen_instead", "token", "the token most often chosen instead"),
                Column("margin", "number", "mean lead of the first candidate over the second"),
            ),
            {
                "how often": Drawing("ranked", ("runner_up",), ("steps",)),
                "probability": Drawing("ranked", ("runner_up",), ("prob", "margin")),
            },
        ),
    },
    {
        "top": Option(20, "Rows", "how many rows"),
        "origin": Option("generated", "Origin", "how the tokens came about", choices=ORIGINS),
        "least": Option(0.1, "Minimum probability", "the minimum probability of the runner-up"),
    },
)
