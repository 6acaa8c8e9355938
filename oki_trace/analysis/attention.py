"""What it looked at: where attention went, by layer and by step."""

from __future__ import annotations

from oki_trace.analysis.questions import Picture, Question, View, columns

_SHARES = """
  avg(first_token) AS first_token, avg(attention_layer.system) AS system,
  avg(attention_layer.user) AS user, avg(attention_layer.assistant) AS assistant,
  avg(template) AS template, avg(reply) AS reply, avg(rest) AS rest, avg(missing) AS missing
"""

# Summed by step first: which row of the answer a step goes to is then worked out once for each.
_BY_STEP = """,
of_step AS (
  SELECT step_index,"""
_SUMS = """
    count(*) AS seen, count(*) FILTER (is_evidence) AS steps, sum(first_token) AS first_token,
    sum(attention_layer.system) AS system, sum(attention_layer.user) AS user,
    sum(attention_layer.assistant) AS assistant, sum(template) AS template,
    sum(reply) AS reply, sum(rest) AS rest, sum(missing) AS missing
  """
_FROM = "FROM attention_layer JOIN scope USING (message_id)\n  "
_SHARED = """
  sum(first_token) / sum(seen) AS first_token, sum(of_step.system) / sum(seen) AS system,
  sum(of_step.user) / sum(seen) AS user, sum(of_step.assistant) / sum(seen) AS assistant,
  sum(template) / sum(seen) AS template, sum(reply) / sum(seen) AS reply,
  sum(rest) / sum(seen) AS rest, sum(missing) / sum(seen) AS missing
FROM of_step
"""
_BUCKET = """
SELECT
  CASE WHEN step_index < 2 THEN step_index ELSE (2 ** floor(log2(step_index)))::INT END AS first,
"""
_BY_FIRST = _BUCKET + "  sum(steps) AS steps," + _SHARED + "GROUP BY first\nORDER BY first\n"
_BY_CELL = (
    _BUCKET
    + "  layer, sum(seen) AS steps,"
    + _SHARED
    + "GROUP BY first, layer\nORDER BY first, layer\n"
)

_FIRST = "first number steps of the reply from this one on, up to the next row's"
_SHARE_COLUMNS = """
steps number steps
first_token share on position 0: where models park attention that they have no use for
system share on the system message
user share on what the user said
assistant share on earlier replies
template share on the chat template around them
reply share on this reply's own tokens
rest share on positions below the kept ones
missing share on no position: a learned sink
"""

ATTENTION = Question(
    "attention",
    "What it looked at: the attention on the prompt's parts, on its own reply, on the first token.",
    "From the newest position, heads averaged, out of the most attended positions that are "
    "kept for each layer; rest is what they leave out. Attention says where the model looked, "
    "not why.",
    {
        "layer": View(
            "\nSELECT model_id AS model, layer, count(*) AS steps,"
            + _SHARES
            + "FROM attention_layer JOIN scope USING (message_id)\n"
            "GROUP BY model_id, layer\nORDER BY model, layer\n",
            columns("model name the model\nlayer number the layer" + _SHARE_COLUMNS),
            Picture("layer", ("first_token", "system", "user", "assistant", "template", "reply")),
        ),
        "step": View(
            _BY_STEP + _SUMS + _FROM + "GROUP BY step_index\n)" + _BY_FIRST,
            columns(_FIRST + _SHARE_COLUMNS),
            Picture("first", ("first_token", "system", "user", "assistant", "template", "reply")),
        ),
        "evidence": View(
            _BY_STEP + _SUMS + _FROM + "WHERE is_evidence GROUP BY step_index\n)" + _BY_FIRST,
            columns(_FIRST + "; the final layer alone" + _SHARE_COLUMNS),
            Picture("first", ("first_token", "system", "user", "assistant", "template", "reply")),
        ),
        "grid": View(
            _BY_STEP + " layer," + _SUMS + _FROM + "GROUP BY step_index, layer\n)" + _BY_CELL,
            columns(_FIRST + "\nlayer number the layer" + _SHARE_COLUMNS),
            Picture("first", ("reply",), across="layer"),
        ),
    },
)
