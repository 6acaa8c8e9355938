"""The state of a store, as its page draws it: pure functions, no Streamlit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from dashboard.viewdata.replies import Column, Json, table_data
from oki_trace.records import ReplySize, Status, StoreInfo, WorkerState
from oki_trace.reporting import counted
from oki_trace.reporting import size as size
from oki_trace.sanitize import inert
from oki_trace.store.maintenance.prune import PrunePlan

# More points than this are not told apart on a page's width.
POINTS = 240
# A plan is shown in part; its totals are of all.
LISTED = 200

ROWS, TENSORS, LOG, FREE = "rows", "full tensors", "log", "free"
MEANINGS = {
    TENSORS: "Logits, hidden states and attention of every step that keeps them",
    ROWS: "Messages, tokens, candidates, attention and lens, with their indexes",
    LOG: "The write-ahead log: repeats some of the data until it is folded in",
    FREE: "Left by what was deleted: used again, or given back by a vacuum",
}
# The same colours as in the picture of the growth.
TONES = {TENSORS: "accent", ROWS: "blue", LOG: "gray", FREE: "gray"}


def tiles(info: StoreInfo) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the numbers that stand on top."""
    a_token = size(info.bytes_per_token) if info.steps else "–"
    detail = (
        f"On average: rows {size(info.row_bytes_per_token)}"
        + (
            f", and full tensors {size(info.tensor_bytes_per_token)} where they were kept."
            if info.tensor_steps
            else "; no token has its full tensors."
        )
        if info.steps
        else "There is no token yet."
    )
    return [
        ("On disk", size(info.bytes), "All the store's files, the log and free room too"),
        ("Per token", a_token, detail),
        ("Conversations", f"{info.conversations:,}", f"With {counted(info.messages, 'message')}"),
        ("Tokens", f"{info.steps:,}", "Generated and traced: one step each"),
    ]


def totals(info: StoreInfo) -> list[list[Any]]:
    """The numbers that stand on top, and what is told of them, as a sheet."""
    names = [
        *("bytes", "bytes_per_token", "row_bytes_per_token", "tensor_bytes_per_token"),
        *("conversations", "messages", "steps", "tensor_steps"),
    ]
    return [names, [getattr(info, name) for name in names]]


def room(info: StoreInfo) -> Json:
    """What takes the room on disk, a bar a kind; what takes none is left out."""
    parts = (
        (TENSORS, info.tensor_bytes),
        (ROWS, info.row_bytes),
        (LOG, info.log_bytes),
        (FREE, info.free_bytes),
    )
    total = sum(count for _, count in parts) or 1
    rows = [
        {
            "what": name,
            "bytes": count,
            "size": size(count),
            "share": count / total,
            "tone": TONES[name],
            "meaning": MEANINGS[name],
        }
        for name, count in parts
        if count
    ]
    return {"label": "What takes the room", "name": "store-room", "rows": rows}


def growth(sizes: Sequence[ReplySize], row_bytes_per_token: float) -> list[Json]:
    """How the data that is there came together, by the time of its replies: running totals.

    One row a kind and moment, at most ``POINTS`` moments, the last being all of it.
    """
    every = max(1, -(-len(sizes) // POINTS))
    tokens = held = 0
    rows: list[Json] = []
    for number, one in enumerate(sizes, start=1):
        tokens += one.tokens
        held += one.tensor_bytes
        if number % every and number != len(sizes):
            continue
        parts = ((TENSORS, held), (ROWS, tokens * row_bytes_per_token))
        rows += [
            {
                "when": one.created_at,
                "what": name,
                "bytes": count,
                "size": size(count),
                "tokens": tokens,
                "replies": number,
            }
            for name, count in parts
        ]
    return rows


def health(info: StoreInfo, statuses: Mapping[Status, int], worker: WorkerState | None) -> Json:
    """How the store is, as a table of two columns."""
    ended = ", ".join(f"{number:,} {status}" for status, number in statuses.items())
    state = "not running" if worker is None or worker.state == "gone" else worker.state
    rows = (
        ("Schema", f"{info.schema}, the newest this version knows"),
        ("Replies", ended or "none yet"),
        ("Model's process", state),
        ("Free room", f"{size(info.free_bytes)} in the file, {size(info.log_bytes)} in its log"),
    )
    return table_data("How the store is", (Column(""), Column("")), rows, name="store-health")


def plan_rows(plan: PrunePlan) -> list[Json]:
    """What would go, the oldest first; at most ``LISTED`` rows of it."""
    return [
        {
            "conversation": item.conversation_id,
            "title": inert(item.title, keep=""),
            "from": item.when,
            "frees": item.bytes,
        }
        for item in plan.items[:LISTED]
    ]


def plan_told(plan: PrunePlan) -> str:
    """A plan in a sentence or two."""
    noun = "reply" if plan.tensors_only else "conversation"
    stay = "stays" if plan.spared == 1 else "stay"
    spared = f" {counted(plan.spared, noun)} being written {stay}." if plan.spared else ""
    if not plan.items:
        return f"Nothing would go.{spared}"
    what = counted(len(plan.items), noun)
    if plan.tensors_only:
        what = f"The full tensors of {what}"
    return (
        f"{what} would go and free {size(plan.frees_bytes)}; "
        f"{size(plan.left_bytes)} of data would stay.{spared}"
    )


def left(seconds: float, done: int, of_all: int) -> str:
    """How long it goes on at the pace so far: ``about 2 min left``; empty while nobody can tell."""
    if not 0 < done < of_all or seconds < 2:
        return ""
    rest = dt.timedelta(seconds=seconds / done * (of_all - done))
    minutes, secs = divmod(round(rest.total_seconds()), 60)
    return f"about {minutes} min left" if minutes else f"about {secs} s left"
