"""prompt: which segments, messages and tokens of traced prompts surprise the model most."""

from __future__ import annotations

from typing import get_args

from oki_trace.analysis.question import Column, Drawing, Option, Question, View
from oki_trace.analysis.scope import compose
from oki_trace.records import Segment

# The steps of given tokens, each with its segment. Rounding can leave a logprob above 0.
_GIVEN = """\
WITH scope AS ($scope),
given AS (
  SELECT step.*, greatest(-step.logprob, 0) AS surprisal, segment, model_id
  FROM step JOIN scope USING (message_id) JOIN prompt_token USING (message_id, position)
  WHERE step.origin = 'given' AND step.logprob IS NOT NULL
    AND $segment IN ('any', segment)
)"""

_MEANS = """\
count(*) AS tokens, avg(surprisal) AS surprisal, exp(avg(surprisal)) AS perplexity,
  avg((rank = 1)::INT) AS likeliest, avg(entropy) AS entropy,
  arg_max(token, surprisal) AS token, max(surprisal) AS max_surprisal"""

_MODEL = Column("model", "name", "the model")
_CONVERSATION = Column("conversation", "name", "the conversation")
_MESSAGE = Column("message", "name", "the reply to the prompt, or the scored text")
_COLUMNS = (
    Column("tokens", "number", "traced tokens"),
    Column("surprisal", "number", "mean -log probability of the tokens", "nats"),
    Column("perplexity", "number", "exp of the mean surprisal"),
    Column("likeliest", "share", "tokens that were the model's most likely one"),
    Column("entropy", "number", "mean entropy", "nats"),
    Column("token", "token", "the most surprising token"),
    Column("max_surprisal", "number", "its surprisal", "nats"),
)

PROMPT = Question(
    "prompt",
    "Prompts",
    "Surprising prompts",
    "The segments, messages and tokens of traced prompts and scored texts that surprise the model "
    "most.",
    "Surprisal is -log of the probability that the model gave to the token before it read it; "
    "perplexity is exp of its mean. Only prompts that were traced count, and tokens that an "
    "earlier turn traced count once, in that turn.",
    {
        "segment": View(
            compose(
                """
$given
SELECT model_id AS model, segment, $means
FROM given
GROUP BY model_id, segment
ORDER BY surprisal DESC, model, segment
""",
                given=_GIVEN,
                means=_MEANS,
            ),
            (_MODEL, Column("segment", "name", "the part of the prompt"), *_COLUMNS),
            {
                "surprisal": Drawing("ranked", ("segment", "model"), ("surprisal", "entropy")),
                "perplexity": Drawing("ranked", ("segment", "model"), ("perplexity",)),
            },
        ),
        "message": View(
            compose(
                """
$given
SELECT conversation_id AS conversation, message_id AS message, any_value(given.model_id) AS model,
  $means
FROM given JOIN message ON message.id = message_id
GROUP BY conversation_id, message_id
ORDER BY surprisal DESC, message
LIMIT $top
""",
                given=_GIVEN,
                means=_MEANS,
            ),
            (_CONVERSATION, _MESSAGE, _MODEL, *_COLUMNS),
            {
                "surprisal": Drawing("ranked", ("message", "model"), ("surprisal",)),
                "perplexity": Drawing("ranked", ("message", "model"), ("perplexity",)),
            },
        ),
        "token": View(
            compose(
                """
$given
SELECT conversation_id AS conversation, message_id AS message, given.position, segment, token,
  prob, surprisal, rank, runner_up_token AS instead, runner_up_prob AS instead_prob
FROM given JOIN message ON message.id = message_id
ORDER BY surprisal DESC, message_id, given.position
LIMIT $top
""",
                given=_GIVEN,
            ),
            (
                _CONVERSATION,
                _MESSAGE,
                Column("position", "name", "the token's position"),
                Column("segment", "name", "the part of the prompt"),
                Column("token", "token", "the token"),
                Column("prob", "share", "its probability", label="probability"),
                Column("surprisal", "number", "-log of its probability", "nats"),
                Column("rank", "number", "1: it was the most likely token"),
                Column("instead", "token", "the most likely other token"),
                Column("instead_prob", "share", "probability of that token"),
            ),
            {"surprisal": Drawing("ranked", ("token", "message", "position"), ("surprisal",))},
        ),
    },
    {
        "top": Option(20, "Rows", "how many rows"),
        "segment": Option(
            "any", "Segment", "the part of the prompt", choices=("any", *get_args(Segment))
        ),
    },
)
