"""The data of the Store page, its size and its state: pure functions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from dashboard.viewdata.wording import Column, Json, table_data
from oki_trace.records import ReplySize, Status, StoreInfo, WorkerState
from oki_trace.reporting import counted
from oki_trace.reporting import size as size
from oki_trace.sanitize import inert
from oki_trace.store.maintenance.prune import PrunePlan

# More points than this cannot be distinguished on the width of a page.
POINTS = 240
# Rows of a plan on the page; its totals are of all.
LISTED = 200

ROWS, TENSORS, LOG, FREE = "rows", "full tensors", "log", "free"
MEANINGS = {
    TENSORS: "Logits, hidden states and attention of every step that keeps them",
    ROWS: "Messages, tokens, candidates, attention and lens, with their indexes",
    LOG: "The write-ahead log: repeats some of the data until the next checkpoint",
    FREE: "Left by deletions: reused by new data, or reclaimed by a vacuum",
}
# The colours of the growth chart.
TONES = {TENSORS: "accent", ROWS: "blue", LOG: "gray", FREE: "gray"}


def tiles(info: StoreInfo) -> list[tuple[str, str, str]]:
    """(name, value, tooltip) of the numbers at the top of the page."""
    a_token = size(info.bytes_per_token) if info.steps else "–"
    detail = (
        f"On average: rows {size(info.row_bytes_per_token)}"
        + (
            f", and full tensors {size(info.tensor_bytes_per_token)} where they were kept."
            if info.tensor_steps
            else "; no token has full tensors."
        )
        if info.steps
        else "No tokens yet."
    )
    return [
        ("On disk", size(info.bytes), "All files of the store, including its log and free space"),
        ("Per token", a_token, detail),
        ("Conversations", f"{info.conversations:,}", f"With {counted(info.messages, 'message')}"),
        ("Tokens", f"{info.steps:,}", "Traced tokens, generated or given; each is one step"),
    ]


def total_rows(info: StoreInfo) -> list[list[Any]]:
    """The numbers at the top of the page, unrounded, as rows of a CSV file."""
    names = [
        *("bytes", "bytes_per_token", "row_bytes_per_token", "tensor_bytes_per_token"),
        *("conversations", "messages", "steps", "tensor_steps"),
    ]
    return [names, [getattr(info, name) for name in names]]


def disk_usage(info: StoreInfo) -> Json:
    """Disk usage by kind, for ``components/amounts.js``; empty kinds are left out."""
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
    return {"label": "Disk usage", "name": "store-disk-usage", "rows": rows}


def growth_rows(sizes: Sequence[ReplySize], row_bytes_per_token: float) -> list[Json]:
    """Running totals of the data, by the time of its replies.

    A row for each kind and moment; at most ``POINTS`` moments, the last one with all data.
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


def health_table(
    info: StoreInfo, statuses: Mapping[Status, int], worker: WorkerState | None
) -> Json:
    """The state of the store, as a table of two columns."""
    ended = ", ".join(f"{number:,} {status}" for status, number in statuses.items())
    state = "not running" if worker is None or worker.state == "gone" else worker.state
    rows = (
        ("Schema", f"{info.schema}, the newest of this version"),
        ("Replies", ended or "none yet"),
        ("Model process", state),
        ("Free space", f"{size(info.free_bytes)} in the file, {size(info.log_bytes)} in its log"),
    )
    return table_data("State of the store", (Column(""), Column("")), rows, name="store-health")


def plan_rows(plan: PrunePlan) -> list[Json]:
    """The replies or conversations to prune, the oldest first; at most ``LISTED`` rows."""
    return [
        {
            "conversation": item.conversation_id,
            "title": inert(item.title, keep=""),
            "from": item.when,
            "frees": item.bytes,
        }
        for item in plan.items[:LISTED]
    ]


def plan_sentence(plan: PrunePlan) -> str:
    """A prune plan in a sentence or two."""
    noun = "reply" if plan.tensors_only else "conversation"
    stay = "stays" if plan.spared == 1 else "stay"
    spared = f" {counted(plan.spared, noun)} being written {stay}." if plan.spared else ""
    if not plan.items:
        return f"Nothing to prune.{spared}"
    what = counted(len(plan.items), noun)
    if plan.tensors_only:
        what = f"the full tensors of {what}"
    return (
        f"Pruning removes {what} and frees {size(plan.frees_bytes)}; "
        f"{size(plan.left_bytes)} of data remain.{spared}"
    )


def time_left(seconds: float, done: int, of_all: int) -> str:
    """The time left at the pace so far: ``about 2 min left``; empty while it is not known."""
    if not 0 < done < of_all or seconds < 2:
        return ""
    rest = dt.timedelta(seconds=seconds / done * (of_all - done))
    minutes, secs = divmod(round(rest.total_seconds()), 60)
    return f"about {minutes} min left" if minutes else f"about {secs} s left"
