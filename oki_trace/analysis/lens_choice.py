"""Options of questions about lenses: which lens or lenses, and the tokens of which origin."""

from __future__ import annotations

from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import Answer, Option, Request
from oki_trace.analysis.scope import KINDS
from oki_trace.errors import QuestionError
from oki_trace.records import LOGIT

ORIGIN = Option("generated", "Origin", "how the tokens came about", choices=KINDS)
ONE_LENS = Option(LOGIT, "Lens", "logit, or the name of an installed lens")
LENSES = Option(LOGIT, "Lens", "logit, or names of installed lenses with commas", several=True)

_READ_BY = """
WITH scope AS ($scope)
SELECT DISTINCT lens FROM lens_layer JOIN scope USING (message_id) ORDER BY lens
"""


def require_rows(session: QuerySession, request: Request, answer: Answer) -> Answer:
    """``answer``, if it has rows or is about the Logit Lens alone.

    Raises QuestionError, which names the lenses that have read the replies in question.
    """
    names = str(request.options["lens"]).split(",")
    if answer.rows or names == [LOGIT]:
        return answer
    read_by = [str(name) for (name,) in session.ask(*request.bind(_READ_BY)).rows]
    unknown = [name for name in names if name not in read_by]
    if not unknown:
        raise QuestionError(f"No step was read by all of {', '.join(names)}.")
    raise QuestionError(
        f"No step was read by the lens {unknown[0]}; the lenses of these replies: "
        f"{', '.join(read_by) or 'none'}."
    )
