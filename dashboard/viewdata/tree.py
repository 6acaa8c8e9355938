"""A conversation as a tree, and the branches of one fork side by side: pure functions of records.

The probability of a path is that of its own tokens together, from the fork on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from dashboard.viewdata import branches, replies
from dashboard.viewdata.wording import Json, counted, finite, format_number, shorten
from oki_trace.message_tree import in_depth
from oki_trace.records import Message, Role, StepSummary
from oki_trace.sanitize import inert, visible

SHORT = 90
# Characters of the text before a fork that are shown.
KEPT = 160


def tree_data(
    messages: Sequence[Message], logprobs: Mapping[int, float], path: Collection[int]
) -> Json:
    """The data of ``components/tree.js``: a row for each message; ``path`` are those shown in Chat.

    ``logprobs``: of each reply's own tokens together, in nats.
    """
    rows = [
        {
            "id": message.id,
            "depth": depth,
            "role": str(message.role),
            "text": shorten(inert(" ".join(message.content.split())), SHORT),
            "from": None
            if message.branch_of is None
            else f"branch of message {message.branch_of} at step {message.branch_step}",
            "fork": message.branch_of is not None,
            "tokens": counted(message.tokens, "token") if message.tokens else "",
            "logprob": path_text(logprobs.get(message.id)),
            "status": _status(message),
            "shown": message.id in path,
        }
        for message, depth in in_depth(messages)
    ]
    return {"rows": rows, "csv": tree_rows(messages, logprobs)}


def tree_rows(messages: Sequence[Message], logprobs: Mapping[int, float]) -> list[list[object]]:
    """The tree as rows of a CSV, with a header."""
    columns = ["message", "follows", "role", "text", "branch_of", "branch_step", "tokens"]
    rows: list[list[object]] = [[*columns, "logprob_nats", "status"]]
    for message in messages:
        rows.append(
            [
                *(message.id, message.parent_id, str(message.role), message.content),
                *(message.branch_of, message.branch_step, message.tokens),
                *(logprobs.get(message.id), str(message.status)),
            ]
        )
    return rows


def path_text(logprob: float | None) -> str:
    """The log-probability of a path, and its probability."""
    if logprob is None:
        return ""
    return f"{format_number(logprob, 2)} nats ({math.exp(min(logprob, 0.0)):.2g})"


def forks(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Every place at which branches depart: (reply, step), the newest first."""
    places = {
        (m.branch_of, m.branch_step): m.id
        for m in messages
        if m.branch_of is not None and m.branch_step is not None
    }
    return sorted(places, key=lambda place: -places[place])


def paths_data(
    kept: str, ways: Sequence[tuple[Message, Sequence[StepSummary]]], origin: int
) -> Json:
    """The data of ``components/paths.js``: what the model said each way from one step.

    ``kept`` is the text before the fork. ``ways``: the replies with their steps from the fork on,
    ``origin`` among them, the reply that the others depart from. The most probable first token
    comes first.
    """
    cards = [_card(message, steps, message.id == origin) for message, steps in ways]
    cards.sort(key=lambda card: -(card["prob"] or 0.0))
    return {"kept": inert(kept[-KEPT:]), "cut": len(kept) > KEPT, "cards": cards}


def _card(message: Message, steps: Sequence[StepSummary], is_origin: bool) -> Json:
    texts = replies.token_texts(steps)
    first = steps[0] if steps else None
    logprob = sum(step.logprob for step in steps) if steps else None
    return {
        "id": message.id,
        "name": visible(first.token) if first else "…",
        "prob": finite(first.prob) if first else None,
        "rank": first.rank if first else None,
        "tokens": [replies.token_data(s, t) for s, t in zip(steps, texts, strict=True)],
        "path": f"{counted(len(steps), 'token')} · {path_text(logprob)}" if steps else "",
        "status": "original reply" if is_origin else _status(message),
        "live": message.status.is_live,
    }


def _status(message: Message) -> str:
    """How a reply ended, unless the model ended it."""
    if message.role is not Role.ASSISTANT:
        return ""
    if branches.can_continue(message) and message.reason == "token limit":
        return "cut at the token limit"
    return "" if str(message.status) == "complete" else str(message.status)
