"""reproducibility: how seeds, temperatures, models and quantisations change a reply."""

from __future__ import annotations

from oki_trace.analysis.question import Column, Drawing, Option, Question, View
from oki_trace.analysis.scope import compose

# A row for each reply: its prompt, its settings, and the means over its steps.
_REPLIES = """\
WITH scope AS ($scope),
replies AS (
  SELECT message.*, count(*) OVER (PARTITION BY prompt_hash) AS times
  FROM message JOIN scope ON message.id = scope.message_id
  WHERE tokens > 0
),
of_steps AS (
  SELECT message_id, avg(-logprob) AS surprisal, avg(entropy) AS entropy,
    avg(settle_layer / layers) AS depth
  FROM step
  WHERE step_index IS NOT NULL AND message_id IN (SELECT id FROM replies WHERE times > 1)
  GROUP BY message_id
),
repeated AS (
  SELECT r.id AS message, r.prompt_hash, question.content AS prompt, r.model_id AS model,
    coalesce(r.quantization, r.dtype) AS precision, coalesce(r.temperature, 0) AS temperature,
    r.seed, r.tokens, surprisal, entropy, depth, r.content AS text, r.times
  FROM replies AS r JOIN of_steps ON of_steps.message_id = r.id
  LEFT JOIN message AS question
    ON question.id = r.parent_id
  WHERE times > 1
)"""

_PROMPT = Column("prompt", "name", "the last message of the prompt")
_MODEL = Column("model", "name", "the model")
_PRECISION = Column("precision", "name", "dtype or quantisation")
_TEMPERATURE = Column("temperature", "number", "0: greedy")
_COUNT = Column("replies", "number", "how many replies")
_TEXTS = Column("texts", "number", "different texts among them")
_DEPTH = Column("depth", "share", "mean depth at which tokens settle")
_SPREADS = tuple(
    column
    for name, meaning, unit in (
        ("tokens", "mean length in tokens", ""),
        ("surprisal", "mean surprisal", "nats per token"),
        ("entropy", "mean entropy", "nats"),
    )
    for column in (
        Column(name, "number", meaning, unit),
        Column(f"{name}_spread", "number", "its standard deviation over the replies", unit),
    )
)
_REPLY_NAME = ("prompt", "precision", "temperature", "seed", "message")

REPRODUCIBILITY = Question(
    "reproducibility",
    "Reproducibility",
    "Seeds, settings, models",
    "How other seeds, temperatures, models and quantisations change the reply to a prompt.",
    "Compares replies to exactly the same messages. Until the replies diverge their tokens are the "
    "same, so the spread of a token's probability is due to the model alone: 0 between seeds, "
    "small between quantisations.",
    {
        "prompt": View(
            compose(
                """
$replies,
places AS (
  SELECT prompt_hash, step_index, stddev_pop(prob) AS prob_spread,
    count(DISTINCT token_id) > 1 OR count(*) < any_value(times) AS has_diverged
  FROM step JOIN repeated ON step.message_id = repeated.message
  WHERE step_index IS NOT NULL
  GROUP BY prompt_hash, step_index
),
divergence AS (
  SELECT prompt_hash, min(step_index) FILTER (has_diverged) AS diverged_at
  FROM places GROUP BY prompt_hash
),
shared AS (
  SELECT prompt_hash, any_value(diverged_at) AS diverged_at,
    avg(prob_spread) FILTER (diverged_at IS NULL OR step_index < diverged_at) AS prob_spread
  FROM places JOIN divergence USING (prompt_hash)
  GROUP BY prompt_hash
)
SELECT any_value(prompt) AS prompt, count(*) AS replies, count(DISTINCT text) AS texts,
  count(DISTINCT model) AS models, count(DISTINCT precision) AS precisions,
  count(DISTINCT temperature) AS temperatures, count(DISTINCT seed) AS seeds,
  any_value(coalesce(diverged_at, tokens)) AS common_prefix, any_value(prob_spread) AS prob_spread,
  avg(tokens) AS tokens, stddev_pop(tokens) AS tokens_spread,
  avg(surprisal) AS surprisal, stddev_pop(surprisal) AS surprisal_spread
FROM repeated JOIN shared USING (prompt_hash)
GROUP BY prompt_hash
ORDER BY replies DESC, prompt
LIMIT $top
""",
                replies=_REPLIES,
            ),
            (
                _PROMPT,
                _COUNT,
                _TEXTS,
                Column("models", "number", "different models"),
                Column("precisions", "number", "different precisions or quantisations"),
                Column("temperatures", "number", "different temperatures; greedy is 0"),
                Column("seeds", "number", "different seeds"),
                Column("common_prefix", "number", "tokens with which all replies begin"),
                Column("prob_spread", "number", "mean spread of a token's probability in it"),
                *_SPREADS[:4],
            ),
            {
                "replies": Drawing("ranked", ("prompt",), ("replies", "texts")),
                "common prefix": Drawing("ranked", ("prompt",), ("common_prefix",)),
                "surprisal": Drawing(
                    "ranked", ("prompt",), ("surprisal",), spread="surprisal_spread"
                ),
            },
        ),
        "setting": View(
            compose(
                """
$replies
SELECT any_value(prompt) AS prompt, model, precision, temperature, count(*) AS replies,
  count(DISTINCT text) AS texts, avg(tokens) AS tokens, stddev_pop(tokens) AS tokens_spread,
  avg(surprisal) AS surprisal, stddev_pop(surprisal) AS surprisal_spread,
  avg(entropy) AS entropy, stddev_pop(entropy) AS entropy_spread, avg(depth) AS depth
FROM repeated
GROUP BY prompt_hash, model, precision, temperature
ORDER BY prompt, model, precision, temperature
LIMIT $top
""",
                replies=_REPLIES,
            ),
            (_PROMPT, _MODEL, _PRECISION, _TEMPERATURE, _COUNT, _TEXTS, *_SPREADS, _DEPTH),
            {
                name: Drawing(
                    "ranked",
                    ("prompt", "model", "precision", "temperature"),
                    (name,),
                    spread=f"{name}_spread",
                )
                for name in ("surprisal", "entropy", "tokens")
            },
        ),
        "reply": View(
            compose(
                """
$replies
SELECT prompt, message, model, precision, temperature, seed, tokens, surprisal, entropy, depth, text
FROM repeated
ORDER BY prompt, model, precision, temperature, seed, message
LIMIT $top
""",
                replies=_REPLIES,
            ),
            (
                _PROMPT,
                Column("message", "name", "the reply"),
                _MODEL,
                _PRECISION,
                _TEMPERATURE,
                Column("seed", "number", "the seed"),
                Column("tokens", "number", "its length in tokens"),
                _SPREADS[2],
                _SPREADS[4],
                _DEPTH,
                Column("text", "name", "its text"),
            ),
            {
                "surprisal": Drawing("ranked", _REPLY_NAME, ("surprisal", "entropy")),
                "depth": Drawing("ranked", _REPLY_NAME, ("depth",)),
                "tokens": Drawing("ranked", _REPLY_NAME, ("tokens",)),
            },
        ),
    },
    {"top": Option(50, "Rows", "how many rows")},
)
