"""Each page without a browser: it runs, and says what it should, on any store."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import builders
import numpy as np
import pytest
from apps import shown
from explorers import HOME, ROOT
from stories import HOSTILE, LENS_REASON, QUESTIONS, Stories
from streamlit.testing.v1 import AppTest

from dashboard import attention_shapes, data, lens_shapes
from dashboard.views import reply_map
from oki_trace.exchange.formats import Format
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reader import TraceReader
from oki_trace.store.writer import TraceWriter


def chat(**query: int) -> AppTest:
    app = AppTest.from_file(str(HOME), default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


# AppTest follows no navigation: a page beside the first is run by itself.
def conversations() -> AppTest:
    def page() -> None:
        from dashboard.views import conversations

        conversations.page()

    return AppTest.from_function(page, default_timeout=60).run()


def wide_map(**query: int) -> AppTest:
    def page() -> None:
        from dashboard.views import reply_map

        reply_map.page()

    app = AppTest.from_function(page, default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


def drawn(app: AppTest) -> int:
    """How many of the explorer's own elements are on the page; AppTest knows them not."""
    return sum(type(element).__name__ == "UnknownElement" for element in app.main)


# ---------------------------------------------------------------- an empty store


def test_chat_on_an_empty_store_asks_for_a_question(empty_store: str) -> None:
    app = chat()
    assert not app.exception
    assert len(app.chat_input) == 1
    assert not app.chat_input[0].disabled
    assert app.sidebar.selectbox(key="model").value == "smollm2"


def test_conversations_on_an_empty_store_say_so(empty_store: str) -> None:
    app = conversations()
    assert not app.exception
    assert "No conversations yet" in app.caption[0].value


def test_the_map_on_an_empty_store_leads_to_the_chat(empty_store: str) -> None:
    app = wide_map()
    assert not app.exception
    assert "begin a conversation in Chat" in app.caption[0].value


def test_the_first_message_is_told_of_the_fetch_only_where_it_fetches(
    empty_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2_dir: Path
) -> None:
    def told() -> bool:
        return any("93 MB" in caption.value for caption in chat().main.caption)

    assert not told()
    monkeypatch.chdir(tmp_path)
    assert told()


def test_the_store_is_made_when_there_is_none(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = tmp_path / "new folder" / "store.db"
    open_store(str(db))
    assert not chat().exception
    assert db.is_file()


# ---------------------------------------------------------------- a filled store


def test_every_conversation_can_be_opened(filled_store: Stories) -> None:
    for conversation in range(1, filled_store.first[0] + 1):
        app = chat(conversation=conversation)
        assert not app.exception, conversation
        assert drawn(app), conversation


def test_chat_shows_a_step(filled_store: Stories) -> None:
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=2)
    assert not app.exception
    assert app.text[0].value == QUESTIONS[0]
    with_evidence = app.selectbox(key="evidence_head")
    assert with_evidence.value == attention_shapes.MEAN
    for head in attention_shapes.heads(9):
        app.selectbox(key="evidence_head").set_value(head).run()
        assert not app.exception
    app.selectbox(key="evidence_layer").set_value(1).run()
    assert not app.exception
    app.toggle(key="no_sink").set_value(False).run()
    assert not app.exception


def test_the_panel_tells_why_the_token_was_chosen(filled_store: Stories) -> None:
    def told(app: AppTest) -> str:
        return " ".join(c.value.replace("\\", "").replace("\u2060", "") for c in app.caption)

    conversation, message = filled_store.without_tensors
    app = chat(conversation=conversation, message=message, step=1)
    assert not app.exception
    assert "Greedy would have said “␣greedy”." in told(app)
    rows = shown(app, "effects")["rows"]
    assert [row[0] for row in rows] == ["the model itself", "temperature 0.7", "top-p 0.9"]
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=1)
    assert "Greedy: the model's most likely token" in told(app)
    with pytest.raises(StopIteration):  # no setting was applied
        shown(app, "effects")


def test_the_lens_is_shown_in_every_way(filled_store: Stories) -> None:
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=5)
    app.button_group(key="lens_view").set_value("changes").run()
    assert not app.exception
    for curve in lens_shapes.CURVES:
        app.button_group(key="curve").set_value(curve).run()
        assert not app.exception
        assert len(app.get("vega_lite_chart")) + len(app.get("arrow_vega_lite_chart")) == 1


def test_a_pinned_token_stays_pinned_from_step_to_step(filled_store: Stories) -> None:
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=5)
    app.multiselect(key="pins").set_value(["␣the"]).run()
    assert not app.exception
    app.query_params["step"] = "2"
    app.run()
    assert not app.exception
    assert app.multiselect(key="pins").value == ["␣the"]


