"""The chat without a browser: it runs, and says what it should, on any store."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import data, model_defaults
from dashboard.viewdata import attention, lens
from oki_trace import queueing
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.dashboard import app_pages, sample_stores, server


def test_chat_on_an_empty_store_asks_for_a_question(empty_store: str) -> None:
    app = app_pages.chat()
    assert not app.exception
    assert len(app.chat_input) == 1
    assert not app.chat_input[0].disabled
    assert app.sidebar.selectbox(key="model").value == "smollm2"


def test_the_first_message_is_told_of_the_fetch_only_where_it_fetches(
    empty_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2_dir: Path
) -> None:
    def told() -> bool:
        return any("93 MB" in caption.value for caption in app_pages.chat().main.caption)

    assert not told()
    monkeypatch.chdir(tmp_path)
    assert told()


def test_the_store_is_made_when_there_is_none(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = tmp_path / "new folder" / "store.db"
    open_store(str(db))
    assert not app_pages.chat().exception
    assert db.is_file()


def test_every_conversation_can_be_opened(filled_store: sample_stores.Samples) -> None:
    for conversation in range(1, filled_store.first[0] + 1):
        app = app_pages.chat(conversation=conversation)
        assert not app.exception, conversation
        assert app_pages.drawn(app), conversation


def test_chat_shows_a_step(filled_store: sample_stores.Samples) -> None:
    conversation, message = filled_store.first
    app = app_pages.chat(conversation=conversation, message=message, step=2)
    assert not app.exception
    assert app.text[0].value == sample_stores.QUESTIONS[0]
    with_evidence = app.selectbox(key="evidence_head")
    assert with_evidence.value == attention.MEAN
    for head in attention.head_options(9):
        app.selectbox(key="evidence_head").set_value(head).run()
        assert not app.exception
    app.selectbox(key="evidence_layer").set_value(1).run()
    assert not app.exception
    app.toggle(key="no_sink").set_value(False).run()
    assert not app.exception


def test_the_panel_tells_why_the_token_was_chosen(filled_store: sample_stores.Samples) -> None:
    def told(app: AppTest) -> str:
        return " ".join(app_pages.plainly(c.value) for c in app.caption)

    conversation, message = filled_store.without_tensors
    app = app_pages.chat(conversation=conversation, message=message, step=1)
    assert not app.exception
    assert "Greedy decoding would have chosen “␣greedy”." in told(app)
    rows = app_pages.shown(app, "effects")["rows"]
    assert [row[0] for row in rows] == ["the model itself", "temperature 0.7", "top-p 0.9"]
    conversation, message = filled_store.first
    app = app_pages.chat(conversation=conversation, message=message, step=1)
    assert "Greedy: the model's most likely token" in told(app)
    with pytest.raises(StopIteration):  # no setting was applied
        app_pages.shown(app, "effects")


def test_the_lens_is_shown_in_every_way(filled_store: sample_stores.Samples) -> None:
    conversation, message = filled_store.first
    app = app_pages.chat(conversation=conversation, message=message, step=5)
    app.button_group(key="lens_view").set_value("changes").run()
    assert not app.exception
    for curve in lens.CURVES:
        app.button_group(key="curve").set_value(curve).run()
        assert not app.exception
        assert len(app.get("vega_lite_chart")) + len(app.get("arrow_vega_lite_chart")) == 1


def test_a_pinned_token_stays_pinned_from_step_to_step(filled_store: sample_stores.Samples) -> None:
    conversation, message = filled_store.first
    app = app_pages.chat(conversation=conversation, message=message, step=5)
    app.multiselect(key="pins").set_value(["␣the"]).run()
    assert not app.exception
    app.query_params["step"] = "2"
    app.run()
    assert not app.exception
    assert app.multiselect(key="pins").value == ["␣the"]


def test_a_head_that_another_reply_lacks_is_let_go(filled_store: sample_stores.Samples) -> None:
    """A choice outlives the step it was made at, and what it chose may not be there."""
    conversation, message = filled_store.first
    app = app_pages.chat(conversation=conversation, message=message, step=2)
    app.selectbox(key="evidence_head").set_value("head 3").run()
    app.selectbox(key="evidence_layer").set_value(30).run()
    other, reply = filled_store.without_tensors
    for name, value in (("conversation", other), ("message", reply), ("step", 1)):
        app.query_params[name] = str(value)
    app.run()
    assert not app.exception
    assert app.selectbox(key="evidence_head").value == attention.MEAN
    assert app.selectbox(key="evidence_layer").value == 3


@pytest.mark.parametrize("colour", ["surprisal", "entropy", "margin", "settle layer"])
def test_chat_in_every_colour(filled_store: sample_stores.Samples, colour: str) -> None:
    app = app_pages.chat(conversation=filled_store.first[0])
    app.button_group(key="colour").set_value(colour).run()
    assert not app.exception


def test_the_title_as_a_button_is_no_markup(filled_store: sample_stores.Samples) -> None:
    labels = [button.label for button in app_pages.chat().sidebar.button]
    assert sample_stores.HOSTILE[0] not in labels
    assert any("script" in label for label in labels)


def test_what_comes_in_from_elsewhere_is_seen(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    """The command line writes into the same store while the explorer is open."""
    db = str(tmp_path / "store.db")
    open_store(db)
    app = app_pages.chat()
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
        app = app_pages.chat(conversation=conversation)
        assert not app.exception
        assert "Reading the prompt…" in [c.value for c in app.caption]
        writer.append(running, [builders.step(i, rng, with_lens=i < 2) for i in range(4)])
        app.run()
        assert not app.exception
        captions = [c.value for c in app.caption]
        assert "Queued behind 1 reply." in captions
        assert any("The map is drawn when the reply ends" in c for c in captions)
        assert not app.chat_input[0].disabled
        app.toggle(key="map_live").set_value(True).run()
        assert not app.exception
        app.query_params["message"], app.query_params["step"] = str(running), "3"
        app.run()
        assert not app.exception
        assert any("The lens is a few steps behind" in c.value for c in app.caption)


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
    app = app_pages.chat(conversation=conversation, message=reply, step=600)
    assert not app.exception
    (window,) = [box for box in app.selectbox if (box.key or "").startswith("map_window")]
    assert window.value == (512, 700)
    window.set_value((0, 512)).run()
    assert not app.exception
    app.button_group(key="map_kind").set_value("attention").run()
    assert not app.exception


def test_the_sidebar_begins_with_the_defaults(empty_store: str) -> None:
    """The same as those of the command line and of Python."""
    app = app_pages.chat()
    assert "greedy · up to 256 tokens · full tensors: half" in app_pages.plainly(
        app.sidebar.caption[0].value
    )
    app = open_settings(app)
    assert app.selectbox(key="tensors").value == CapturePolicy().tensors
    assert app.number_input(key="max_new_tokens").value == Sampling().max_new_tokens
    assert app.slider(key="temperature").value == 0


def test_settings_that_make_no_sense_cannot_be_sent(empty_store: str) -> None:
    """What the sidebar offers is within what the model can be asked for."""
    app = open_settings(app_pages.chat())
    app.slider(key="temperature").set_value(app.slider(key="temperature").max).run()
    for key in ("penalty", "top_p", "top_k"):
        for value in (app.number_input(key=key).min, app.number_input(key=key).max, None):
            app.number_input(key=key).set_value(value).run()
            assert not app.exception
            assert not app.error
    assert not app.chat_input[0].disabled


def test_a_prompt_is_traced_as_chosen(empty_store: str, no_worker: None) -> None:
    app = open_settings(app_pages.chat())
    box = app.selectbox(key="trace_prompt")
    assert box.value == "light" and box.options == ["none", "light", "full"]
    reply = queued(app, empty_store)
    assert reply.policy is not None and reply.policy.trace_prompt == "light"
    for level, stored in (("none", None), ("full", "full")):
        app = open_settings(app_pages.chat())
        app.selectbox(key="trace_prompt").set_value(level).run()
        reply = queued(app, empty_store)
        assert reply.policy is not None and reply.policy.trace_prompt == stored
    app = app_pages.chat()
    assert "trace of the prompt" not in app_pages.plainly(app.sidebar.caption[0].value)


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent stays queued."""
    monkeypatch.setattr(data, "ensure_worker", lambda: None)


