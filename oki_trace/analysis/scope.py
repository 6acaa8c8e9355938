"""Selects the replies that a question covers: by model, conversation, date, role and text."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from string import Template
from typing import Any

from oki_trace.errors import UsageError
from oki_trace.records import Role

_CONDITIONS = {
    "model": "model_id = $model",
    "conversation": "conversation_id = $conversation",
    "message": "id = $message",
    "since": "created_at >= $since",
    "until": "created_at < $until",
}
# The steps of an option ``origin``.
ORIGINS = ("generated", "sampled", "forced", "given", "all")
OF_ORIGIN = """\
CASE $origin WHEN 'all' THEN true WHEN 'generated' THEN origin <> 'given'
    ELSE origin = $origin END"""
# The same for rows that know the number of their step alone.
KINDS = ("generated", "given", "all")
OF_KIND = """\
CASE $origin WHEN 'all' THEN true WHEN 'given' THEN step_index IS NULL
    ELSE step_index IS NOT NULL END"""
_OF_EARLIER = {
    "role": "earlier.role = $role",
    "text": "contains(lower(earlier.content), lower($text))",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """The replies that meet all of these conditions; None: no condition.

    ``since`` and ``until`` (exclusive) are aware times. ``text``: a message of the conversation,
    up to and including the reply, contains it; ``role``: the role of that message.
    """

    model: str | None = None
    conversation: int | None = None
    message: int | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    role: Role | None = None
    text: str | None = None

    def sql(self) -> str:
        """The SELECT of these replies: message_id and model_id."""
        parameters = self.parameters()
        earlier = [sql for name, sql in _OF_EARLIER.items() if name in parameters]
        conditions = [
            "role = 'assistant'",
            *(sql for name, sql in _CONDITIONS.items() if name in parameters),
        ]
        if earlier:
            conditions.append(f"""EXISTS (
      FROM message AS earlier
      WHERE earlier.conversation_id = m.conversation_id AND earlier.position <= m.position
        AND {" AND ".join(earlier)})""")
        return compose(
            """
  SELECT id AS message_id, model_id
  FROM message AS m
  WHERE $conditions
""",
            conditions="\n    AND ".join(conditions),
        )

    def parameters(self) -> dict[str, Any]:
        """The conditions that were given, as values for DuckDB."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        given = {name: value for name, value in named.items() if value not in (None, "")}
        for name in {"since", "until"} & given.keys():
            given[name] = given[name].astimezone(dt.UTC).replace(tzinfo=None)
        if "role" in given:
            given["role"] = str(given["role"])
        return given


def compose(statement: str, **fragments: str) -> str:
    """``statement`` with SQL of this package in place of ``$name``; parameters stay as they are.

    Values never come in this way: they are bound as parameters.
    """
    return Template(statement).safe_substitute(fragments)


def parse_time(text: str, *, end: bool = False) -> dt.datetime:
    """A date or a time in the local time zone; ``end``: the end of a date."""
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{text} is not a date: write 2026-01-31 or 2026-01-31T18:00.") from error
    if end and len(text) <= len("2026-01-31"):
        when += dt.timedelta(days=1)
    return when.astimezone()
