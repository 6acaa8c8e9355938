"""Models that think and call tools, from the command line: parts are stored and used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from oki_trace.llm.chat.prompt import render
from oki_trace.llm.loading import load
from oki_trace.records import ChatMessage, Role, TemplateOptions
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import models
from oki_trace.store.writing.writer import TraceWriter
from tests import scripted
from tests.cli.commands import Oki
from tests.llm.test_parts import HARMONY, HARMONY_TOKENS, THINK, WEATHER, segments, tokenizer

HARMONY_REPLY = (
    "<|channel|>analysis<|message|>User asks capital.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Paris."
)
WITHOUT_TOOLS = "{% for m in messages %}<s>{{ m.content }}{% endfor %}<s>assistant: "
CALLING = (
    "<think>\nI look it up.\n</think>\n\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def folder_of(
    tmp_path: Path, made: Any, reply: str, options: TemplateOptions | None = None
) -> Path:
    """A model that answers "Capital?" with this reply, and any other prompt with nothing."""
    made.eos_token = "</s>"
    prompt = render(made, [ChatMessage(Role.USER, "Capital?")], options=options)
    return scripted.save(tmp_path / "model", made, {len(prompt): reply})


def run(oki: Oki, *arguments: Any) -> dict[str, Any]:
    done = oki("run", *arguments, "--json")
    assert done.status == 0, done.err
    return dict(json.loads(done.out.splitlines()[-1]))


def test_harmony_is_thinking_and_answer_in_the_store_and_in_turn_two(
    tmp_path: Path, oki: Oki
) -> None:
    made = tokenizer(HARMONY, *HARMONY_TOKENS)
    folder, db = folder_of(tmp_path, made, HARMONY_REPLY), tmp_path / "s.db"
    first = run(oki, "Capital?", "--model", folder, "--db", db)
    assert first["output"] == "Paris."
    assert [(p["kind"], p["text"]) for p in first["parts"]] == [
        ("thinking", "User asks capital."),
        ("answer", "Paris."),
    ]
    second = run(oki, "And Italy?", "-c", first["conversation"], "--db", db)
    with TraceReader(db) as reader:
        kept = reader.message(first["message"])
        assert kept.content == "Paris." and kept.parts[-1].end == kept.tokens
        prompt = reader.prompt(second["message"])
        right = [
            {"role": "user", "content": "Capital?"},
            {"role": "assistant", "content": "Paris.", "thinking": "User asks capital."},
            {"role": "user", "content": "And Italy?"},
        ]
        assert prompt.text == made.apply_chat_template(
            right, tokenize=False, add_generation_prompt=True
        )
    shown = oki("show", 1, "--db", db)
    assert "User asks capital." in shown.out and "\nParis.\n" in shown.out


def test_a_tool_is_called_and_answered(tmp_path: Path, oki: Oki) -> None:
    options = TemplateOptions({"enable_thinking": True}, (WEATHER,))
    made = tokenizer(THINK, "<|im_end|>")
    folder = folder_of(tmp_path, made, CALLING, options)
    db, tools = tmp_path / "s.db", tmp_path / "tools.json"
    tools.write_text(json.dumps([WEATHER["function"]]))
    first = run(
        oki,
        *("Capital?", "--model", folder, "--db", db, "--tools", tools),
        *("--template-arg", "enable_thinking=true"),
    )
    assert first["output"] == ""
    call = first["parts"][1]
    assert (call["name"], call["arguments"]) == ("get_weather", {"city": "Rome"})
    wrong = oki("run", "18", "-c", 1, "--tool-result", "get_wether", "--db", db)
    assert wrong.status == 2 and "did not call 'get_wether'" in wrong.err
    second = run(oki, "18 degrees", "-c", 1, "--tool-result", "get_weather", "--db", db)
    with TraceReader(db) as reader:
        reply = reader.message(second["message"])
        assert reply.template == options
        found = segments(reader.prompt(second["message"]))
        assert found["tool"] == "18 degrees" and found["thinking"] == "I look it up."
        assert found["tool_call"].startswith("get_weather")
        said = reader.messages(1)[2]
        assert (said.role, said.tool_name) == (Role.TOOL, "get_weather")
    shown = oki("show", 1, "--db", db).out
    assert 'tool call: get_weather(city="Rome")' in shown and "tool get_weather" in shown
    again = oki("run", "19", "-c", 1, "--tool-result", "get_weather", "--db", db)
    assert again.status == 2 and "no tool call that waits" in again.err


@pytest.mark.parametrize("format", ["json", "jsonl", "parquet"])
def test_parts_template_and_tool_come_back_from_an_export(
    tmp_path: Path, oki: Oki, format: str
) -> None:
    made = tokenizer(THINK, "<|im_end|>")
    folder = folder_of(tmp_path, made, CALLING, TemplateOptions({}, (WEATHER,)))
    db, tools, copy = tmp_path / "s.db", tmp_path / "tools.json", tmp_path / "copy.db"
    tools.write_text(json.dumps({"tools": [WEATHER]}))
    run(oki, "Capital?", "--model", folder, "--db", db, "--tools", tools)
    run(oki, "18 degrees", "-c", 1, "--tool-result", "get_weather", "--db", db)
    out = tmp_path / "out"
    done = oki("export", "-c", 1, "--format", format, "--output", out, "--db", db)
    assert done.status == 0, done.err
    done = oki("import", out, "--db", copy)
    assert done.status == 0, done.err
    with TraceReader(db) as before, TraceReader(copy) as after:
        for one, other in zip(before.messages(1), after.messages(1), strict=True):
            for name in ("role", "content", "parts", "template", "tool_name"):
                assert getattr(one, name) == getattr(other, name)


def test_a_reply_whose_process_was_killed_is_read_in_parts_for_the_next_turn(
    tmp_path: Path, oki: Oki
) -> None:
    """Nobody was left to tell its parts: they are in its tokens."""
    made = tokenizer(HARMONY, *HARMONY_TOKENS)
    folder, db = folder_of(tmp_path, made, HARMONY_REPLY), tmp_path / "s.db"
    first = run(oki, "Capital?", "--model", folder, "--db", db)
    with TraceWriter(db) as writer, writer.write() as connection:
        values = {"parts": None, "content": "analysisUser asks capital.assistantfinalParis."}
        connection.execute(
            update(models.Message).where(models.Message.id == first["message"]).values(**values)
        )
    second = run(oki, "And Italy?", "-c", 1, "--db", db)
    with TraceReader(db) as reader:
        assert segments(reader.prompt(second["message"]))["assistant"] == "Paris."


def test_slips_are_one_line(tmp_path: Path, oki: Oki) -> None:
    made = tokenizer(THINK, "<|im_end|>")
    folder, db = folder_of(tmp_path, made, "Paris."), tmp_path / "s.db"
    oki("info", "--db", db)  # what saving the model printed is not the commands'
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    for arguments, words in (
        (["--template-arg", "enable_thinking"], "is not KEY=VALUE"),
        (["--template-arg", "tokenize=true"], "tokenize is no argument of a chat template"),
        (["--template-arg", "enable_thinkng=true"], "has no argument enable_thinkng"),
        (["--tools", bad], "is not a JSON list of tool schemas"),
        (["--tools", tmp_path / "none.json"], "cannot be read"),
        (["--tool-result", "f"], "Name it with --conversation"),
    ):
        done = oki("run", "Capital?", "--model", folder, "--db", db, *arguments)
        assert done.status in (1, 2) and words in done.err, done.err
        assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (THINK, ("--template-arg", "enable_thinkng=true"), "has no argument enable_thinkng"),
        (WITHOUT_TOOLS, ("--tools", "tools.json"), "accepts no tools. Leave out --tools"),
    ],
)
def test_a_refused_template_option_stores_nothing_and_reads_no_weights(
    tmp_path: Path,
    oki: Oki,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    folder, db = folder_of(tmp_path, tokenizer(template), "Paris."), tmp_path / "s.db"
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    oki("info", "--db", db)  # what saving the model printed is not the commands'
    monkeypatch.setattr(load, "_model", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.chdir(tmp_path)
    done = oki("run", "Capital?", "--model", folder, "--db", db, *arguments)
    assert done.status == 1 and words in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert json.loads(oki("list", "--json", "--db", db).out) == []