def queued(app: AppTest, db: str, text: str = "Go on.") -> Message:
    """The reply that a message sent here is given: queued, as it was asked for."""
    app.chat_input[0].set_value(text).run()
    assert not app.exception and not app.error
    with TraceReader(db) as reader:
        conversation = reader.conversations(limit=1)[0]
        return reader.messages(conversation.id)[-1]


def test_sampling_that_is_not_set_is_left_to_the_model(empty_store: str, no_worker: None) -> None:
    """As `run` does: its own generation config holds, not what the sidebar begins with."""
    reply = queued(app_pages.chat(), empty_store)
    assert reply.sampling == Sampling()
    app = open_settings(app_pages.chat())
    app.slider(key="temperature").set_value(0.7).run()
    assert queued(app, empty_store).sampling == Sampling(temperature=0.7)
    app = open_settings(app_pages.chat())
    app.slider(key="temperature").set_value(0.7).run()
    app.number_input(key="top_p").set_value(0.9).run()
    app.number_input(key="penalty").set_value(1.1).run()
    sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert queued(app, empty_store).sampling == sampling
    # Emptied again.
    app = open_settings(app_pages.chat())
    app.number_input(key="penalty").set_value(1.1).run()
    app.number_input(key="penalty").set_value(None).run()
    assert queued(app, empty_store).sampling == Sampling()


