"""Which replies a question is about: by model, conversation, date, role and text."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from oki_trace.errors import UsageError
from oki_trace.records import Role

_SCOPE = """\
WITH scope AS (
  SELECT id AS message_id, model_id
  FROM message AS m
  WHERE role = 'assistant'"""

_CONDITIONS = {
    "model": "model_id = $model",
    "conversation": "conversation_id = $conversation",
    "message": "id = $message",
    "since": "created_at >= $since",
    "until": "created_at < $until",
    "role": """EXISTS (
      FROM message AS said
      WHERE said.conversation_id = m.conversation_id AND said.position <= m.position
        AND said.role = $role)""",
    "text": """EXISTS (
      FROM message AS said
      WHERE said.conversation_id = m.conversation_id AND said.position <= m.position
        AND contains(lower(said.content), lower($text)))""",
    "role and text": """EXISTS (
      FROM message AS said
      WHERE said.conversation_id = m.conversation_id AND said.position <= m.position
        AND said.role = $role AND contains(lower(said.content), lower($text)))""",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """Every reply, but for what is left out.

    ``since`` and ``until`` (not included) are moments, aware. ``text``: replies
    in whose conversation, up to and with the reply, somebody said this;
    ``role`` says who.
    """

    model: str | None = None
    conversation: int | None = None
    message: int | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    role: Role | None = None
    text: str | None = None

    def sql(self) -> str:
        """The WITH clause that a question begins with."""
        given = [name for name in self.parameters() if name not in ("role", "text")]
        said = [name for name in ("role", "text") if getattr(self, name)]
        if said:
            given.append(" and ".join(said))
        return "\n    AND ".join([_SCOPE, *(_CONDITIONS[name] for name in given)]) + "\n)"

    def parameters(self) -> dict[str, Any]:
        """What was given, as DuckDB takes it."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        given = {name: value for name, value in named.items() if value not in (None, "")}
        for name in ("since", "until"):
            if name in given:
                given[name] = given[name].astimezone(dt.UTC).replace(tzinfo=None)
        if "role" in given:
            given["role"] = str(given["role"])
        return given


def moment(text: str, *, end: bool = False) -> dt.datetime:
    """A day or a moment as people write it, in the local time zone; ``end``: the day's end."""
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{text} is not a date: write 2026-01-31 or 2026-01-31T18:00.") from error
    if end and len(text) <= len("2026-01-31"):
        when += dt.timedelta(days=1)
    return when.astimezone()
