"""Names that were replaced by standard terms do not come back."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Identifiers, with or without a leading underscore.
RETIRED = {
    "agreement": "invariants",
    "AskingTap": "OutputAttentionsTap",
    "BesideTap": "KernelTap",
    "beginning": "empty_state",
    "by_then": "cumulative_share",
    "catching_up": "cache_progress",
    "formation": "settling",
    "fourbit": "quantization",
    "gate": "sql_guard",
    "gaze": "attention",
    "incoming": "schema",
    "kl_back": "kl_reverse",
    "make_way": "release_copies",
    "pictured": "chart_panel",
    "readback": "row_mapping",
    "RoomyLayer": "PreallocatedLayer",
    "Shelf": "BufferPool",
    "shortlist": "draft_lens",
    "standing": "token_rank",
    "told_plainly": "translate_errors",
    "trove": "QuerySession",
    "Trove": "QuerySession",
    "Unlensed": "PendingLens",
    "verifying": "recompute",
}
RETIRED_MODULES = {
    *("asking", "answering", "verifying", "visible", "asked", "seen", "stored"),
    *("ahead", "behind", "room", "packed", "shortlist", "bars", "fourbit"),
    *("presence", "halves", "faults", "agreement", "readback", "columns"),
    *("trove", "gaze", "doubt", "again", "formation", "gather", "gate", "shares", "apart"),
    *("catch_up", "look", "address", "beginning", "catching_up", "pictured"),
}
FOLDERS = ("oki_trace", "dashboard", "migrations", "scripts", "tests")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_no_retired_name_comes_back() -> None:
    back: dict[str, dict[str, str]] = {}
    for path in MODULES:
        source = io.StringIO(path.read_text(encoding="utf-8"))
        tokens = tokenize.generate_tokens(source.readline)
        names = {token.string.strip("_") for token in tokens if token.type == tokenize.NAME}
        if retired := names & set(RETIRED):
            back[str(path.relative_to(ROOT))] = {name: RETIRED[name] for name in retired}
    assert back == {}, "use the names on the right"


def test_no_retired_module_comes_back() -> None:
    ours = [path for path in MODULES if not path.is_relative_to(ROOT / "tests")]
    assert [str(path) for path in ours if path.stem.strip("_") in RETIRED_MODULES] == []