def test_an_empty_setting_shows_the_models_own(
    empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usual(app: AppTest) -> list[str]:
        keys = ("top_p", "top_k", "penalty")
        return [app.number_input(key=key).proto.placeholder for key in keys]

    (tmp_path / "generation_config.json").write_text(
        '{"top_p": 0.8, "top_k": 20, "repetition_penalty": "<b>", "temperature": 0.1}'
    )
    monkeypatch.setenv("OKI_TRACE_MODEL", str(tmp_path))
    app = open_settings(app_pages.chat())
    assert usual(app) == ["the model's own, 0.8", "the model's own, 20", "the model's own"]
    monkeypatch.setenv("OKI_TRACE_MODEL", "no/such-model")
    app = open_settings(app_pages.chat())
    assert usual(app) == ["the model's own"] * 3


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"top_p": NaN, "top_k": true}', "[" * 100_000, '{"top_p": 1e999}']
)
def test_a_config_that_makes_no_sense_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert model_defaults.sampling_defaults(str(tmp_path), tmp_path) == {}


def test_a_conversation_keeps_its_model(
    filled_store: sample_stores.Samples, no_worker: None
) -> None:
    conversation, _ = filled_store.without_tensors
    with TraceReader(filled_store.db) as reader:
        last = reader.messages(conversation)[-1]
    assert last.choice is not None and last.choice.model_id != "smollm2"
    app = app_pages.chat(conversation=conversation)
    assert app.selectbox(key="model").value == last.choice.model_id
    # Another one is opened in the same window, and with it its model.
    app.query_params["conversation"] = str(filled_store.first[0])
    app.run()
    assert app.selectbox(key="model").value == "smollm2"
    # Loaded as it was for the last reply.
    assert asked_for(filled_store.first[0]) == ModelChoice("smollm2", dtype="float32", device="cpu")
    # What is chosen by hand holds, and the page says who answered before.
    app.selectbox(key="model").set_value("tiny/model").run()
    assert any(
        "last reply here is by smollm2" in app_pages.plainly(c.value) for c in app.sidebar.caption
    )
    app.run()
    assert app.selectbox(key="model").value == "tiny/model"


def asked_for(number: int) -> ModelChoice | None:
    """The model that the next message is sent with, in a window of its own."""

    def draw(conversation: int) -> None:
        import streamlit as st

        from dashboard import data
        from dashboard.views import sidebar

        opened = data.conversation(conversation)
        settings = sidebar.draw_settings(conversation, opened[1] if opened else ())
        st.session_state["asked-for"] = settings[0] if settings else None

    drawn = AppTest.from_function(draw, default_timeout=60, args=(number,)).run()
    choice: ModelChoice | None = drawn.session_state["asked-for"]
    return choice


