"""Models made to disable a worker: their replies fail with the reason, the next is served."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import Split

from oki_trace import model_supervisor
from oki_trace.llm.loading.activity import Activity
from oki_trace.records import Message, Status
from tests import models, tiny
from tests.llm.loading import edit_config
from tests.served_store import FOREVER, ServedStore, serving, store_at
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends processes by signals")

# The sandbox refuses a longer range, and none within another.
ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStore]:
    with store_at(tmp_path_factory.mktemp("hostile")) as store, serving(store) as thread:
        until(store.reader.worker, "the worker's first sign of life")
        yield store
        assert thread.is_alive(), "it has served all of it"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def hostile(small: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "hostile"))


def with_tokenizer(folder: Path, **parts: Any) -> Path:
    tokenizer = tiny.tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    tokenizer.save_pretrained(folder)
    return folder


def failed(store: ServedStore, model: Path, small: Path, text: str = "the fox") -> str:
    """Why the reply of this model failed; the next reply, of another, is answered."""
    bad, good = store.ask(model, text=text), store.ask(small)
    ended = store.ended(bad)
    assert (ended.status, ended.tokens) == (Status.FAILED, 0)
    assert store.ended(good).status is Status.COMPLETE
    assert ended.reason is not None and "\n" not in ended.reason
    return ended.reason


def test_an_endless_template_ends_at_its_limit(
    store: ServedStore, small: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = model_supervisor.LIMITS[Activity.TEMPLATE]
    monkeypatch.setitem(
        model_supervisor.LIMITS, Activity.TEMPLATE, model_supervisor.Limit(1.0, 300.0, limit.fix)
    )
    (hostile / "chat_template.jinja").write_text(ENDLESS)
    assert failed(store, hostile, small) == (
        "Stopped after 1 s while its chat template was rendered. "
        "Fix chat_template.jinja in the model's folder, or choose another model."
    )


def test_a_stop_ends_an_endless_template(
    store: ServedStore, small: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_supervisor.STOP_SECONDS, Activity.TEMPLATE, 0.5)
    (hostile / "chat_template.jinja").write_text(ENDLESS)
    reply = store.ask(hostile)
    until(lambda: store.state().state == "decoding", "the template's beginning")
    store.writer.request_stop(reply)
    asked = time.monotonic()
    ended = store.ended(reply)
    assert time.monotonic() - asked < 5
    assert (ended.status, ended.reason) == (
        Status.STOPPED,
        "stopped while its chat template was rendered",
    )
    assert store.ended(store.ask(small)).status is Status.COMPLETE


def test_asked_to_leave_it_ends_an_endless_template(
    tmp_path: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM asks: the worker is gone in seconds, and the reply says why it ended."""
    monkeypatch.setitem(model_supervisor.STOP_SECONDS, Activity.TEMPLATE, 0.5)
    (hostile / "chat_template.jinja").write_text(ENDLESS)
    with store_at(tmp_path) as leaving:
        with serving(leaving):
            reply = leaving.ask(hostile)
            until(
                lambda: leaving.reader.worker() is not None and leaving.state().state == "decoding",
                "the template's beginning",
            )
        ended = leaving.reader.message(reply)
        assert ended.status is Status.STOPPED
        assert ended.reason is not None and ended.reason.startswith("stopped while ")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_template_that_asks_for_all_the_memory(
    store: ServedStore, small: Path, hostile: Path
) -> None:
    (hostile / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    reason = failed(store, hostile, small)
    assert reason.startswith("The model's chat template refused the messages: MemoryError.")


def test_a_tokenizer_that_never_ends(
    store: ServedStore, small: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = model_supervisor.LIMITS[Activity.TOKENIZER]
    monkeypatch.setitem(
        model_supervisor.LIMITS, Activity.TOKENIZER, model_supervisor.Limit(1.0, 300.0, limit.fix)
    )
    # "x" doubles with each rule; the text tried at loading has none.
    doubling = Sequence([Replace("x", "xx")] * 28)
    assert failed(store, with_tokenizer(hostile, normalizer=doubling), small) == (
        "Stopped after 1 s while its tokenizer was running. "
        "Shorten the message, or choose another model."
    )


def test_a_tokenizer_that_panics(store: ServedStore, small: Path, hostile: Path) -> None:
    """The panic is a BaseException, and no request of the user's to end."""
    split = Split(Regex("(a+)+$"), "isolated")
    reason = failed(store, with_tokenizer(hostile, pre_tokenizer=split), small, "a" * 30 + "b")
    assert reason.startswith("The model's tokenizer failed (PanicException: ")


def test_a_process_that_is_killed(store: ServedStore, small: Path, endless: Path) -> None:
    """As by the system when memory runs out: the steps stay, the reason is said."""
    reply = store.under_way(store.ask(endless, FOREVER))
    (process,) = store.workers("oki_trace.model_process")
    process.kill()
    until(lambda: store.reader.message(reply.id).reason, "its end in the store")
    ended: Message = store.reader.message(reply.id)
    assert ended.status is Status.FAILED
    assert ended.reason is not None
    assert ended.reason.startswith("The model process ended by signal 9")
    assert ended.tokens >= reply.tokens
    spoken = [s.token_bytes for s in store.reader.iter_steps(reply.id) if not s.is_special]
    assert ended.content == b"".join(spoken).decode(errors="replace").replace("\0", "␀")
    assert store.ended(store.ask(small)).status is Status.COMPLETE


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_endless(tmp_path_factory.mktemp("models") / "endless")


def test_layers_without_number(store: ServedStore, small: Path, hostile: Path) -> None:
    edit_config(hostile, num_hidden_layers=10**9)
    assert "num_hidden_layers" in failed(store, hostile, small)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_pipe_in_place_of_a_file(
    store: ServedStore, small: Path, hostile: Path, name: str
) -> None:
    (hostile / name).unlink()
    os.mkfifo(hostile / name)
    assert f"{hostile / name} is a named pipe" in failed(store, hostile, small)


def test_a_model_stays_loaded(store: ServedStore, small: Path) -> None:
    """Between two replies; and the process that holds it is the same."""
    first = store.ended(store.ask(small))
    (before,) = store.workers("oki_trace.model_process")
    told: list[str] = []
    reply = store.ask(small)

    def look() -> bool:
        told.append(store.state().state)
        return not store.reader.message(reply).status.is_live

    until(look, "the second reply")
    assert store.reader.message(reply).status is first.status is Status.COMPLETE
    assert "loading" not in told
    assert store.workers("oki_trace.model_process") == [before]
