"""``demo``, ``run`` and ``chat``: input, output, and the store afterwards."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oki_trace.cli import main
from oki_trace.errors import ModelError
from oki_trace.llm.loading.quantization import QuantizationFallback
from oki_trace.records import (
    CapturePolicy,
    Message,
    ModelChoice,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import models, tiny
from tests.cli.commands import ACTIVE, Done, Oki, start
from tests.cli.conftest import Demo


def stored(conversation: int = 1, db: str | Path | None = None) -> list[Message]:
    with TraceReader(db or Settings.from_environment().db) as reader:
        return reader.messages(conversation)


Save = Callable[[Path, Any], Path]


@pytest.fixture
def saved(capfd: pytest.CaptureFixture[str]) -> Save:
    """Writes a model to a folder; what transformers prints of it is not the command's."""

    def save(folder: Path, model: Any) -> Path:
        models.save(folder, model, tiny.tokenizer())
        capfd.readouterr()
        return folder

    return save


def shown(done: Done) -> Any:
    """The JSON of the last line."""
    assert (done.status, done.err) == (0, "")
    return json.loads(done.lines[-1])


def complaint(done: Done, status: int) -> str:
    """The one line on standard error of a command that did not work."""
    assert done.status == status, done
    assert "Traceback" not in done.out + done.err
    (line,) = done.err.splitlines()
    assert line.startswith("oki-trace: ")
    return line.removeprefix("oki-trace: ")


# -------------------------------------------------------------------------- demo


def test_the_demo_holds_a_conversation_and_says_where_it_is(demo: Demo) -> None:
    done = demo.done
    assert (done.status, done.err) == (0, "")
    assert not ACTIVE.search(done.out), "colours or progress bars, into a pipe"
    asked = [line for line in done.lines if line.startswith("> ")]
    assert asked[0] == "> What is the capital of France?" and len(asked) == 2
    answer = done.lines[done.lines.index(asked[0]) + 1]
    assert "Paris" in answer
    messages = stored(db=demo.db)
    assert [str(m.role) for m in messages] == ["user", "assistant"] * 2
    assert messages[1].content == answer
    assert all(m.status is Status.COMPLETE for m in messages)
    assert all(m.model_id == "smollm2" and m.tokens > 3 for m in messages[1::2])
    assert f"conversation 1 in {demo.db}." in done.out
    assert "oki-trace show 1" in done.out
    with TraceReader(demo.db) as reader:
        # The second question is asked in the light of the first.
        assert answer in reader.prompt(messages[3].id).text
        names = ["attentions", "hidden_states", "logits"]
        assert reader.tensor_names(messages[3].id, 0) == names


def test_a_conversation_goes_on_with_the_real_model(oki: Oki, demo: Demo, tmp_path: Path) -> None:
    db = shutil.copy(demo.db, tmp_path / "copy.db")
    found = shown(oki("run", "And of Italy?", "-c", 1, "--db", db, "--max-new-tokens", 6, "--json"))
    assert found["conversation"] == 1
    messages = stored(db=db)
    assert [m.content for m in messages[4:]] == ["And of Italy?", found["output"]]
    with TraceReader(db) as reader:
        assert messages[1].content in reader.prompt(found["message"]).text


# --------------------------------------------------------------------------- run


def test_a_reply_is_written_as_it_was_kept(oki: Oki, small: Path) -> None:
    done = oki("run", "the fox", "--model", small, "--max-new-tokens", 12)
    assert (done.status, done.err) == (0, "")
    asked, reply = stored()
    assert (asked.role, asked.content) == (Role.USER, "the fox")
    assert (reply.status, reply.tokens) == (Status.COMPLETE, 12)
    # Characters that act are shown by a symbol; nothing else is between.
    text, _, summary = done.out.rstrip("\n").rpartition("\n")
    assert len(text) >= len(reply.content)
    for written, kept in zip(text, reply.content, strict=False):
        if ACTIVE.match(kept) or kept == "␀":
            break
        assert written == kept
    assert summary.startswith("complete (token limit) · 12 tokens · ")
    assert summary.endswith(f"conversation 1, message {reply.id}")
    assert not ACTIVE.search(done.out)


