"""The state of the Questions page as URL parameters: pure functions, no Streamlit.

Only the URL holds the state, so a link opens the same question in the same view of the same
replies. An invalid parameter counts as absent.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from oki_trace.analysis.question import Question, Value
from oki_trace.analysis.scope import Scope, parse_time
from oki_trace.records import Role

# The fields that select the replies.
_SCOPE = ("model", "conversation", "message", "since", "until", "role", "text")


@dataclass(frozen=True, slots=True)
class QuestionState:
    """A question, its view, the replies it is about, and its options.

    ``since`` and ``until`` are days, both included. ``options`` are (name, value) pairs; those
    that are missing have their defaults. ``first`` and ``second`` are the two subjects of a
    question that compares.
    """

    question: str = ""
    view: str = ""
    model: str | None = None
    conversation: int | None = None
    message: int | None = None
    since: dt.date | None = None
    until: dt.date | None = None
    role: Role | None = None
    text: str = ""
    options: tuple[tuple[str, Value], ...] = ()
    first: str = ""
    second: str = ""

    def query(self) -> dict[str, str]:
        """The parameters of the address."""
        named = {name: getattr(self, name) for name in _FIELDS} | dict(self.options)
        return {name: str(value) for name, value in named.items() if value not in (None, "")}

    def scope(self) -> Scope:
        """The replies it is about."""
        return Scope(
            self.model,
            self.conversation,
            self.message,
            parse_time(self.since.isoformat()) if self.since else None,
            parse_time(self.until.isoformat(), end=True) if self.until else None,
            self.role,
            self.text or None,
        )

    def with_option(self, name: str, value: Value | None) -> QuestionState:
        """The same with another value of an option; None: its default."""
        others = tuple(pair for pair in self.options if pair[0] != name)
        return replace(self, options=others if value is None else (*others, (name, value)))

    @property
    def is_narrowed(self) -> bool:
        """Whether any reply is left out."""
        return self.without_scope() != self

    def without_scope(self) -> QuestionState:
        """The same question about all replies."""
        default = QuestionState()
        return replace(self, **{name: getattr(default, name) for name in _SCOPE})

    def another(self, question: str) -> QuestionState:
        """Another question, with its defaults, about the same replies."""
        return QuestionState(question, **{name: getattr(self, name) for name in _SCOPE})


_FIELDS = tuple(field.name for field in fields(QuestionState) if field.name != "options")


def parameters(questions: Mapping[str, Question]) -> frozenset[str]:
    """The parameters that the page's address may hold."""
    options = (name for question in questions.values() for name in question.options)
    return frozenset((*_FIELDS, *options))


def read(query: Mapping[str, str], questions: Mapping[str, Question]) -> QuestionState:
    """The state that an address holds."""
    question = questions.get(query.get("question", "")) or next(iter(questions.values()))
    view, role = query.get("view", ""), query.get("role", "")
    options: dict[str, Any] = {
        name: option.parse(query.get(name, "")) for name, option in question.options.items()
    }
    return QuestionState(
        question=question.name,
        view=view if view in question.offered else question.offered[0],
        model=query.get("model") or None,
        conversation=_number(query, "conversation"),
        message=_number(query, "message"),
        since=_day(query, "since"),
        until=_day(query, "until"),
        role=Role(role) if role in set(Role) else None,
        text=query.get("text", ""),
        options=tuple(pair for pair in options.items() if pair[1] is not None),
        first=query.get("first", ""),
        second=query.get("second", ""),
    )


def _number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def _day(query: Mapping[str, str], name: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(query.get(name, ""))
    except ValueError:
        return None
