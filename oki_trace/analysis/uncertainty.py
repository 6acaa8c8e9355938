"""Where the model was unsure, and what it nearly said."""

from __future__ import annotations

from oki_trace.analysis.questions import Picture, Question, View, columns

_LEAST_CERTAIN = """,
chosen AS (
  SELECT step.* FROM step JOIN scope USING (message_id)
  WHERE entropy IS NOT NULL
  ORDER BY """

_AND_NEARLY = """
  LIMIT $top
),
nearly AS (
  SELECT step_id, list(topk_entry.token ORDER BY topk_entry.rank) AS others,
    list(topk_entry.prob ORDER BY topk_entry.rank) AS other_probs
  FROM topk_entry JOIN chosen
    ON topk_entry.message_id = chosen.message_id AND step_id = chosen.id
  WHERE topk_entry.token_id <> chosen.token_id AND topk_entry.rank <= 4
  GROUP BY step_id
)
SELECT conversation_id AS conversation, message_id AS message, step_index AS step, token AS chosen,
  prob, entropy, margin, others[:3] AS others, other_probs[:3] AS other_probs
FROM chosen LEFT JOIN nearly ON step_id = chosen.id JOIN message ON message.id = message_id
ORDER BY """

_BY_ENTROPY = "entropy DESC, message_id, step_index"
_BY_MARGIN = "margin, message_id, step_index"

_STEP_COLUMNS = columns("""
conversation name the conversation
message name the reply
step name the step
chosen token the token
prob share its probability
entropy number of the distribution, in nats
margin number probability of the first candidate less that of the second
others tokens what it nearly said, the most likely first
other_probs number their probabilities
""")

UNCERTAINTY = Question(
    "uncertainty",
    "Where the model was unsure: its least certain steps, and what it nearly said there.",
    "Entropy is how spread the whole distribution is; margin how close the second candidate "
    "was. Much entropy with a clear margin is a favourite among many; a small margin a tie.",
    {
        "entropy": View(
            _LEAST_CERTAIN + _BY_ENTROPY + _AND_NEARLY + _BY_ENTROPY,
            _STEP_COLUMNS,
            Picture("step", ("entropy",)),
        ),
        "margin": View(
            _LEAST_CERTAIN + _BY_MARGIN + _AND_NEARLY + _BY_MARGIN,
            _STEP_COLUMNS,
            Picture("step", ("margin",)),
        ),
        "reply": View(
            """
SELECT conversation_id AS conversation, message_id AS message, any_value(message.model_id) AS model,
  count(*) AS steps, avg(-logprob) AS surprisal, avg(step.entropy) AS entropy,
  arg_max(step_index, step.entropy) AS step, arg_max(token, step.entropy) AS chosen,
  arg_max(prob, step.entropy) AS prob, max(step.entropy) AS worst
FROM step JOIN scope USING (message_id) JOIN message ON message.id = message_id
WHERE step.entropy IS NOT NULL
GROUP BY conversation_id, message_id
ORDER BY worst DESC, message
LIMIT $top
""",
            columns("""
conversation name the conversation
message name the reply
model name the model
steps number its steps
surprisal number mean -log probability of what was said, in nats
entropy number mean entropy, in nats
step name the least certain step
chosen token what was said there
prob share its probability
worst number the entropy there, in nats
"""),
            Picture("message", ("worst",)),
        ),
        "token": View(
            """
SELECT other_token AS nearly, count(*) AS steps, avg(other_prob) AS prob,
  mode(token) AS chosen_instead, avg(margin) AS margin
FROM step JOIN scope USING (message_id)
WHERE other_prob >= $least
GROUP BY nearly
ORDER BY steps DESC, nearly
LIMIT $top
""",
            columns("""
nearly token what was nearly said
steps number how often
prob share mean probability it had
chosen_instead token what was said most often instead
margin number mean lead of the first candidate
"""),
            Picture("nearly", ("steps",)),
        ),
    },
    {
        "top": (20, "how many rows"),
        "least": (0.1, "the least probability of what was nearly said"),
    },
)
