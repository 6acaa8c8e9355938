"""The built-in questions: one module each, listed in ``QUESTIONS``."""

from __future__ import annotations

from collections.abc import Sequence

from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import (
    Answer,
    Question,
    Request,
    Value,
    parse_step,
    run_statement,
)
from oki_trace.analysis.questions.attention import ATTENTION
from oki_trace.analysis.questions.compare import COMPARE
from oki_trace.analysis.questions.forks import FORKS
from oki_trace.analysis.questions.heads import HEADS
from oki_trace.analysis.questions.layers import LAYERS
from oki_trace.analysis.questions.prompt import PROMPT
from oki_trace.analysis.questions.reproducibility import REPRODUCIBILITY
from oki_trace.analysis.questions.rivals import RIVALS
from oki_trace.analysis.questions.settle import SETTLE
from oki_trace.analysis.questions.uncertainty import UNCERTAINTY
from oki_trace.analysis.scope import Scope
from oki_trace.errors import UsageError

# In the order of the explorer's list; questions of one group stand together.
QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        *(SETTLE, UNCERTAINTY, PROMPT, LAYERS, RIVALS),
        *(ATTENTION, HEADS, COMPARE, FORKS, REPRODUCIBILITY),
    )
}


def answer(
    session: QuerySession,
    name: str,
    subjects: tuple[str, ...] = (),
    *,
    scope: Scope | None = None,
    view: str | None = None,
    **options: Value,
) -> Answer:
    """Answer a question by name. Options that the question does not have are ignored.

    ``subjects``: the two steps, replies or models that the question compares. Raises UsageError
    for a question, view or subject that does not exist, else QuestionError or NotFound.
    """
    question = _named(name)
    if question.compares:
        view = _view_for(question, subjects)
    elif subjects:
        raise UsageError(
            f"{name} takes no {subjects[0]}: narrow it down with options such as --model."
        )
    view = view or question.offered[0]
    if view not in question.offered:
        raise UsageError(f"{name} has no view {view}: choose one of {', '.join(question.offered)}.")
    values = {key: options.get(key, option.default) for key, option in question.options.items()}
    request = Request(question, view, scope or Scope(), values, subjects)
    return (question.run or run_statement)(session, request)


def parse_options(name: str, pairs: Sequence[str]) -> dict[str, Value]:
    """Options of a question as ``NAME=VALUE``. Raises UsageError for invalid ones."""
    options = _named(name).options
    parsed: dict[str, Value] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        value = options[key].parse(text) if key in options else None
        if value is None:
            allowed = ", ".join(f"{key} ({option.range})" for key, option in options.items())
            raise UsageError(f"{name} does not allow {pair}: its options are {allowed or 'none'}.")
        parsed[key] = value
    return parsed


def _named(name: str) -> Question:
    if name not in QUESTIONS:
        raise UsageError(f"There is no question {name}: choose one of {', '.join(QUESTIONS)}.")
    return QUESTIONS[name]


def _view_for(question: Question, subjects: tuple[str, ...]) -> str:
    """The view that compares these. Raises UsageError unless they are two of one kind."""
    steps = [parse_step(subject) for subject in subjects]
    kinds = {"model" if s is None else "reply" if s[1] is None else "step" for s in steps}
    views = [name for name, view in question.views.items() if {view.compares} == kinds]
    if len(subjects) != 2 or not views:
        raise UsageError(
            f"{question.name} takes two steps (2:5 4:5), two replies (2 4) or two models."
        )
    return views[0]
