"""Conversations: browse, search, rename, delete, export and import."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from functools import partial
from pathlib import PurePath

import pandas as pd
import streamlit as st

from dashboard import boundary, data
from dashboard.viewdata import replies
from dashboard.views import empty_state
from oki_trace.errors import OkiTraceError
from oki_trace.exchange.formats import Format
from oki_trace.records import Conversation, ConversationFilter, Status
from oki_trace.sanitize import inert

PAGE_SIZE = 50
ANY = "any"
STATUSES = (ANY, *(status.value for status in Status))

# How an export is named, and what its file is called.
FORMATS = {
    "JSON": (Format.JSON, "json"),
    "JSON lines": (Format.JSONL, "jsonl"),
    "Parquet tables, with full tensors": (Format.PARQUET, "zip"),
    "HTML report, to read": (Format.HTML, "html"),
    "trace of version 1": (Format.TRACE_V1, "v1.json"),
}
UPLOADS = ("json", "jsonl", "zip", "safetensors")


@boundary.page
def page() -> None:
    """Draw the page."""
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key="conversations-title",
    ):
        st.title("Conversations", width="content")
        with st.popover("Import", icon=":material/upload:"):
            _import()
    _imported()
    search, by = _wanted()
    total = data.count(search, by)
    if not total:
        narrowed = search or by != ConversationFilter()
        if narrowed:
            st.caption("Nothing found.")
        else:
            empty_state.first_trace("No conversations yet: begin one in Chat.")
        return
    pages = -(-total // PAGE_SIZE)
    with st.container(horizontal=True, vertical_alignment="bottom", key="conversations-head"):
        some = "1 conversation" if total == 1 else f"{total:,} conversations"
        st.caption(f"{some}, the one changed last first", width="stretch")
        st.download_button(
            "CSV",
            partial(_csv, search, by, total),
            "conversations.csv",
            "text/csv",
            key="conversations-csv",
            icon=":material/download:",
            on_click="ignore",
            help="All that are found, on every page",
        )
        number = _page_number(pages)
    found = data.find(search, by, PAGE_SIZE, (number - 1) * PAGE_SIZE)
    # Above the table, where they do not move; what is ticked is known after it is drawn.
    place = st.container()
    named = _named(found)
    chosen = _table(found) or named
    with place:
        actions(chosen)


def _wanted() -> tuple[str, ConversationFilter]:
    with st.container(horizontal=True, vertical_alignment="bottom", key="conversations-filter"):
        search = st.text_input(
            "Search", key="search", placeholder="text in titles and messages", width=280
        )
        model = st.selectbox(
            "Model", [ANY, *data.models_used()], key="of_model", accept_new_options=True, width=200
        )
        status = st.selectbox("Status", STATUSES, key="of_status", width=130)
        since = st.date_input("Changed from", None, key="since", width=150)
        until = st.date_input("to", None, key="until", width=150)
    return (search or "").strip(), ConversationFilter(
        model_id=None if model in (None, ANY) else model,
        status=None if status == ANY else Status(status),
        since=None if since is None else _midnight(since),
        until=None if until is None else _midnight(until + dt.timedelta(days=1)),
    )


def _midnight(day: dt.date) -> dt.datetime:
    """The beginning of a day on this machine."""
    return dt.datetime.combine(day, dt.time()).astimezone()


def _page_number(pages: int) -> int:
    """The page chosen, of so many; a search may have left fewer than before."""
    if pages == 1:
        return 1
    if (st.session_state.get("page") or 1) > pages:
        st.session_state["page"] = pages
    return int(st.number_input(f"Page of {pages:,}", 1, pages, key="page", width=130))


def _csv(search: str, by: ConversationFilter, total: int) -> str:
    """All that are found, in words that a spreadsheet takes for no formula."""
    from oki_trace.analysis.results import for_a_spreadsheet

    frame = _frame(data.find(search, by, total, 0))
    for name in ("title", "model"):
        frame[name] = frame[name].map(for_a_spreadsheet)
    return str(frame.to_csv(index=False))


def _frame(found: Sequence[Conversation]) -> pd.DataFrame:
    """The rows of the table."""
    totals = data.totals(found)
    return pd.DataFrame(
        {
            "id": [c.id for c in found],
            "title": [c.title for c in found],
            "changed": [c.updated_at for c in found],
            "model": [", ".join(c.model_ids) for c in found],
            "messages": [c.messages for c in found],
            "tokens": [c.tokens for c in found],
            "tokens/s": [totals[c.id].tokens_per_second for c in found],
            "tensors": [totals[c.id].tensor_bytes or None for c in found],
            "status": ["damaged" if c.damage else str(c.status) for c in found],
        }
    )


def _named(found: Sequence[Conversation]) -> list[Conversation]:
    """The one chosen by its name: in the table, an arrow key would open what it comes to."""
    at = st.selectbox(
        "Choose a conversation",
        range(len(found)),
        index=None,
        format_func=lambda n: (
            f"{found[n].id} · {replies.clipped(inert(found[n].title, keep='').strip(), 60)}"
        ),
        key=f"named-{hash(tuple(c.id for c in found))}",
        placeholder="Or choose one by its name",
        label_visibility="collapsed",
        width=420,
    )
    return [] if at is None else [found[at]]


def _table(found: Sequence[Conversation]) -> list[Conversation]:
    """Draw the rows; returns those that are ticked. A click on a row's text opens it."""
    frame = _frame(found)
    number = st.column_config.NumberColumn
    seen = st.dataframe(
        frame,
        hide_index=True,
        on_select="rerun",
        selection_mode=["multi-row", "single-cell"],
        # Ticks are by place: on other rows they must not stay.
        key=f"conversations-{hash(tuple(c.id for c in found))}",
        height="content" if len(found) < 12 else 560,
        placeholder="–",
        column_config={
            "id": number(width=50),
            "title": st.column_config.TextColumn(width=260),
            "changed": st.column_config.DatetimeColumn(format="distance", width=110),
            "messages": number(width="small"),
            "tokens": number(format="localized", width="small"),
            "tokens/s": number(
                format="%.1f", width="small", help="Over the replies whose time is known"
            ),
            "tensors": number(
                format="bytes", width="small", help="What the full tensors take in the store"
            ),
        },
    )
    cells = seen.selection.cells
    if cells:
        _open("chat", conversation=found[cells[0][0]].id)
    return [found[row] for row in seen.selection.rows]


