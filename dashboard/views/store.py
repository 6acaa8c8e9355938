"""Store: disk usage, growth and health of the store; verify, prune and vacuum.

Long operations run in the page and show their progress; a click on anything else
ends them. That is safe: a check changes nothing, pruning goes reply by reply, and a
vacuum is atomic.
"""

from __future__ import annotations

import datetime as dt
import time

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboard import boundary, charts, components, data
from dashboard.viewdata import storage, wording
from dashboard.views import layout
from oki_trace.errors import OkiTraceError
from oki_trace.records import StoreInfo
from oki_trace.store.maintenance import prune, vacuum
from oki_trace.store.maintenance.verify import Verification

FINDINGS = 200

KINDS = {"full tensors only": True, "whole conversations": False}


@boundary.page
def page() -> None:
    """Draw the page."""
    st.title("Store")
    info = data.info()
    with layout.row("store-head"):
        st.text(info.url, width="stretch")
        components.rows(
            data={"name": "store", "rows": storage.total_rows(info)}, key="save-store", width=60
        )
    with st.container(horizontal=True, key="store-tiles"):
        for name, value, meaning in storage.tiles(info):
            st.metric(name, value, border=True, help=wording.escape(meaning), width=210)
    _disk_usage(info)
    _health(info)
    _reclaim(info)


def _disk_usage(info: StoreInfo) -> None:
    st.markdown("#### Disk usage")
    components.amounts(data=storage.disk_usage(info), key="disk-usage")
    grown = storage.growth_rows(data.store().reply_sizes(), info.row_bytes_per_token)
    st.markdown("#### Growth")
    if not grown:
        layout.empty_state("replies", "see how the store grows")
        return
    layout.chart(charts.growth_chart(grown), grown, "growth", "store-growth")
    st.caption(
        "The data in the store now, by the time of its replies. The size of a reply's rows is "
        "estimated from its tokens."
    )


def _health(info: StoreInfo) -> None:
    st.markdown("#### Health")
    statuses = data.store().reply_statuses()
    components.table(data=storage.health_table(info, statuses, data.worker_state()), key="health")
    wanted = st.button(
        "Verify",
        icon=":material/fact_check:",
        key="verify",
        disabled=not info.messages,
        help="Checks the file, the checksum of every tensor, and the invariants of every step. "
        "Reads the whole store and changes nothing.",
    )
    # Its own place keeps the rest of the page in position.
    place = st.empty()
    if wanted:
        _verify(place)
    _last("verified", place)


def _verify(place: DeltaGenerator) -> None:
    began = time.monotonic()
    bar = place.progress(0.0, "Checking the file…")

    def progress(done: int, of_all: int) -> None:
        rest = storage.time_left(time.monotonic() - began, done, of_all)
        share = done / of_all if of_all else 1.0
        bar.progress(
            min(share, 1.0),
            f"{done:,} of {of_all:,} steps{', ' if rest else ''}{wording.escape(rest)}. "
            "Any other click stops the check.",
        )

    check = Verification(data.store(), progress=progress)
    findings: list[str] = []
    count = 0
    try:
        for finding in check:
            count += 1
            if len(findings) < FINDINGS:
                findings.append(str(finding))
    except OkiTraceError as error:
        findings.append(str(error))
        count += 1
    checked = ", ".join(
        wording.counted(number, noun)
        for number, noun in (
            (check.messages, "message"),
            (check.steps, "step"),
            (check.tensors, "tensor"),
        )
    )
    verdict = f"{wording.counted(count, 'problem')} found." if count else "No problems found."
    when = time.strftime("%H:%M")
    st.session_state["verified"] = (f"Checked {checked} at {when}. {verdict}", not count, findings)


def _last(name: str, place: DeltaGenerator) -> None:
    """The last result of an operation in this window."""
    result = st.session_state.get(name)
    if result is None:
        return
    sentence, good, lines = result
    with place.container():
        box, icon = (st.success, ":material/check:") if good else (st.error, ":material/error:")
        box(wording.escape(sentence), icon=icon)
        if lines:
            st.dataframe({"problem": lines}, hide_index=True, key=f"{name}-lines")


def _reclaim(info: StoreInfo) -> None:
    st.markdown("#### Reclaim space")
    _last("reclaimed", st.empty())
    with layout.row("prune-form", align="bottom"):
        days = st.number_input(
            "Older than (days)",
            0.0,
            None,
            None,
            1.0,
            key="prune-days",
            placeholder="any",
            width=170,
        )
        most = st.number_input(
            "Shrink the data to (GB)",
            0.0,
            None,
            None,
            0.1,
            key="prune-size",
            placeholder="any",
            width=210,
        )
        kind = st.selectbox("Prune", list(KINDS), key="prune-kind", width=200)
    if days is None and most is None:
        st.caption(
            "Enter an age or a size to preview what pruning removes. Without its full tensors a "
            "reply keeps its tokens, candidates, attention and lens."
        )
    else:
        _prune(days, most, tensors_only=KINDS[kind])
    _vacuum(info)


def _prune(days: float | None, gigabytes: float | None, *, tensors_only: bool) -> None:
    plan = prune.plan(
        data.store(),
        older_than=None if days is None else dt.timedelta(days=days),
        max_bytes=None if gigabytes is None else round(gigabytes * 1e9),
        tensors_only=tensors_only,
    )
    st.write(wording.escape(storage.plan_sentence(plan)))
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
        st.write("Prune the data listed above? This cannot be undone.")
        sure = st.button("Prune permanently", key="prune", type="primary")
    if sure:
        bar = st.progress(0.0, "Pruning…")

        def progress(done: int, of_all: int) -> None:
            bar.progress(done / of_all if of_all else 1.0, f"{done:,} of {of_all:,} pruned")

        with layout.errors_shown():
            pruned = prune.prune(data.writer(), plan, progress)
            _tell(
                f"Freed {storage.size(pruned.frees_bytes)} for new data. Vacuum the store to "
                "reclaim the disk space."
            )


def _vacuum(info: StoreInfo) -> None:
    free = f" {storage.size(info.free_bytes)} is free now." if info.free_bytes else ""
    with st.popover("Vacuum", icon=":material/compress:"):
        st.write(
            f"Rebuilds the store to reclaim its free space on the disk.{free} It "
            "needs as much free disk space as the data takes, and blocks writes."
        )
        sure = st.button("Vacuum now", key="vacuum", type="primary")
    if not sure:
        return
    began = time.monotonic()
    place = st.empty()

    def tick() -> None:
        place.caption(f"Rebuilding the store… {time.monotonic() - began:.0f} s")

    tick()
    with layout.errors_shown():
        vacuumed = vacuum.vacuum(data.store_name(), tick)
        reclaimed = storage.size(max(0, vacuumed.before - vacuumed.after))
        before, after = storage.size(vacuumed.before), storage.size(vacuumed.after)
        _tell(f"Reclaimed {reclaimed}: {before} before, {after} now.")


def _tell(sentence: str) -> None:
    """Show ``sentence`` after a rerun, which has the new numbers."""
    st.session_state["reclaimed"] = (sentence, True, [])
    st.rerun()
