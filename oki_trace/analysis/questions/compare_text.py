"""compare, of two messages with one text, such as a reply and its score by another model.

By token, the distributions of each step are compared, all after the same text. By characters,
the surprisal of the text between common token boundaries, which is the sum over its tokens
(the chain rule), so that models with different vocabularies can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from oki_trace.analysis.one_text import OneText
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import Answer, Column, Drawing, Request, View, run_statement
from oki_trace.explain import quoted
from oki_trace.records import StepSummary
from oki_trace.sanitize import visible

_TOKENS = """
WITH one AS (
  SELECT * FROM step WHERE message_id = $first
    AND position >= $first_position AND position < $first_position + $tokens
),
two AS (
  SELECT * FROM step WHERE message_id = $second
    AND position >= $second_position AND position < $second_position + $tokens
),
measured AS MATERIALIZED (
  SELECT one.position AS position, two.position AS other_position, one.token AS token,
    one.logprob AS logprob, two.logprob AS other_logprob, one.rank AS rank, two.rank AS other_rank,
    distance_at($first, one.position, $second, two.position) AS d
  FROM one JOIN two ON two.position = one.position - $first_position + $second_position
)
SELECT position, other_position, token, logprob, other_logprob,
  other_logprob - logprob AS difference, rank, other_rank, d.kl AS kl,
  d.kl_reverse AS kl_reverse, d.js AS js, d.tv AS tv, d.tv_most AS tv_most, d.basis AS basis
FROM measured
ORDER BY position
"""

_SPANS = """
WITH span AS (
  SELECT unnest($first_starts) AS first_start, unnest($first_ends) AS first_end,
    unnest($second_starts) AS second_start, unnest($second_ends) AS second_end,
    unnest($texts) AS text, unnest($sizes) AS bytes
),
one AS (
  SELECT first_start, count(*) AS tokens, sum(greatest(-logprob, 0)) / ln(2) AS bits
  FROM span JOIN step ON message_id = $first AND position >= first_start AND position < first_end
  GROUP BY first_start
),
two AS (
  SELECT second_start, count(*) AS tokens, sum(greatest(-logprob, 0)) / ln(2) AS bits
  FROM span JOIN step ON message_id = $second AND position >= second_start AND position < second_end
  GROUP BY second_start
)
SELECT first_start AS position, second_start AS other_position, text, bytes, one.tokens AS tokens,
  two.tokens AS other_tokens, one.bits AS bits, two.bits AS other_bits,
  two.bits - one.bits AS difference
FROM span JOIN one USING (first_start) JOIN two USING (second_start)
ORDER BY position
"""

DISTANCES = (
    Column("kl", "number", "KL(first ‖ second)", "nats", "KL"),
    Column("kl_reverse", "number", "KL(second ‖ first)", "nats"),
    Column("js", "number", "Jensen-Shannon divergence: at most 0.693", "nats", "JS"),
    Column("tv", "share", "total variation: exact, or its lower bound", "", "total variation"),
    Column("tv_most", "share", "the upper bound of the total variation"),
)
BASIS = Column("basis", "name", "full logits: exact; top-k: from candidates, an estimate")

_POSITIONS = (
    Column("position", "name", "position in the first message's text"),
    Column("other_position", "name", "position in the second's"),
)
TOKENS = View(
    _TOKENS,
    (
        *_POSITIONS,
        Column("token", "token", "the token, the same in both"),
        Column("logprob", "number", "its log probability in the first", "nats"),
        Column("other_logprob", "number", "its log probability in the second", "nats"),
        Column("difference", "number", "log probability: second minus first", "nats"),
        Column("rank", "number", "its rank in the first"),
        Column("other_rank", "number", "its rank in the second"),
        *DISTANCES,
        BASIS,
    ),
    {
        "total variation": Drawing("columns", ("position",), ("tv",)),
        "JS": Drawing("columns", ("position",), ("js",)),
        "KL": Drawing("columns", ("position",), ("kl",)),
        "log probability": Drawing("columns", ("position",), ("difference",)),
    },
    label="one text, by token",
    reads_tensors=True,
    offered=False,
)
SPANS = View(
    _SPANS,
    (
        *_POSITIONS,
        Column("text", "token", "the text between two common token boundaries"),
        Column("bytes", "number", "its bytes"),
        Column("tokens", "number", "its tokens in the first"),
        Column("other_tokens", "number", "its tokens in the second"),
        Column("bits", "number", "its surprisal in the first", "bits"),
        Column("other_bits", "number", "its surprisal in the second", "bits"),
        Column("difference", "number", "surprisal: second minus first", "bits"),
    ),
    {
        "difference": Drawing("columns", ("position",), ("difference",)),
        "surprisal": Drawing("lines", ("position",), ("bits", "other_bits")),
    },
    label="one text, by characters",
    bar="bits",
    offered=False,
)


def by_token(
    session: QuerySession, request: Request, messages: tuple[int, int], text: OneText
) -> Answer:
    """A row for each shared token; ``about`` has no distance yet."""
    first = text.spans[0]
    answer = run_statement(
        session,
        replace(request, view="tokens"),
        first=messages[0],
        second=messages[1],
        first_position=text.left[first.left[0]].position,
        second_position=text.right[first.right[0]].position,
        tokens=len(text.spans),
    )
    sums = [_sum(answer, name) for name in ("logprob", "other_logprob")]
    return replace(
        answer, about=f"{text.why} Log probability {sums[0]:.2f} nats and {sums[1]:.2f} nats."
    )


def by_character(
    session: QuerySession, request: Request, messages: tuple[int, int], text: OneText
) -> Answer:
    """A row for each span; the totals and the largest difference in ``about``."""
    left = [_positions(text.left, span.left) for span in text.spans]
    right = [_positions(text.right, span.right) for span in text.spans]
    answer = run_statement(
        session,
        replace(request, view="spans"),
        first=messages[0],
        second=messages[1],
        first_starts=[start for start, _ in left],
        first_ends=[end for _, end in left],
        second_starts=[start for start, _ in right],
        second_ends=[end for _, end in right],
        texts=[span.text.decode("utf-8", "replace") for span in text.spans],
        sizes=[len(span.text) for span in text.spans],
    )
    size = sum(len(span.text) for span in text.spans)
    per_byte = [_sum(answer, name) / size for name in ("bits", "other_bits")]
    return replace(
        answer,
        about=f"{text.why} First {per_byte[0]:.3f} bits per byte, second {per_byte[1]:.3f}, over "
        f"{size:,} bytes.{_largest(answer)}",
    )


def _positions(steps: Sequence[StepSummary], span: tuple[int, int]) -> tuple[int, int]:
    """The positions of a span's tokens, from the first up to the second."""
    return steps[span[0]].position, steps[span[1] - 1].position + 1


def _sum(answer: Answer, name: str) -> float:
    """The sum of the values that are known."""
    return math.fsum(value for value in answer.column(name) if value is not None)


def _largest(answer: Answer) -> str:
    known = [value or 0.0 for value in answer.column("difference")]
    at = max(range(len(known)), key=lambda i: abs(known[i]))
    text = quoted(visible(answer.column("text")[at]))
    return f" The largest difference is {known[at]:+.2f} bits, at {text}."
