"""Conversations: search, rename, delete, export and import."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import PurePath

import pandas as pd
import streamlit as st

from dashboard import boundary, data
from dashboard.viewdata import wording
from dashboard.views import layout
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_files
from oki_trace.input_text import require_storable
from oki_trace.records import Conversation, ConversationFilter, Status
from oki_trace.sanitize import inert

PAGE_SIZE = 50
ANY = "any"
STATUSES = (ANY, *(status.value for status in Status))

# The suffixes of the files of an export.
UPLOADS = ("json", "jsonl", "zip", "safetensors")


@boundary.page
def page() -> None:
    """Draw the page."""
    with layout.row("conversations-title", place="distribute"):
        st.title("Conversations", width="content")
        with st.popover("Import", icon=":material/upload:"):
            _import()
    _imported()
    search, by = _wanted()
    total = data.store().conversation_count(search, by=by)
    if not total:
        if search or by != ConversationFilter():
            st.caption("No conversation matches. Clear the search or the filters.")
        else:
            layout.empty_state("conversations", "find it")
        return
    pages = -(-total // PAGE_SIZE)
    with layout.row("conversations-head", align="bottom"):
        st.caption(
            f"{wording.counted(total, 'conversation')}, sorted by last change", width="stretch"
        )
        layout.export_button(
            "CSV",
            partial(_csv, search, by, total),
            "conversations.csv",
            "conversations-csv",
            mime="text/csv",
            help="All matching conversations, not only those on this page",
        )
        number = _page_number(pages)
    conversations = data.store().conversations(
        search, by=by, limit=PAGE_SIZE, offset=(number - 1) * PAGE_SIZE
    )
    # The actions are above the table, which has to be drawn first to know the selected rows.
    place = st.container()
    named = _named(conversations)
    chosen = _table(conversations) or named
    with place:
        actions(chosen)


def _wanted() -> tuple[str, ConversationFilter]:
    with layout.row("conversations-filter", align="bottom"):
        search = st.text_input(
            "Search", key="search", placeholder="text in titles and messages", width=280
        )
        model = st.selectbox(
            "Model", [ANY, *data.models_used()], key="of_model", accept_new_options=True, width=200
        )
        status = st.selectbox("Status", STATUSES, key="of_status", width=130)
        since = st.date_input("Changed since", None, key="since", width=150)
        until = st.date_input("Changed until", None, key="until", width=150)
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
    """The chosen page; a search may have left fewer pages than before."""
    if pages == 1:
        return 1
    if (st.session_state.get("page") or 1) > pages:
        st.session_state["page"] = pages
    return int(st.number_input(f"Page of {pages:,}", 1, pages, key="page", width=130))


def _csv(search: str, by: ConversationFilter, total: int) -> str:
    """All matching conversations, without text that a spreadsheet would read as a formula."""
    from oki_trace.analysis.results import for_a_spreadsheet

    frame = _frame(data.store().conversations(search, by=by, limit=total))
    for name in ("title", "model"):
        frame[name] = frame[name].map(for_a_spreadsheet)
    return str(frame.to_csv(index=False))


def _frame(conversations: Sequence[Conversation]) -> pd.DataFrame:
    """The rows of the table."""
    totals = data.store().conversation_totals([c.id for c in conversations])
    return pd.DataFrame(
        {
            "id": [c.id for c in conversations],
            "title": [c.title for c in conversations],
            "changed": [c.updated_at for c in conversations],
            "model": [", ".join(c.model_ids) for c in conversations],
            "messages": [c.messages for c in conversations],
            "tokens": [c.tokens or data.store().scored_tokens(c) for c in conversations],
            "tokens/s": [totals[c.id].tokens_per_second for c in conversations],
            "tensors": [totals[c.id].tensor_bytes or None for c in conversations],
            "status": ["damaged" if c.damage else str(c.status) for c in conversations],
        }
    )


def _named(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The one chosen by name: for the keyboard, since arrow keys in the table open a row."""
    names = [
        f"{c.id} · {wording.shorten(inert(c.title, keep='').strip(), 60)}" for c in conversations
    ]
    key = f"named-{hash(tuple(c.id for c in conversations))}"
    hint = "Choose a conversation by name"
    at = layout.pick("Choose a conversation", names, key, hint, 420)
    return [] if at is None else [conversations[at]]