@pytest.mark.parametrize("story", ["first", "hostile", "long", "bare", "unknown", "failed"])
@pytest.mark.parametrize("kind", reply_map.KINDS)
def test_the_map_of_any_reply(filled_store: Stories, story: str, kind: str) -> None:
    conversation, message = getattr(filled_store, story)
    app = wide_map(conversation=conversation, message=message)
    assert not app.exception
    app.button_group(key="map_kind").set_value(kind).run()
    assert not app.exception
    captions = " ".join(caption.value for caption in app.caption)
    if story == "bare":
        assert (LENS_REASON if kind == "layers" else "no attention") in captions
        assert drawn(app) == 1  # the step alone
    else:
        assert drawn(app) == 2


def test_the_attention_map_of_one_head_needs_its_tensors(filled_store: Stories) -> None:
    conversation, message = filled_store.first
    app = wide_map(conversation=conversation, message=message)
    app.button_group(key="map_kind").set_value("attention").run()
    app.selectbox(key="map_head").set_value("head 3").run()
    assert not app.exception
    assert "from the full tensors" in app.caption[-1].value
    conversation, message = filled_store.without_tensors
    app = wide_map(conversation=conversation, message=message)
    app.button_group(key="map_kind").set_value("attention").run()
    assert app.selectbox(key="map_head").options == [attention_shapes.MEAN]
    assert "were not kept" in app.selectbox(key="map_head").help


def test_a_head_that_another_reply_lacks_is_let_go(filled_store: Stories) -> None:
    """A choice outlives the step it was made at, and what it chose may not be there."""
    conversation, message = filled_store.first
    app = chat(conversation=conversation, message=message, step=2)
    app.selectbox(key="evidence_head").set_value("head 3").run()
    app.selectbox(key="evidence_layer").set_value(30).run()
    other, reply = filled_store.without_tensors
    for name, value in (("conversation", other), ("message", reply), ("step", 1)):
        app.query_params[name] = str(value)
    app.run()
    assert not app.exception
    assert app.selectbox(key="evidence_head").value == attention_shapes.MEAN
    assert app.selectbox(key="evidence_layer").value == 3


@pytest.mark.parametrize("colour", ["surprisal", "entropy", "margin", "settle layer"])
def test_chat_in_every_colour(filled_store: Stories, colour: str) -> None:
    app = chat(conversation=filled_store.first[0])
    app.button_group(key="colour").set_value(colour).run()
    assert not app.exception


def test_the_title_as_a_button_is_no_markup(filled_store: Stories) -> None:
    labels = [button.label for button in chat().sidebar.button]
    assert HOSTILE[0] not in labels
    assert any("script" in label for label in labels)


def test_conversations_are_listed_and_searched(filled_store: Stories) -> None:
    app = conversations()
    assert not app.exception
    frame = app.dataframe[0].value
    assert list(frame["id"]) == list(range(filled_store.first[0], 0, -1))
    assert frame["title"].iloc[0] == QUESTIONS[0]
    app.text_input(key="search").set_value("WHAT RIVER").run()
    assert list(app.dataframe[0].value["id"]) == [filled_store.first[0]]
    app.text_input(key="search").set_value("no such words").run()
    assert "Nothing found" in app.caption[0].value
    # Wildcards of the store's own language are text.
    app.text_input(key="search").set_value("%").run()
    assert "Nothing found" in app.caption[0].value


def test_conversations_are_narrowed_by_model_status_and_date(filled_store: Stories) -> None:
    def ids(app: AppTest) -> list[int]:
        assert not app.exception
        return list(app.dataframe[0].value["id"]) if app.dataframe else []

    app = conversations()
    every = ids(app)
    app.selectbox(key="of_status").set_value("failed").run()
    assert set(ids(app)) == {filled_store.failed[0], filled_store.failed_at_once[0]}
    app.selectbox(key="of_model").set_value("no/such").run()
    assert ids(app) == [filled_store.failed_at_once[0]]
    app.selectbox(key="of_status").set_value("any")
    app.selectbox(key="of_model").set_value("any")
    app.date_input(key="since").set_value(dt.date(2020, 1, 1)).run()
    assert ids(app) == every
    app.date_input(key="until").set_value(dt.date(2020, 1, 2)).run()
    assert "Nothing found" in app.caption[0].value
    app.date_input(key="until").set_value(dt.datetime.now().astimezone().date()).run()
    assert ids(app) == every


def test_a_conversation_tells_its_speed_and_size(filled_store: Stories) -> None:
    frame = conversations().dataframe[0].value.set_index("id")
    bare, full = frame.loc[filled_store.bare[0]], frame.loc[filled_store.first[0]]
    assert (bare["tokens"], bare["tokens/s"]) == (3, 3.0)
    assert np.isnan(bare["tensors"]), "none were kept"
    assert full["tokens/s"] > 0
    assert full["tensors"] > 1_000_000


