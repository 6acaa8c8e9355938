"""``list``, ``show``, ``info``, ``export`` and ``migrate``, with hostile text too."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.cli import main
from oki_trace.errors import NotFound
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Prompt,
    Role,
    Sampling,
    Status,
    TurnEnd,
)
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.cli.commands import ACTIVE, ROOT, Done, Oki, command, start
from tests.cli.conftest import Demo

HOSTILE = "\x1b[31mred\x1b[0m \x9b2J \x00 \r\x08\x7f \u202eltr\u202c \u200b\u2028 \x1b]0;title\x07"


@dataclass
class OwnStore:
    """A store of this test alone."""

    writer: TraceWriter

    def tell(self, title: str, said: str, *, reply: str = " the", reason: str = "x") -> int:
        """A conversation with one reply of three steps."""
        conversation = self.writer.create_conversation(title)
        self.writer.add_message(conversation, ChatMessage(Role.USER, said))
        message = self.writer.queue_reply(
            conversation, ModelChoice(said), Sampling(), CapturePolicy(), claim=True
        )
        start = builders.turn_start("none")
        given = Prompt(said, (1, 2, 3), (said,) * 3, ("user",) * 3)
        report = replace(start.capture, evidence_provenance=said, lens_reason=said)
        started = replace(start, model_id=said, prompt=given, capture=report)
        self.writer.start_reply(message, started)
        rng = np.random.default_rng(0)
        for i in range(3):
            step = builders.step(
                i, rng, prompt_len=3, token=reply, with_lens=True, with_tensors=False
            )
            self.writer.append(message, [step])
        self.writer.finish_reply(message, TurnEnd(Status.COMPLETE, reply * 3, reason, 1.0))
        return conversation


@pytest.fixture
def own() -> Iterator[OwnStore]:
    with TraceWriter(Settings.from_environment().db) as writer:
        yield OwnStore(writer)


# What an export says when the full tensors stay behind.
LEFT_OUT = "oki-trace: The full tensors are left out: --tensors writes them next to the file.\n"


def shown(done: Done) -> Any:
    """The JSON that is all a command wrote."""
    assert done.status == 0
    assert done.err in ("", LEFT_OUT)
    return json.loads(done.out)


def plain(done: Done) -> list[str]:
    """The lines of a command's output for people, checked to be inert."""
    assert (done.status, done.err) == (0, "")
    assert not ACTIVE.search(done.out)
    return done.lines


# -------------------------------------------------------------------- list, info


def test_list(oki: Oki, demo: Demo) -> None:
    lines = plain(oki("list", "--db", demo.db))
    assert lines[0].split() == ["id", "when", "title", "model", "messages", "tokens", "status"]
    (found,) = shown(oki("list", "--db", demo.db, "--json"))
    changed = dt.datetime.fromisoformat(found["updated_at"]).astimezone()
    (row,) = lines[1:]
    assert re.split(r"  +", row.strip()) == [
        "1",
        f"{changed:%Y-%m-%d %H:%M}",
        "What is the capital of France?",
        "smollm2",
        "4",
        str(found["tokens"]),
        "complete",
    ]
    assert {**found, "created_at": "", "updated_at": "", "tokens": 0} == {
        "id": 1,
        "title": "What is the capital of France?",
        "created_at": "",
        "updated_at": "",
        "messages": 4,
        "tokens": 0,
        "status": "complete",
        "model_ids": ["smollm2"],
    }
    assert found["created_at"] <= found["updated_at"] and found["tokens"] > 10


def test_list_searches_and_limits(oki: Oki, own: OwnStore) -> None:
    for number in range(3):
        own.tell(f"Talk {number}", f"about {number}")
    assert [c["title"] for c in shown(oki("list", "--json", "--limit", 2))] == ["Talk 2", "Talk 1"]
    assert [c["title"] for c in shown(oki("list", "--json", "-s", "ABOUT 1"))] == ["Talk 1"]
    assert shown(oki("list", "--json", "--search", "nowhere")) == []
    assert plain(oki("list", "--search", "nowhere")) == [
        "No conversations. Begin one with: oki-trace demo"
    ]