def test_json_is_the_last_line_and_says_what_is_kept(oki: Oki, small: Path) -> None:
    done = oki("run", "the fox", "--model", small, "--max-new-tokens", 5, "--json")
    assert len(done.lines) == 1
    reply = stored()[-1]
    document = shown(done)
    (part,) = document.pop("parts")
    assert (part["kind"], part["start"], part["end"]) == ("answer", 0, 5)
    assert part["text"] == reply.content
    assert document == {
        "conversation": 1,
        "message": reply.id,
        "steps": 5,
        "status": "complete",
        "reason": "token limit",
        "output": reply.content,
    }
    assert done.out.isascii()


def test_a_system_message_begins_the_conversation(oki: Oki, small: Path) -> None:
    options = ("--model", small, "--max-new-tokens", 2, "--json")
    first = shown(oki("run", "the fox", "--system", "be brief", *options))
    again = shown(oki("run", "jumps", "-c", first["conversation"], *options))
    messages = stored()
    assert [(str(m.role), m.content) for m in messages[:2]] == [
        ("system", "be brief"),
        ("user", "the fox"),
    ]
    assert (again["conversation"], len(messages)) == (1, 5)
    with TraceReader(Settings.from_environment().db) as reader:
        text = reader.prompt(again["message"]).text
    assert text == (
        f"<s>system: be brief\n<s>user: the fox\n<s>assistant: {first['output']}\n"
        "<s>user: jumps\n<s>assistant: "
    )


def test_the_same_seed_gives_the_same_reply(oki: Oki, small: Path) -> None:
    def run(*options: object) -> str:
        found = shown(oki("run", "fox", "-m", small, "--max-new-tokens", 20, "--json", *options))
        return str(found["output"])

    hot = ("--temperature", 1.5, "--seed")
    first, second = run(*hot, 1), run(*hot, 2)
    assert first != second
    assert run(*hot, 1) == first
    assert run("--temperature", 1.5, "--top-k", 1, "--seed", 5) == run(), "one candidate: greedy"
    assert run("--temperature", 0) == run(), "no temperature is greedy"


def test_tensors_are_kept_as_asked(oki: Oki, small: Path) -> None:
    for mode, names in (("none", []), ("exact", ["attentions", "hidden_states", "logits"])):
        found = shown(
            oki("run", "x", "-m", small, "--max-new-tokens", 1, "--tensors", mode, "--json")
        )
        with TraceReader(Settings.from_environment().db) as reader:
            assert reader.tensor_names(found["message"], 0) == names


def test_a_prompt_comes_from_standard_input(
    oki: Oki, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line end is not part of it; bytes that are no text are refused."""
    for raw, refused in ((b"two\nlines \n", False), (b"two\nlines \xff\n", True)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        done = oki("run", "-", "--model", small, "--max-new-tokens", 1, "--json")
        if refused:
            assert done.status == 2 and "UTF-8" in done.err and len(done.err.splitlines()) == 1
        else:
            assert shown(done)["steps"] == 1
            assert stored()[0].content == "two\nlines "


def test_4bit_that_could_not_be_had_is_said_in_a_line(oki: Oki, small: Path) -> None:
    """Whether it can be had for so small a model is up to bitsandbytes and this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", QuantizationFallback)
        done = oki("run", "x", "--model", small, "--max-new-tokens", 1, "--4bit")
    assert done.status == 0
    capture = stored()[-1].capture
    assert capture is not None
    if capture.quantization == "4-bit":
        assert done.err == ""
    else:
        (line,) = done.err.splitlines()
        assert line.startswith(f"oki-trace: {small}: 4-bit was requested, but float32 was loaded")


def test_debug_is_an_option_anywhere_and_text_after_two_dashes(oki: Oki, small: Path) -> None:
    options = ("--model", small, "--max-new-tokens", 1, "--json")
    assert shown(oki("run", *options, "--debug", "--", "--debug"))["steps"] == 1
    assert stored()[0].content == "--debug"


# -------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("options", "complains"),
    [
        (["--temperature", "-1"], "emperature must be 0 to 100"),
        (["--temperature", "nan"], "emperature must be 0 to 100"),
        (["--temperature", "warm"], "Invalid value for '--temperature'"),
        (["--top-p", "0"], "op_p must be above 0"),
        (["--top-p", "1.5"], "op_p must be above 0"),
        (["--top-k", "-1"], "op_k must be 0"),
        (["--repetition-penalty", "0"], "epetition_penalty must be a number above 0"),
        (["--seed", "-1"], "eed must be 0"),
        (["--max-new-tokens", "-1"], "Invalid value for '--max-new-tokens'"),
        (["--tensors", "all"], "ensors must be one of exact, half, compact, none"),
        (["--dtype", "float99"], "float99"),
        (["--device", "abacus"], "abacus"),
        (["--no-such-option"], "No such option"),
        (["-c", "1", "--system", "be brief"], "A system message can only begin a new conversation"),
        (["--db", "mysql://host/db"], "cannot be kept in mysql"),
    ],
)
def test_values_that_make_no_sense_exit_2(
    oki: Oki, small: Path, options: list[str], complains: str
) -> None:
    done = oki("run", "the fox", "--model", small, *options)
    assert done.status == 2
    assert complains in done.err
    assert done.out == ""
    assert "Traceback" not in done.err and not ACTIVE.search(done.err)


