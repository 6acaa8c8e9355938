"""Store: where the traces are, what takes the room, whether all is well, and making room.

What reads or changes much runs while it is watched: it shows how far it is, and
a click on anything else ends it. Nothing is half done then: a check changes
nothing, pruning goes reply by reply, a vacuum is atomic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboard import boundary, charts, components, data
from dashboard.viewdata import replies, storage
from dashboard.views import chart_panel, empty_state
from oki_trace.errors import OkiTraceError
from oki_trace.records import StoreInfo

FINDINGS = 200

KINDS = {"full tensors only": True, "whole conversations": False}

Result = TypeVar("Result")


@boundary.page
def page() -> None:
    """Draw the page."""
    st.title("Store")
    info = data.info()
    with st.container(horizontal=True, vertical_alignment="center", key="store-head"):
        st.text(info.url, width="stretch")
        components.rows(
            data={"name": "store", "rows": storage.totals(info)}, key="save-store", width=60
        )
    with st.container(horizontal=True, key="store-tiles"):
        for name, value, meaning in storage.tiles(info):
            st.metric(name, value, border=True, help=replies.plain(meaning), width=210)
    _room(info)
    _health(info)
    _make_room(info)


def _room(info: StoreInfo) -> None:
    st.markdown("#### What takes the room")
    components.amounts(data=storage.room(info), key="room")
    grown = storage.growth(data.reply_sizes(), info.row_bytes_per_token)
    st.markdown("#### Growth")
    if not grown:
        empty_state.first_trace("There is no reply yet: begin a conversation in Chat.")
        return
    chart_panel.chart(charts.growth(grown), grown, "growth", "store-growth")
    st.caption(
        "What is in the store now, by the time of its replies. A reply's rows are reckoned from "
        "its tokens, at the average of the store."
    )


# -------------------------------------------------------------------------- health


def _health(info: StoreInfo) -> None:
    st.markdown("#### Health")
    components.table(data=storage.health(info, data.statuses(), data.worker_state()), key="health")
    wanted = st.button(
        "Verify",
        icon=":material/fact_check:",
        key="verify",
        disabled=not info.messages,
        help="Checks the file, every tensor's checksum, and that all that is kept of a step "
        "agrees. Reads all of the store and changes nothing.",
    )
    # A place of its own, so that what stands below stays while it works.
    place = st.empty()
    if wanted:
        _verify(place)
    _last("verified", place)


def _verify(place: DeltaGenerator) -> None:
    began = time.monotonic()
    bar = place.progress(0.0, "Checking the file…")

    def progress(done: int, of_all: int) -> None:
        rest = storage.left(time.monotonic() - began, done, of_all)
        share = done / of_all if of_all else 1.0
        bar.progress(
            min(share, 1.0),
            f"{done:,} of {of_all:,} steps{', ' if rest else ''}{replies.plain(rest)}. "
            "A click on anything else ends the check.",
        )

    check = data.verification(progress)
    found: list[str] = []
    faults = 0
    try:
        for finding in check:
            faults += 1
            if len(found) < FINDINGS:
                found.append(str(finding))
    except OkiTraceError as error:
        found.append(str(error))
        faults += 1
    looked = ", ".join(
        replies.counted(number, noun)
        for number, noun in (
            (check.messages, "message"),
            (check.steps, "step"),
            (check.tensors, "tensor"),
        )
    )
    verdict = f"{replies.counted(faults, 'fault')} found." if faults else "No problems found."
    when = time.strftime("%H:%M")
    st.session_state["verified"] = (f"Checked {looked} at {when}. {verdict}", not faults, found)


def _last(name: str, place: DeltaGenerator) -> None:
    """What came of it the last time in this window."""
    told = st.session_state.get(name)
    if told is None:
        return
    sentence, good, lines = told
    with place.container():
        box, icon = (st.success, ":material/check:") if good else (st.error, ":material/error:")
        box(replies.plain(sentence), icon=icon)
        if lines:
            st.dataframe({"found": lines}, hide_index=True, key=f"{name}-lines")


# ----------------------------------------------------------------------- make room


def _make_room(info: StoreInfo) -> None:
    st.markdown("#### Make room")
    _last("made-room", st.empty())
    with st.container(horizontal=True, vertical_alignment="bottom", key="prune-form"):
        days = st.number_input(
            "Older than, days", 0.0, None, None, 1.0, key="prune-days", placeholder="any", width=170
        )
        most = st.number_input(
            "Until the data fits into, GB",
            0.0,
            None,
            None,
            0.1,
            key="prune-size",
            placeholder="any",
            width=210,
        )
        kind = st.selectbox("What goes", list(KINDS), key="prune-kind", width=200)
    if days is None and most is None:
        st.caption(
            "Give an age or a size to see what would go; nothing goes before you say so. Without "
            "the full tensors a reply keeps its tokens, candidates, attention and lens."
        )
    else:
        _prune(days, None if most is None else round(most * 1e9), tensors_only=KINDS[kind])
    _vacuum(info)


def _prune(days: float | None, most: int | None, *, tensors_only: bool) -> None:
    plan = data.prune_plan(days, most, tensors_only=tensors_only)
    st.write(replies.plain(storage.plan_told(plan)))
    if not plan.items:
        return
    st.dataframe(
        pd.DataFrame(storage.plan_rows(plan)),
        hide_index=True,
        key="plan",
        height="content" if len(plan.items) < 8 else 300,
        column_config={
            "conversation": st.column_config.NumberColumn(width="small"),
            "title": st.column_config.TextColumn(width="large"),
            "from": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
            "frees": st.column_config.NumberColumn(format="bytes"),
        },
    )
    if len(plan.items) > storage.LISTED:
        st.caption(f"And {len(plan.items) - storage.LISTED:,} more.")
    with st.popover(f"Prune {storage.size(plan.frees_bytes)}", icon=":material/delete_sweep:"):
        st.write("This is thrown away for good. There is no way back.")
        sure = st.button("Prune for good", key="prune", type="primary")
    if sure:
        bar = st.progress(0.0, "Pruning…")
        went = _done(
            lambda: data.carry_out(
                plan, lambda done, of_all: _show(bar, done, of_all, "thrown away")
            )
        )
        if went is not None:
            _tell(
                f"Freed {storage.size(went.frees_bytes)}. The store uses it for what comes "
                "next; a vacuum gives it back to the disk."
            )


def _show(bar: DeltaGenerator, done: int, of_all: int, what: str) -> None:
    bar.progress(done / of_all if of_all else 1.0, f"{done:,} of {of_all:,} {replies.plain(what)}")


def _vacuum(info: StoreInfo) -> None:
    free = f" {storage.size(info.free_bytes)} are free now." if info.free_bytes else ""
    with st.popover("Vacuum", icon=":material/compress:"):
        st.write(
            "Builds the store anew without gaps, which gives the free room back to the disk."
            f"{free} It needs as much free disk as the data takes, and nobody can write meanwhile."
        )
        sure = st.button("Vacuum now", key="vacuum", type="primary")
    if not sure:
        return
    began = time.monotonic()
    place = st.empty()

    def tick() -> None:
        place.caption(f"Building the store anew… {time.monotonic() - began:.0f} s")

    tick()
    done = _done(lambda: data.build_anew(tick))
    if done is not None:
        given = storage.size(max(0, done.before - done.after))
        _tell(
            f"{storage.size(done.before)} before, {storage.size(done.after)} now: "
            f"{given} given back."
        )


def _done(work: Callable[[], Result]) -> Result | None:
    """What comes of ``work``; None, with the reason on the page, when it cannot be done."""
    try:
        return work()
    except OkiTraceError as error:
        st.error(replies.sentence(str(error)))
        return None


def _tell(sentence: str) -> None:
    """Say it above, on the page drawn anew with the new numbers."""
    st.session_state["made-room"] = (sentence, True, [])
    st.rerun()