def test_info(oki: Oki, demo: Demo) -> None:
    found = shown(oki("info", "--db", demo.db, "--json"))
    assert (found["conversations"], found["messages"]) == (1, 4)
    assert found["url"] == str(demo.db)
    # The tokens of the prompt keep no full tensors.
    with TraceReader(demo.db) as reader:
        sampled = sum(message.tokens for message in reader.messages(1))
    assert 0 < sampled < found["steps"]
    assert found["bytes"] >= found["tensor_bytes"] > 100_000 * sampled
    data = found["row_bytes"] + found["tensor_bytes"]
    assert found["bytes_per_token"] == data / found["steps"]
    assert found["bytes"] >= data, "the log and free room are no data"
    pairs = dict(
        re.split(r"  +", line.strip(), maxsplit=1) for line in plain(oki("info", "--db", demo.db))
    )
    assert pairs["store"] == str(demo.db)
    assert (pairs["conversations"], pairs["messages"]) == ("1", "4")
    assert pairs["steps"] == str(found["steps"])


# -------------------------------------------------------------------------- show


def test_show_a_conversation(oki: Oki, demo: Demo) -> None:
    lines = plain(oki("show", 1, "--db", demo.db))
    with TraceReader(demo.db) as reader:
        messages = reader.messages(1)
        steps = [step for m in messages for step in reader.iter_steps(m.id)]
    for message in messages:
        at = lines.index(f"{message.role} · message {message.id}")
        assert lines[at + 1] == message.content
    rows = [line for line in lines if re.match(r" *\d+  \S+ +\d\.\d{3}  ", line)]
    assert len(rows) == len(steps)
    for row, step in zip(rows, steps, strict=True):
        number, token, prob = row.split()[:3]
        assert (number, prob) == (str(step.step_index), f"{step.prob:.3f}")
        assert token == step.token.replace(" ", "␣").replace("\n", "⏎")


def test_show_one_message(oki: Oki, demo: Demo) -> None:
    document = shown(oki("show", 1, "--json", "--db", demo.db))
    assert document == shown(oki("export", "--conversation", 1, "--db", demo.db))
    one = shown(oki("show", 1, "--message", 2, "--json", "--db", demo.db))
    assert one["messages"] == [document["messages"][1]]
    lines = plain(oki("show", 1, "--message", 2, "--db", demo.db))
    assert [line for line in lines if "· message" in line] == ["assistant · message 2"]


def test_show_one_step(oki: Oki, demo: Demo) -> None:
    options = ("--message", 2, "--step", 3, "--db", demo.db)
    step = shown(oki("show", 1, *options, "--json"))
    document = shown(oki("show", 1, "--message", 2, "--json", "--db", demo.db))
    assert step == document["messages"][0]["trace"]["steps"][3]
    lines = plain(oki("show", 1, *options))
    assert lines[0].split()[:3] == ["step", "3", step["chosen_token"].replace(" ", "␣")]
    assert f" prob {step['prob']:.4f} · rank 1 ·" in lines[0]
    layers = [line.split()[0] for line in lines[lines.index("") :] if re.match(r" *\d+ ", line)]
    assert layers == [str(layer) for layer in range(30, -1, -1)]
    for entry in (*step["logits_topk"], *step["evidence"]):
        assert f"{entry.get('prob', entry.get('weight')):.4f}" in "\n".join(lines)
    with TraceReader(demo.db) as reader:
        message = reader.message(2)
    capture = message.capture
    assert capture is not None and message.lens_check is not None
    assert f"lens check {message.lens_check:.0e}" in lines
    assert f"attention check {capture.attention_check:.0e}" in lines