@pytest.mark.parametrize("arguments", [["run"], ["run", ""], ["run", "  \n"], ["show", "one"]])
def test_what_is_missing_exits_2(oki: Oki, arguments: list[str]) -> None:
    assert oki(*arguments).status == 2


# ------------------------------------------------------------------ work that fails


@pytest.mark.parametrize(
    ("model", "complains"),
    [
        ("./no/such/folder", "There is no ./no/such/folder here"),
        ("no-such.gguf", "There is no no-such.gguf here"),
        ("no-such-owner/no-such-model", "no-such-owner/no-such-model"),
        ("README.md", "README.md is a file, not a model"),
    ],
)
def test_an_unknown_model_is_one_clear_line(oki: Oki, model: str, complains: str) -> None:
    done = oki("run", "the fox", "--model", model)
    assert complains in complaint(done, 1)
    assert done.out == ""
    with pytest.raises(ModelError):
        main(["run", "the fox", "--model", model, "--debug"])


def test_an_unknown_conversation_is_found_out_before_a_model_is_loaded(oki: Oki) -> None:
    for name in ("run", "chat"):
        prompt = ["the fox"] if name == "run" else []
        done = oki(name, *prompt, "-c", 99, "--model", "./no/such/folder")
        assert "There is no conversation 99" in complaint(done, 1)


def test_a_conversation_goes_on_after_a_prompt_that_was_too_long(oki: Oki, small: Path) -> None:
    options = ("--model", small, "--max-new-tokens", 2, "--json")
    done = oki("run", "word " * 200, *options)
    assert "the model's context holds 128" in complaint(done, 1)
    asked, reply = stored()
    assert reply.status is Status.FAILED
    assert reply.reason is not None and "context holds 128" in reply.reason
    found = shown(oki("run", "short", "-c", asked.conversation_id, *options))
    assert (found["conversation"], found["steps"]) == (1, 2)


@pytest.mark.parametrize("temperature", [(), ("--temperature", 1)], ids=["greedy", "sampled"])
def test_settings_that_leave_no_token_are_one_clear_line(
    oki: Oki, saved: Save, tmp_path: Path, temperature: tuple[object, ...]
) -> None:
    model = tiny.model("llama")
    model.generation_config.suppress_tokens = list(range(tiny.VOCABULARY))
    folder = saved(tmp_path / "mute", model)
    done = oki("run", "the fox", "--model", folder, *temperature)
    said = complaint(done, 1)
    assert said.startswith("The sampling setting suppression of 300 tokens left no token")
    assert (stored()[-1].status, stored()[-1].reason) == (Status.FAILED, said)