def test_a_search_that_leaves_fewer_pages_shows_the_last(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "many.db")
    open_store(db)
    with TraceWriter(db) as writer:
        for number in range(120):
            writer.create_conversation(f"Number {number}")
    app = conversations()
    app.number_input(key="page").set_value(3).run()
    assert not app.exception
    assert list(app.dataframe[0].value["title"]) == [f"Number {n}" for n in range(19, -1, -1)]
    app.text_input(key="search").set_value("Number 1").run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 31


def acting(*conversations: int) -> AppTest:
    """What can be done with these conversations; AppTest ticks no rows."""

    def page(ids: tuple[int, ...]) -> None:
        from dashboard import data
        from dashboard.views import conversations

        found = [data.conversation(number) for number in ids]
        conversations.actions([one[0] for one in found if one])

    return AppTest.from_function(page, default_timeout=60, args=(conversations,)).run()


def test_conversations_are_renamed_exported_and_deleted(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        for title in HOSTILE:
            writer.create_conversation(title)
        for number in range(1, len(HOSTILE) + 1):
            assert not acting(number).exception
        app = acting(1)
        app.text_input(key="title-1").set_value("  Another  ").run()
        app.button(key="rename").click().run()
        assert not app.exception
        assert reader.conversation(1).title == "Another"
        document = json.loads(data.exported(1, Format.JSON))
        assert document["conversation"]["title"] == "Another"
        app = acting(1, 2)
        assert "Delete 2 conversations" in app.markdown[0].value
        assert len(reader.conversations()) == len(HOSTILE)
        app.button(key="delete").click().run()
        assert not app.exception
        assert {c.id for c in reader.conversations()} == set(range(3, len(HOSTILE) + 1))


def test_a_conversation_that_is_being_written_is_not_deleted(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        conversation = writer.create_conversation("Live")
        writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
        )
        app = acting(conversation)
        app.button(key="delete").click().run()
        assert not app.exception
        assert "cannot be deleted now" in app.error[0].value
        assert reader.conversation(conversation).title == "Live"


def test_what_comes_in_from_elsewhere_is_seen(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    """The command line writes into the same store while the explorer is open."""
    db = str(tmp_path / "store.db")
    open_store(db)
    app = chat()
    assert not [b for b in app.sidebar.button if b.label == "From a terminal"]
    with TraceWriter(db, checkpoint=False) as writer:
        writer.create_conversation("From a terminal")
    app.run()
    assert [b for b in app.sidebar.button if b.label == "From a terminal"]


def test_a_live_reply_is_shown_as_far_as_it_is(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    """Its last lenses trail, another reply waits for it, and the box stays open."""
    db = str(tmp_path / "live.db")
    open_store(db)
    rng = np.random.default_rng(1)
    with TraceWriter(db) as writer:
        writer.set_worker_state("decoding", model_id="tiny/model")
        conversation = writer.create_conversation("Live")
        for _ in range(2):
            writer.add_message(conversation, ChatMessage(Role.USER, "Go on."))
            reply = writer.queue_reply(
                conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy()
            )
        running = writer.claim_next_reply()
        assert running is not None and running < reply
        writer.start_reply(running, builders.turn_start("half"))
        app = chat(conversation=conversation)
        assert not app.exception
        assert "Reading the prompt…" in [c.value for c in app.caption]
        writer.append(running, [builders.step(i, rng, with_lens=i < 2) for i in range(4)])
        app.run()
        assert not app.exception
        captions = [c.value for c in app.caption]
        assert "Queued: 1 reply before it." in captions
        assert any("the map is drawn when the reply has ended" in c for c in captions)
        assert not app.chat_input[0].disabled
        app.toggle(key="map_live").set_value(True).run()
        assert not app.exception
        app.query_params["message"], app.query_params["step"] = str(running), "3"
        app.run()
        assert not app.exception
        assert any("A few steps behind" in c.value for c in app.caption)


def test_a_long_reply_comes_in_windows(tmp_path: Path, open_store: Callable[[str], None]) -> None:
    db = str(tmp_path / "large.db")
    open_store(db)
    rng = np.random.default_rng(1)
    steps = [builders.step(i, rng, with_lens=True, with_tensors=False) for i in range(700)]
    with TraceWriter(db) as writer:
        for number in range(60):
            writer.create_conversation(f"Conversation {number}")
        conversation = writer.create_conversation("Long")
        reply = writer.queue_reply(
            conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy(), claim=True
        )
        writer.start_reply(reply, builders.turn_start("none"))
        writer.append(reply, steps)
        writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "end of turn", 1.0))
    app = chat(conversation=conversation, message=reply, step=600)
    assert not app.exception
    (window,) = [box for box in app.selectbox if (box.key or "").startswith("map_window")]
    assert window.value == 512
    window.set_value(0).run()
    assert not app.exception
    app.button_group(key="map_kind").set_value("attention").run()
    assert not app.exception


def test_the_sidebar_begins_with_the_defaults(empty_store: str) -> None:
    """The same as those of the command line and of Python."""
    app = chat()
    assert app.selectbox(key="tensors").value == CapturePolicy().tensors
    assert app.number_input(key="max_new_tokens").value == Sampling().max_new_tokens
    assert app.slider(key="temperature").value == 0


def test_settings_that_make_no_sense_cannot_be_sent(empty_store: str) -> None:
    """What the sidebar offers is within what the model can be asked for."""
    app = chat()
    for key in ("temperature", "penalty"):
        app.slider(key=key).set_value(app.slider(key=key).max).run()
        assert not app.exception
        assert not app.error
    app.slider(key="top_p").set_value(app.slider(key="top_p").min).run()
    assert not app.exception
    assert not app.error
    assert not app.chat_input[0].disabled


# ----------------------------------------------------------------------- compare


def comparing(*replies: int, **query: int) -> AppTest:
    def page() -> None:
        from dashboard.views import compare

        compare.page()

    app = AppTest.from_function(page, default_timeout=60)
    for side, reply in zip(("left", "right"), replies, strict=False):
        app.query_params[side] = str(reply)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


def test_compare_on_an_empty_store_leads_to_the_chat(empty_store: str) -> None:
    app = comparing()
    assert not app.exception
    assert "begin a conversation in Chat" in app.caption[0].value
    assert not comparing(1, 2).exception


def test_two_replies_are_compared(filled_store: Stories) -> None:
    left, right = filled_store.bare[1], filled_store.without_tensors[1]
    app = comparing(left, right)
    assert not app.exception
    assert [box.value for box in app.selectbox] == [left, right]
    assert app.markdown[0].value.startswith("They part at token 1;")
    assert app.toggle(key="exact").disabled
    assert shown(app, "compare-replies")["chosen"] == 0
    table = shown(app, "settings")
    settings = {name: values for name, *values in table["rows"]}
    assert settings["model"][0] == "tiny/model"
    assert settings["temperature"][1] == "0.7"
    assert settings["seed"][1] == "3"
    differ = {table["rows"][number][0] for number in table["marked"]}
    assert differ == {name for name, (one, two) in settings.items() if one != two}
    app.selectbox(key="compare-right").set_value(left).run()
    assert not app.exception
    assert app.markdown[0].value == "All 3 tokens are the same."
    assert app.query_params["right"] in (str(left), [str(left)])


def test_the_distance_is_exact_where_the_logits_were_kept(filled_store: Stories) -> None:
    app = comparing(filled_store.first[1], filled_store.second[1])
    assert not app.exception
    assert any("the least it can be" in caption.value for caption in app.caption)
    app.toggle(key="exact").set_value(True).run()
    assert not app.exception
    assert any("Exact, from the full logits" in caption.value for caption in app.caption)


def test_two_steps_are_compared_and_one_that_is_alone(filled_store: Stories) -> None:
    app = comparing(filled_store.first[1], filled_store.second[1], pair=0)
    one, two = (
        shown(chat(conversation=conversation, message=message, step=0), "facts")["what"]
        for conversation, message in (filled_store.first, filled_store.second)
    )
    assert [row[1] for row in shown(app, "compare-steps")["rows"]] == [one, two]
    assert shown(app, "lens-left")["pins"] is False
    assert shown(app, "bars-right")["rows"]
    last = len(shown(app, "compare-replies")["sides"][1]["tokens"])
    alone = comparing(filled_store.bare[1], filled_store.second[1], pair=last - 1)
    assert not alone.exception
    assert shown(alone, "compare-steps")["rows"][0][1] == "–"
    assert any("left reply has no step here" in caption.value for caption in alone.caption)


@pytest.mark.parametrize("story", ["hostile", "long", "unknown", "failed"])
def test_any_two_replies_can_be_compared(filled_store: Stories, story: str) -> None:
    left, right = getattr(filled_store, story)[1], filled_store.hostile[1]
    app = comparing(left, right)
    assert not app.exception
    sides = shown(app, "compare-replies")["sides"]
    assert [side["message"] for side in sides] == [left, right]
    assert {row[0] for row in shown(app, "compare-steps")["rows"]} == {"left", "right"}
    assert not comparing(filled_store.failed_at_once[1], 10**9).exception


# ------------------------------------------------------------------------- start


def test_pages_load_neither_torch_nor_transformers() -> None:
    """So that they come up at once, also on a machine without a model library."""
    code = (
        "import sys\n"
        "from dashboard import data, charts, components\n"
        "from dashboard.views import chat, compare, conversations, reply_map, store\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes', 'duckdb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