def test_why_a_token_was_drawn(oki: Oki, small: Path) -> None:
    hot = ("--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.2)
    oki("run", "the fox", "--model", small, "--max-new-tokens", 12, "--seed", 1, *hot)
    (reply,) = (m for m in shown(oki("show", 1, "--json"))["messages"] if "trace" in m)
    differing = 0
    for step in reply["trace"]["steps"]:
        decision = step["decision"]
        lines = plain(oki("show", 1, "--step", step["step"]))
        assert lines[1].startswith(f"Sampled with probability {said(step['sampled_prob'])} from ")
        assert f"noise {decision['noise']:+.2f} " in lines[1]
        differs = decision["greedy"]["token_id"] != step["chosen_id"]
        assert decision["differs_from_greedy"] is differs
        assert lines[1].endswith("the same token.") is not differs
        differing += differs
        processors = [(p["name"], p["setting"]) for p in decision["processors"]]
        assert processors == [
            ("repetition penalty", "1.2"),
            ("temperature", "1.5"),
            ("top-k", "40"),
            ("top-p", "0.9"),
        ]
        (row,) = (line for line in lines if line.startswith("top-k 40"))
        assert row.split()[2:4] == ["260", said(decision["processors"][2]["removed_mass"])]
        score = math.log(step["sampled_prob"]) + decision["noise"]
        for other in (decision["runner_up"], *(decision["greedy"],) * differs):
            assert score > math.log(other["sampled_prob"]) + other["noise"]
    assert differing, "no step was drawn against greedy: nothing was tested"


def said(prob: float) -> str:
    return f"{prob:.3f}" if prob >= 0.1 else f"{prob:.3g}"


def test_without_a_message_the_last_reply_is_meant(oki: Oki, demo: Demo) -> None:
    last = shown(oki("show", 1, "--step", 0, "--json", "--db", demo.db))
    assert last == shown(oki("show", 1, "--step", 0, "--message", 4, "--json", "--db", demo.db))


@pytest.mark.parametrize(
    ("arguments", "complains"),
    [
        (("show", 9), "There is no conversation 9 in this store: `oki-trace list` shows them."),
        (("show", 1, "--message", 9), "Conversation 1 has no message 9. See: oki-trace show 1"),
        (("show", 1, "--step", 999), "Message 4 has no step 999"),
        (("show", 1, "--step", -1), "Message 4 has no step -1"),
        (("show", 1, "--message", 1, "--step", 0), "Conversation 1 has no reply there"),
        (("export", "--conversation", 9), "There is no conversation 9 in this store"),
        (("export", "-c", 1, "--message", 9), "Conversation 1 has no traced message 9"),
        (("export", "-c", 1, "--message", 1), "Conversation 1 has no traced message 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
def test_what_is_not_there_is_one_line(
    oki: Oki, demo: Demo, arguments: tuple[object, ...], complains: str, as_json: bool
) -> None:
    wanted = ("--json",) if as_json and arguments[0] == "show" else ()
    done = oki(*arguments, *wanted, "--db", demo.db)
    assert (done.status, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"oki-trace: {complains}")


@pytest.mark.parametrize("name", ["list", "info", "show", "export"])
def test_a_store_that_is_not_there_is_not_made(oki: Oki, tmp_path: Path, name: str) -> None:
    rest = {"show": ("1",), "export": ("-c", "1")}.get(name, ())
    done = oki(name, *rest, "--db", tmp_path / "none.db")
    assert (done.status, done.out) == (1, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"oki-trace: There is no trace store at {tmp_path / 'none.db'}")
    assert "oki-trace demo" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_store_is_left_alone(oki: Oki, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("not a database, but long enough to be looked at" * 9)
    before = precious.read_bytes()
    for arguments in (["list"], ["migrate"], ["run", "x", "--model", "./none"]):
        done = oki(*arguments, "--db", precious)
        assert done.status == 1
        assert "is not an oki-trace store, so it was not changed" in done.err
    assert precious.read_bytes() == before


def test_debug_shows_where(demo: Demo) -> None:
    quiet = start("show", 9, "--db", demo.db)
    loud = start("show", 9, "--db", demo.db, "--debug")
    assert (quiet.status, loud.status) == (1, 1)
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err and "NotFound" in loud.err
    with pytest.raises(NotFound):
        main(["--debug", "show", "9", "--db", str(demo.db)])


# ------------------------------------------------------------------------ export


def test_export_to_a_file(oki: Oki, demo: Demo, tmp_path: Path) -> None:
    path = tmp_path / "paris.json"
    done = oki("export", "--conversation", 1, "--output", path, "--db", demo.db)
    assert (done.status, done.out) == (0, "")
    assert done.err == f"{LEFT_OUT}oki-trace: wrote {path}\n"
    document = json.loads(path.read_text())
    assert document == shown(oki("export", "--conversation", 1, "--db", demo.db))
    assert "Paris" in document["messages"][1]["content"]
    one = shown(oki("export", "--conversation", 1, "--message", 2, "--db", demo.db))
    assert one == document["messages"][1]["trace"]


def test_an_export_that_fails_leaves_what_was_there(oki: Oki, demo: Demo, tmp_path: Path) -> None:
    path = tmp_path / "paris.json"
    path.write_text("precious")
    assert oki("export", "-c", 9, "-o", path, "--db", demo.db).status == 1
    assert [p.read_text() for p in tmp_path.iterdir()] == ["precious"]
    done = oki("export", "-c", 1, "-o", tmp_path / "none" / "x.json", "--db", demo.db)
    assert done.status == 1
    assert "Choose another --output" in done.err


def test_an_unknown_format_exits_2(oki: Oki, demo: Demo) -> None:
    assert oki("export", "-c", 1, "--format", "pdf", "--db", demo.db).status == 2


# ----------------------------------------------------------------------- migrate


def test_migrate_makes_a_store_and_leaves_one_that_is_up_to_date(oki: Oki, tmp_path: Path) -> None:
    db = tmp_path / "new.db"
    first = shown(oki("migrate", "--db", db, "--json"))
    assert first["store"] == str(db) and first["before"] is None
    again = shown(oki("migrate", "--db", db, "--json"))
    assert again == {**first, "before": first["schema"]}
    (line,) = plain(oki("migrate", "--db", db))
    assert line == f"{db} is up to date (schema {first['schema']})."
    (line,) = plain(oki("migrate", "--db", tmp_path / "other.db"))
    assert line == f"{tmp_path / 'other.db'} created (schema {first['schema']})."
    assert shown(oki("list", "--db", db, "--json")) == []


# -------------------------------------------------------------------- inert text


def test_hostile_text_is_shown_inert(oki: Oki, own: OwnStore) -> None:
    """No text of a model or of a stranger's store may act on the terminal that shows it."""
    number = own.tell(f"Title {HOSTILE}", HOSTILE, reply=HOSTILE, reason=HOSTILE)
    outputs = {
        "list": plain(oki("list")),
        "show": plain(oki("show", number)),
        "step": plain(oki("show", number, "--step", 0)),
    }
    for name, lines in outputs.items():
        text = "\n".join(lines)
        # Shown, not swallowed: each by a symbol or by its number.
        assert "␛[31mred␛[0m" in text.replace("␣", " "), name
        for symbol in ("<U+009B>", "␍␈<U+007F>", "<U+202E>", "<U+200B><U+2028>", "␇"):
            assert symbol in text, (name, symbol)
    for done in (
        oki("list", "--json"),
        oki("show", number, "--json"),
        oki("show", number, "--step", 0, "--json"),
        oki("export", "--conversation", number),
    ):
        assert done.out.isascii() and not ACTIVE.search(done.out)
        assert contains(shown(done), HOSTILE)


def contains(document: Any, text: str) -> bool:
    """Whether ``text`` is in some string of the document, as the store keeps it."""
    if isinstance(document, dict):
        return any(contains(value, text) for value in document.values())
    if isinstance(document, list):
        return any(contains(value, text) for value in document)
    return isinstance(document, str) and text.replace("\0", "␀") in document


def test_names_are_text_and_not_markup(oki: Oki, tmp_path: Path) -> None:
    """Rich would take [bold] for a tag and :smile: for a picture."""
    db = tmp_path / "[bold] :smile: [/nothing]" / "store.db"
    assert str(db) in plain(oki("migrate", "--db", db))[0]
    assert str(db) in "\n".join(plain(oki("info", "--db", db)))
    with TraceWriter(db) as writer:
        OwnStore(writer).tell("[red]x[/red] :smile:", "[link=http://x]y[/link]", reply="[b]")
    assert "[red]x[/red] :smile:" in "\n".join(plain(oki("list", "--db", db)))
    assert "[link=http://x]y[/link]" in plain(oki("show", 1, "--db", db))
    done = oki("show", 9, "--db", tmp_path / "[/none]" / "store.db")
    assert f"There is no trace store at {tmp_path}/[/none]/store.db" in done.err


def test_nothing_is_cut_or_wrapped_for_a_pipe(oki: Oki, own: OwnStore) -> None:
    word = "wide" * 6_000
    number = own.tell("t" * 500, f"{word} {word}", reply="r" * 300)
    assert f"{word} {word}" in plain(oki("show", number))
    assert "t" * 500 in plain(oki("list"))[1]
    assert "r" * 300 in "\n".join(plain(oki("show", number, "--step", 0)))


def test_an_output_that_cannot_hold_a_character_does_not_end_a_command(demo: Demo) -> None:
    """A pipe on Windows, or LANG=C, is not UTF-8."""
    done = subprocess.run(
        command("show", 1, "--db", demo.db),
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii() and b"\\u2423" in done.stdout, "the sign for a space"