def test_weights_that_are_not_numbers_are_one_clear_line(
    oki: Oki, saved: Save, tmp_path: Path
) -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    folder = saved(tmp_path / "nan", model)
    said = complaint(oki("run", "the fox", "--model", folder), 1)
    assert "not finite" in said
    assert (stored()[-1].status, stored()[-1].reason) == (Status.FAILED, said)


# ------------------------------------------------------- the model of a conversation


def test_a_conversation_goes_on_with_its_own_model(oki: Oki, small: Path) -> None:
    """Not with the default one, and loaded as it was."""
    options = ("--max-new-tokens", 2, "--json")
    shown(oki("run", "one", "--model", small, "--dtype", "float32", "--device", "cpu", *options))
    shown(oki("run", "two", "-c", 1, *options))
    first, second = (m.choice for m in stored() if m.role is Role.ASSISTANT)
    assert first is not None and first.dtype == "float32"
    assert second == first
    shown(oki("run", "three", "-c", 1, "--dtype", "bfloat16", *options))
    third = stored()[-1]
    assert third.choice == replace(first, dtype="bfloat16")
    assert third.capture is not None and third.capture.dtype == "bfloat16"


def test_a_model_that_never_spoke_is_not_the_conversations(oki: Oki, small: Path) -> None:
    options = ("--max-new-tokens", 2, "--json")
    shown(oki("run", "one", "--model", small, *options))
    with TraceWriter(Settings.from_environment().db) as writer:
        choice = ModelChoice("./no/such/folder")
        reply = writer.queue_reply(1, choice, Sampling(), CapturePolicy(), claim=True)
        writer.finish_reply(reply, TurnEnd(Status.FAILED, "", "There is no such model.", 0.0))
    assert shown(oki("run", "two", "-c", 1, *options))["steps"] == 2
    assert stored()[-1].model_id == str(small)


def test_a_model_that_is_named_is_taken(
    oki: Oki, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-new-tokens", 2)
    other = models.save_small(tmp_path / "other")
    assert oki("run", "one", "--model", small, *options).status == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("two"))
    assert oki("chat", "-c", 1, *options).status == 0
    assert oki("run", "three", "-c", 1, "--model", other, *options).status == 0
    told = [m.model_id for m in stored() if m.role is Role.ASSISTANT]
    assert told == [str(small), str(small), str(other)]


# --------------------------------------------------------------- what was replaced


def test_beam_search_is_replaced_and_the_reply_says_so(
    oki: Oki, saved: Save, tmp_path: Path
) -> None:
    model = tiny.model("llama")
    model.generation_config.num_beams = 4
    folder = saved(tmp_path / "beams", model)
    done = oki("run", "the fox", "--model", folder, "--max-new-tokens", 3)
    assert (done.status, done.err) == (0, "")
    assert " · greedy in place of beam search · " in done.lines[-1]
    assert " · greedy in place of beam search · " in oki("show", 1).out


# ------------------------------------------------------------------------- chat


def test_chat_takes_turns_from_a_pipe(small: Path) -> None:
    options = ("--model", small, "--max-new-tokens", 4, "--system", "be brief")
    done = start("chat", *options, said="one\ntwo\n\nnever said\n")
    assert (done.status, done.err) == (0, "")
    assert not ACTIVE.search(done.out)
    summaries = [line for line in done.lines if line.startswith("complete (")]
    assert len(summaries) == 2 and summaries[1].endswith("conversation 1, message 5")
    messages = stored()
    assert [(str(m.role), m.tokens) for m in messages] == [
        ("system", 0),
        ("user", 0),
        ("assistant", 4),
        ("user", 0),
        ("assistant", 4),
    ]
    assert [m.content for m in messages if m.role is Role.USER] == ["one", "two"]
    with TraceReader(Settings.from_environment().db) as reader:
        assert len(reader.conversations()) == 1
        assert "user: one\n" in reader.prompt(messages[-1].id).text


def test_chat_goes_on_with_a_conversation_and_ends_where_its_input_does(
    oki: Oki, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", small, "--max-new-tokens", 2)
    assert oki("run", "one", *options).status == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("two"))
    assert oki("chat", "-c", 1, *options).status == 0
    assert [m.content for m in stored() if m.role is Role.USER] == ["one", "two"]
