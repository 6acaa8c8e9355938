"""What the Questions page asks, and how it stands in the address: pure functions, no Streamlit.

The address is the only place that holds it, so a link opens the same question in
the same view of the same replies. What in it makes no sense counts as absent.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from oki_trace.records import Role

if TYPE_CHECKING:
    from oki_trace.analysis.questions import Question
    from oki_trace.analysis.scope import Scope

# The questions as the page lists them: a heading, and under it each with its short name.
GROUPS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("Where answers form", {"settle": "Where tokens settle"}),
    ("Where the model was unsure", {"uncertainty": "Least certain steps"}),
    (
        "What the layers did",
        {"layers": "Layer by layer", "rivals": "Confident intermediate answers"},
    ),
    ("What it looked at", {"attention": "Parts of the text", "heads": "Specialised heads"}),
    ("Compare", {"compare": "Two steps, replies, models"}),
    ("The same prompt again", {"again": "Seeds, settings, models"}),
)
TITLES = {name: title for _, those in GROUPS for name, title in those.items()}

# What two of are compared; the other questions' views are the engine's own.
KINDS = ("reply", "step", "model")
_DIGITS = 15
# The fields that say which replies a question is about.
_SCOPE = ("model", "conversation", "message", "since", "until", "role", "text")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its view, the replies it is about, and its options.

    ``since`` and ``until`` are days, both included. ``first`` and ``second`` are
    what ``compare`` takes. Options that are None are the question's own.
    """

    question: str = "settle"
    view: str = "layer"
    model: str | None = None
    conversation: int | None = None
    message: int | None = None
    since: dt.date | None = None
    until: dt.date | None = None
    role: Role | None = None
    text: str = ""
    top: int | None = None
    least: float | None = None
    from_layer: int | None = None
    sample: int | None = None
    first: str = ""
    second: str = ""

    def query(self) -> dict[str, str]:
        """As it stands in an address."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) for name, value in named.items() if value not in (None, "")}

    def scope(self) -> Scope:
        """The replies it is about."""
        from oki_trace.analysis.scope import Scope, moment

        return Scope(
            self.model,
            self.conversation,
            self.message,
            moment(self.since.isoformat()) if self.since else None,
            moment(self.until.isoformat(), end=True) if self.until else None,
            self.role,
            self.text or None,
        )

    def options(self, question: Question) -> dict[str, Any]:
        """The options that were given, of those the question takes."""
        given = {name: getattr(self, name) for name in question.parameters}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def narrowed(self) -> bool:
        """Whether any reply is left out."""
        return self.everything() != self

    def everything(self) -> Asked:
        """The same question about all replies."""
        nothing = Asked()
        return replace(self, **{name: getattr(nothing, name) for name in _SCOPE})

    def instead(self, question: str) -> Asked:
        """Another question, as it comes, about the same replies."""
        return Asked(question, "", **{name: getattr(self, name) for name in _SCOPE})


# What the page's address may hold.
PARAMETERS = frozenset(field.name for field in fields(Asked))


def views(question: Question) -> tuple[str, ...]:
    """The ways to ask it; none to choose from when empty."""
    return KINDS if question.name == "compare" else tuple(question.views)


def read(query: Mapping[str, str], questions: Mapping[str, Question]) -> Asked:
    """What an address asks."""
    name = query.get("question", "")
    question = questions.get(name) or questions["settle"]
    ways = views(question)
    view = query.get("view", "")
    role = query.get("role", "")
    return Asked(
        question=question.name,
        view=view if view in ways else (ways[0] if ways else ""),
        model=query.get("model") or None,
        conversation=_number(query, "conversation"),
        message=_number(query, "message"),
        since=_day(query, "since"),
        until=_day(query, "until"),
        role=Role(role) if role in set(Role) else None,
        text=query.get("text", ""),
        top=_number(query, "top", least=1),
        least=_share(query, "least"),
        from_layer=_number(query, "from_layer"),
        sample=_number(query, "sample", least=1),
        first=query.get("first", ""),
        second=query.get("second", ""),
    )


def step_of(text: str) -> tuple[int, int | None] | None:
    """``message:step`` or ``message``; None for what is neither."""
    message, colon, step = text.partition(":")
    if not _is_number(message) or (colon and not _is_number(step)):
        return None
    return int(message), int(step) if colon else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS


def _number(query: Mapping[str, str], name: str, least: int = 0) -> int | None:
    text = query.get(name, "")
    return int(text) if _is_number(text) and int(text) >= least else None


def _share(query: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(query.get(name, ""))
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _day(query: Mapping[str, str], name: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(query.get(name, ""))
    except ValueError:
        return None