def test_the_next_message_goes_to_the_conversations_own_model(
    tmp_path: Path, open_store: Callable[[str], None], no_worker: None
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    choice = ModelChoice("other/model", use_4bit=True, dtype="float32", device="cpu")
    with TraceWriter(db) as writer:
        request = queueing.ReplyRequest(queueing.new_messages("Hello."), choice)
        conversation, reply = queueing.submit(writer, request, claim=True)
        queueing.fail(writer, reply, "There is no model other/model: check the name.")
    app = app_pages.chat(conversation=conversation)
    assert app.selectbox(key="model").value == "other/model"
    assert queued(app, db).choice == choice


def test_no_model_answers_where_none_is_named(
    tmp_path: Path, open_store: Callable[[str], None], no_worker: None
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer:
        request = queueing.ReplyRequest(queueing.new_messages("Hello."), ModelChoice("gone/model"))
        conversation, reply = queueing.submit(writer, request, claim=True)
        queueing.fail(writer, reply, "There is no such model.")
    with closing(sqlite3.connect(db)) as store, store:
        store.execute("UPDATE message SET model_id = NULL, choice = NULL")
    app = app_pages.chat(conversation=conversation)
    assert app.selectbox(key="model").value is None
    assert app.chat_input[0].disabled
    assert any("Choose a model to send" in caption.value for caption in app.sidebar.caption)


def test_settings_hold_while_they_are_out_of_sight(empty_store: str) -> None:
    app = open_settings(app_pages.chat())
    app.slider(key="temperature").set_value(0.7).run()
    app.number_input(key="max_new_tokens").set_value(9).run()
    app.session_state["sampling"] = False
    app.run()
    assert not app.exception
    assert not app.slider
    assert "temperature 0.7 · up to 9 tokens" in app_pages.plainly(app.sidebar.caption[0].value)
    app = open_settings(app)
    assert app.slider(key="temperature").value == 0.7
    assert app.number_input(key="max_new_tokens").value == 9


def open_settings(app: AppTest) -> AppTest:
    app.session_state["sampling"] = True
    return app.run()


def test_a_model_that_is_loading_shows_how_far_it_is(
    tmp_path: Path, open_store: Callable[[str], None]
) -> None:
    db = str(tmp_path / "store.db")
    open_store(db)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("Wait")
        writer.add_message(conversation, ChatMessage(Role.USER, "Go on."))
        writer.queue_reply(conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy())
        writer.set_worker_state(
            "loading", model_id="tiny/model", detail="Downloading 3 of 9 MB", progress=1 / 3
        )
        app = app_pages.chat(conversation=conversation)
        assert not app.exception
        (bar,) = app.main.get("progress")
        assert bar.value == 33
        assert app_pages.plainly(bar.text) == "Downloading 3 of 9 MB"


def test_pages_load_neither_torch_nor_transformers() -> None:
    """So that they come up at once, also on a machine without a model library."""
    code = (
        "import sys\n"
        "from dashboard import components, data\n"
        "from dashboard.views import chat\n"
        "assert not {'altair', 'pandas'} & set(sys.modules), 'before there is a chart'\n"
        "from dashboard import charts\n"
        "from dashboard.views import chat, compare, conversations, reply_map, store\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes', 'duckdb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=server.ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_arguments_of_the_models_own_template_have_a_field(
    empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_worker: None
) -> None:
    model = tmp_path / "thinker"
    model.mkdir()
    (model / "chat_template.jinja").write_text("{% if enable_thinking %}<think>{% endif %}")
    assert model_defaults.template_switches(str(model), tmp_path) == ("enable_thinking",)
    monkeypatch.setenv("OKI_TRACE_MODEL", str(model))
    app = open_settings(app_pages.chat())
    assert not app.exception
    app.text_area(key="template_args").set_value("reasoning=high").run()
    app.selectbox(key="enable_thinking").set_value("false").run()
    app.chat_input[0].set_value("Is 91 prime?").run()
    with TraceReader(empty_store) as reader:
        reply = reader.messages(1)[-1]
    assert reply.template is not None
    assert reply.template.arguments == {"enable_thinking": False, "reasoning": "high"}