def _table(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Draw the table; returns the selected conversations. A click on the text of a row opens it."""
    frame = _frame(conversations)
    number = st.column_config.NumberColumn
    table = st.dataframe(
        frame,
        hide_index=True,
        on_select="rerun",
        selection_mode=["multi-row", "single-cell"],
        # Selections are by row number: they must not carry over to other rows.
        key=f"conversations-{hash(tuple(c.id for c in conversations))}",
        height="content" if len(conversations) < 12 else 560,
        placeholder="–",
        column_config={
            "id": number(width=50),
            "title": st.column_config.TextColumn(width=260),
            "changed": st.column_config.DatetimeColumn(format="distance", width=110),
            "messages": number(width="small"),
            "tokens": number(
                format="localized",
                width="small",
                help="Generated tokens; of a scored text, its scored tokens",
            ),
            "tokens/s": number(
                format="%.1f", width="small", help="Of the replies whose duration is known"
            ),
            "tensors": number(
                format="bytes", width="small", help="Size of the full tensors in the store"
            ),
        },
    )
    cells = table.selection.cells
    if cells:
        layout.open_page("chat", {"conversation": conversations[cells[0][0]].id})
    return [conversations[row] for row in table.selection.rows]


def actions(chosen: Sequence[Conversation]) -> None:
    """The actions for the selected conversations."""
    if not chosen:
        st.caption(
            "Click a row to open it. Select its checkbox to rename, export or "
            "delete it; select two to compare them."
        )
        return
    one = chosen[0]
    with layout.row("conversations-actions"):
        if len(chosen) == 1:
            if st.button("Open", icon=":material/open_in_new:", key="open"):
                layout.open_page("chat", {"conversation": one.id})
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
        help="One of the conversations has no reply."
        if None in replies
        else "Compares their last replies side by side.",
    ):
        layout.open_page("compare", {"left": replies[0], "right": replies[1]})


def _export(one: Conversation) -> None:
    with st.popover("Export", icon=":material/download:"):
        formats = list(Format)
        format = st.selectbox(
            "Format", formats, format_func=attrgetter("label"), key="format", width=300
        )
        st.download_button(
            "Export",
            partial(data.export_file, one.id, format),
            f"conversation-{one.id}.{format.suffix}",
            key="export",
            on_click="ignore",
            type="primary",
            help="The conversation and all its traces. Every format except HTML can be imported.",
        )


def _import() -> None:
    """An upload of an export, which is checked and imported atomically."""
    files = st.file_uploader(
        "A JSON or JSON lines export, a zip of Parquet tables, or a trace of version 1. If the "
        "export has a safetensors file, add it too.",
        UPLOADS,
        accept_multiple_files=True,
        key=f"upload-{st.session_state.get('uploads', 0)}",
        width=420,
    )
    by_suffix = {PurePath(file.name).suffix.lower(): file for file in files}
    fits = len(files) == 1 or (len(files) == 2 == len(by_suffix) and ".safetensors" in by_suffix)
    if files and not fits:
        st.caption(
            "Choose one export at a time: its file and, if it has one, its safetensors file."
        )
    if not st.button("Import", key="import", type="primary", disabled=not files or not fits):
        return
    bar = st.progress(0.0, "Checking the file…")

    def progress(done: int, of_all: int) -> None:
        if done % 50 == 0 or done == of_all:
            words = f"{done:,} of {of_all:,} steps saved" if of_all else f"{done:,} steps checked"
            bar.progress(done / of_all if of_all else 0.0, words)

    with layout.errors_shown():
        st.session_state["imported"] = import_files(by_suffix, data.store_name(), progress)
        # A new key is the only way to clear an uploader.
        st.session_state["uploads"] = st.session_state.get("uploads", 0) + 1
        st.rerun()


def _imported() -> None:
    """The result of an import, shown once."""
    done = st.session_state.pop("imported", None)
    if done is None:
        return
    numbers = ", ".join(f"{number:d}" for number in done.conversations)
    noun = "conversation" if len(done.conversations) == 1 else "conversations"
    st.success(
        f"Imported as {noun} {numbers}: {wording.counted(done.messages, 'message')}, "
        f"{wording.counted(done.steps, 'step')}.",
        icon=":material/check:",
    )


def _rename(one: Conversation) -> None:
    with st.popover("Rename", icon=":material/edit:"):
        title = st.text_input("New title", one.title, key=f"title-{one.id}", width=360)
        if st.button("Rename", key="rename", type="primary", disabled=not title.strip()):
            with layout.errors_shown():
                name = require_storable(title.strip(), "The title")
                data.writer().rename_conversation(one.id, name)
                st.rerun()


def _delete(chosen: Sequence[Conversation]) -> None:
    with st.popover("Delete", icon=":material/delete:"):
        tokens = sum(c.tokens for c in chosen)
        what = "this conversation" if len(chosen) == 1 else f"{len(chosen)} conversations"
        st.write(f"Delete {what} with {tokens:,} traced tokens? This cannot be undone.")
        st.caption(
            wording.escape(
                "\n".join(f"{c.id}  {wording.shorten(c.title.strip(), 60)}" for c in chosen[:5])
            )
        )
        if st.button("Delete permanently", key="delete", type="primary"):
            with layout.errors_shown():
                for c in chosen:
                    data.writer().delete_conversation(c.id)
                st.rerun()