def actions(chosen: Sequence[Conversation]) -> None:
    """What can be done with the conversations that are ticked."""
    if not chosen:
        st.caption(
            "Click a row to open it; tick its box to rename, export or delete it; "
            "tick two to compare them."
        )
        return
    one = chosen[0]
    with st.container(horizontal=True, vertical_alignment="center", key="conversations-actions"):
        if len(chosen) == 1:
            if st.button("Open", icon=":material/open_in_new:", key="open"):
                _open("chat", conversation=one.id)
            _rename(one)
            _export(one)
        if len(chosen) == 2:
            _compare(chosen)
        _delete(chosen)


def _compare(chosen: Sequence[Conversation]) -> None:
    replies = [data.last_reply(c.id) for c in chosen]
    if st.button(
        "Compare",
        icon=":material/compare_arrows:",
        key="compare",
        disabled=None in replies,
        help="One of them has no reply." if None in replies else "Their last replies, side by side",
    ):
        _open("compare", left=replies[0] or 0, right=replies[1] or 0)


def _export(one: Conversation) -> None:
    with st.popover("Export", icon=":material/download:"):
        name = st.selectbox("Format", list(FORMATS), key="format", width=300)
        format, suffix = FORMATS[name]
        st.download_button(
            "Download",
            partial(data.exported, one.id, format),
            f"conversation-{one.id}.{suffix}",
            key="export",
            on_click="ignore",
            type="primary",
            help="The conversation and all its traces. All formats but HTML can be imported again.",
        )


def _import() -> None:
    """What was exported, uploaded: it is checked as a whole, and imported atomically."""
    files = st.file_uploader(
        "An export: json, jsonl, a zip of Parquet tables, or a trace of version 1. The "
        "safetensors beside it are given with it.",
        UPLOADS,
        accept_multiple_files=True,
        key=f"upload-{st.session_state.get('uploads', 0)}",
        width=420,
    )
    by_suffix = {PurePath(file.name).suffix.lower(): file for file in files}
    fits = len(files) == 1 or (len(files) == 2 == len(by_suffix) and ".safetensors" in by_suffix)
    if files and not fits:
        st.caption("One export at a time: a file, and perhaps its safetensors.")
    if not st.button("Import", key="import", type="primary", disabled=not files or not fits):
        return
    bar = st.progress(0.0, "Checking the file…")

    def progress(done: int, of_all: int) -> None:
        if done % 50 == 0 or done == of_all:
            words = f"{done:,} of {of_all:,} steps kept" if of_all else f"{done:,} steps checked"
            bar.progress(done / of_all if of_all else 0.0, words)

    try:
        done = data.bring_in(by_suffix, progress)
    except OkiTraceError as error:
        st.error(replies.sentence(str(error)))
        return
    # Another key: an uploader that has been used is emptied by no other way.
    st.session_state["uploads"] = st.session_state.get("uploads", 0) + 1
    st.session_state["imported"] = done
    st.rerun()


def _imported() -> None:
    """Says once what an import brought."""
    done = st.session_state.pop("imported", None)
    if done is None:
        return
    numbers = ", ".join(f"{number:d}" for number in done.conversations)
    noun = "conversation" if len(done.conversations) == 1 else "conversations"
    st.success(
        f"Imported as {noun} {numbers}: {replies.counted(done.messages, 'message')}, "
        f"{replies.counted(done.steps, 'step')}.",
        icon=":material/check:",
    )


def _rename(one: Conversation) -> None:
    with st.popover("Rename", icon=":material/edit:"):
        title = st.text_input("New title", one.title, key=f"title-{one.id}", width=360)
        if st.button("Rename", key="rename", type="primary", disabled=not title.strip()):
            _do(partial(data.rename, one.id, title.strip()))


def _delete(chosen: Sequence[Conversation]) -> None:
    with st.popover("Delete", icon=":material/delete:"):
        tokens = sum(c.tokens for c in chosen)
        what = "this conversation" if len(chosen) == 1 else f"{len(chosen)} conversations"
        st.write(f"Delete {what} with {tokens:,} traced tokens? There is no way back.")
        st.caption(
            replies.plain(
                "\n".join(f"{c.id}  {replies.clipped(c.title.strip(), 60)}" for c in chosen[:5])
            )
        )
        if st.button("Delete for good", key="delete", type="primary"):
            _do(*[partial(data.delete, c.id) for c in chosen])


def _do(*all_of: partial[None]) -> None:
    """Do it and draw the list anew, or say what stood in the way."""
    try:
        for one in all_of:
            one()
    except OkiTraceError as error:
        st.error(replies.sentence(str(error)))
        return
    st.rerun()


def _open(name: str, **query: int) -> None:
    pages = st.session_state["pages"]
    st.switch_page(pages[name], query_params={key: str(value) for key, value in query.items()})
