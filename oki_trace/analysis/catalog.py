"""All built-in questions, by name."""

from __future__ import annotations

from typing import Any

from oki_trace.analysis import compare, heads, questions
from oki_trace.analysis.attention import ATTENTION
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.questions import Answer, Question
from oki_trace.analysis.reproducibility import REPRODUCIBILITY
from oki_trace.analysis.scope import Scope
from oki_trace.analysis.settling import LAYERS, RIVALS, SETTLE
from oki_trace.analysis.uncertainty import UNCERTAINTY
from oki_trace.errors import UsageError

# Their statements read tensors, and their answers say what they stand on.
HEADS = Question(
    "heads",
    "Heads that look at one thing: the first token, the token before, a part of the prompt.",
    "From the full attention tensors of a sample of the steps. Most heads rest on the first "
    "token: that is where attention goes that has nothing to do.",
    {},
    {"sample": (64, "how many steps are read"), "top": (20, "how many heads")},
)
COMPARE = Question(
    "compare",
    "Two steps, two replies or two models: how far their distributions are apart.",
    "KL, Jensen-Shannon and total variation from the full logits where both were kept, from the "
    "candidates where not. Only steps after the same words compare the models; later ones "
    "answer different texts.",
    {},
    {
        "sample": (compare.SAMPLE, "how many steps are read, for models"),
        "top": (20, "how many prompts, for models"),
    },
)

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        SETTLE,
        UNCERTAINTY,
        LAYERS,
        RIVALS,
        ATTENTION,
        HEADS,
        COMPARE,
        REPRODUCIBILITY,
    )
}


def answer(
    trove: QuerySession,
    name: str,
    what: tuple[str, ...] = (),
    *,
    scope: Scope | None = None,
    view: str | None = None,
    **given: Any,
) -> Answer:
    """Ask a question by its name. Raises UsageError when it is put wrongly, else QuestionError
    or NotFound.
    """
    question = QUESTIONS.get(name)
    if question is None:
        raise UsageError(f"There is no question {name}: ask {', '.join(QUESTIONS)}.")
    if question is COMPARE:
        return _compare(trove, what, scope, _given(question, given))
    if what:
        raise UsageError(f"{name} takes no {what[0]}: narrow it down with options, as --model.")
    if question is HEADS:
        return heads.heads_answer(trove, scope, **_given(question, given))
    return questions.ask(trove, question, scope, view, **_given(question, given))


def _given(question: Question, given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key in question.parameters}


def _compare(
    trove: QuerySession, what: tuple[str, ...], scope: Scope | None, given: dict[str, Any]
) -> Answer:
    steps = [_step(one) for one in what]
    kinds = {
        "step" if step else "reply" if one.isdecimal() else "model"
        for one, step in zip(what, steps, strict=True)
    }
    if len(what) != 2 or len(kinds) != 1:
        raise UsageError(
            "compare takes two of a kind: two steps (2:5 4:5), two replies (2 4) or two models."
        )
    if steps[0] and steps[1]:
        return compare.steps_answer(trove, steps[0], steps[1])
    if kinds == {"reply"}:
        return compare.replies_answer(trove, int(what[0]), int(what[1]))
    return compare.models_answer(trove, what[0], what[1], scope, **given)


def _step(text: str) -> tuple[int, int] | None:
    """``message:step``; None for what is not that."""
    message, colon, step = text.partition(":")
    return (int(message), int(step)) if colon and (message + step).isdecimal() else None
