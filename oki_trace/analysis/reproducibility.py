"""The same prompt again: what seeds, temperatures, models and quantisations change."""

from __future__ import annotations

from oki_trace.analysis.questions import Picture, Question, View, columns

# Replies to the same messages; how far they say the same; what each was like.
_REPLIES = """,
replies AS (
  SELECT message.*, count(*) OVER (PARTITION BY prompt_hash) AS times
  FROM message JOIN scope ON message.id = scope.message_id
  WHERE tokens > 0
),
said AS (
  SELECT prompt_hash, times, replies.id AS reply, step_index, token_id, prob, logprob, step.entropy,
    settle_layer / step.layers AS depth
  FROM step JOIN replies ON step.message_id = replies.id
  WHERE times > 1
),
places AS (
  SELECT prompt_hash, step_index, count(*) AS here, count(DISTINCT token_id) AS different,
    stddev_pop(prob) AS prob_spread, stddev_pop(entropy) AS entropy_spread
  FROM said GROUP BY prompt_hash, step_index
),
parted AS (
  SELECT replies.prompt_hash, min(step_index) FILTER (different > 1 OR here < times) AS first_apart
  FROM places JOIN (SELECT DISTINCT prompt_hash, times FROM replies) AS replies
    ON places.prompt_hash = replies.prompt_hash
  GROUP BY replies.prompt_hash
),
of_reply AS (
  SELECT reply, count(*) AS steps, avg(-logprob) AS surprisal, avg(entropy) AS entropy,
    avg(depth) AS depth
  FROM said GROUP BY reply
)
"""

REPRODUCIBILITY = Question(
    "again",
    "The same prompt again: what other seeds, temperatures, models and quantisations change.",
    "Replies to the same messages, word for word. Up to where they part they have said the "
    "same, so there the spread of a token's probability is due to the model alone: 0 between "
    "seeds, small between quantisations.",
    {
        "prompt": View(
            _REPLIES
            + """
SELECT any_value(question.content) AS prompt, count(DISTINCT r.id) AS replies,
  count(DISTINCT r.content) AS texts, count(DISTINCT r.model_id) AS models,
  count(DISTINCT coalesce(r.quantization, r.dtype)) AS precisions,
  count(DISTINCT coalesce(r.temperature, 0)) AS temperatures, count(DISTINCT r.seed) AS seeds,
  any_value(coalesce(first_apart, r.tokens)) AS alike, any_value(spread) AS prob_spread,
  avg(r.tokens) AS tokens, stddev_pop(r.tokens) AS tokens_spread,
  avg(surprisal) AS surprisal, stddev_pop(surprisal) AS surprisal_spread
FROM replies AS r JOIN of_reply ON of_reply.reply = r.id
  JOIN parted ON parted.prompt_hash = r.prompt_hash
LEFT JOIN (
  SELECT places.prompt_hash, avg(prob_spread) AS spread
  FROM places JOIN parted ON places.prompt_hash = parted.prompt_hash
  WHERE first_apart IS NULL OR step_index < first_apart GROUP BY places.prompt_hash
) AS shared ON shared.prompt_hash = r.prompt_hash
LEFT JOIN message AS question
  ON question.conversation_id = r.conversation_id AND question.position = r.position - 1
GROUP BY r.prompt_hash
ORDER BY replies DESC, prompt
LIMIT $top
""",
            columns("""
prompt name what was asked last
replies number how many replies
texts number different texts among them
models number different models
precisions number different precisions or quantisations
temperatures number different temperatures; greedy is 0
seeds number different seeds
alike number tokens that all begin with
prob_spread number standard deviation of a token's probability among these, mean over them
tokens number mean length
tokens_spread number its standard deviation
surprisal number mean surprisal of the replies, in nats a token
surprisal_spread number its standard deviation
"""),
            Picture("prompt", ("replies", "texts")),
        ),
        "setting": View(
            _REPLIES
            + """
SELECT any_value(question.content) AS prompt, r.model_id AS model,
  coalesce(r.quantization, r.dtype) AS precision, coalesce(r.temperature, 0) AS temperature,
  count(DISTINCT r.id) AS replies, count(DISTINCT r.content) AS texts, avg(r.tokens) AS tokens,
  stddev_pop(r.tokens) AS tokens_spread, avg(surprisal) AS surprisal,
  stddev_pop(surprisal) AS surprisal_spread, avg(of_reply.entropy) AS entropy,
  stddev_pop(of_reply.entropy) AS entropy_spread, avg(depth) AS depth
FROM replies AS r JOIN of_reply ON of_reply.reply = r.id
LEFT JOIN message AS question
  ON question.conversation_id = r.conversation_id AND question.position = r.position - 1
GROUP BY r.prompt_hash, model, precision, coalesce(r.temperature, 0)
ORDER BY prompt, model, precision, temperature
LIMIT $top
""",
            columns("""
prompt name what was asked last
model name the model
precision name dtype or quantisation
temperature number 0: greedy
replies number how many replies
texts number different texts among them
tokens number mean length
tokens_spread number its standard deviation
surprisal number mean surprisal, in nats a token
surprisal_spread number its standard deviation over the replies
entropy number mean entropy, in nats
entropy_spread number its standard deviation over the replies
depth share mean depth at which tokens settled
"""),
            Picture("temperature", ("surprisal", "entropy")),
        ),
        "reply": View(
            _REPLIES
            + """
SELECT any_value(question.content) AS prompt, r.id AS message, r.model_id AS model,
  coalesce(r.quantization, r.dtype) AS precision, coalesce(r.temperature, 0) AS temperature,
  r.seed, of_reply.steps AS tokens, surprisal, of_reply.entropy, depth, r.content AS text
FROM replies AS r JOIN of_reply ON of_reply.reply = r.id
LEFT JOIN message AS question
  ON question.conversation_id = r.conversation_id AND question.position = r.position - 1
GROUP BY ALL
ORDER BY prompt, model, precision, temperature, r.seed, message
LIMIT $top
""",
            columns("""
prompt name what was asked last
message name the reply
model name the model
precision name dtype or quantisation
temperature number 0: greedy
seed number the seed
tokens number its length
surprisal number mean surprisal, in nats a token
entropy number mean entropy, in nats
depth share mean depth at which tokens settled
text name what was said
"""),
            Picture("message", ("surprisal", "entropy")),
        ),
    },
    {"top": (50, "how many rows")},
)
