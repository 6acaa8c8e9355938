"""``score`` and ``--trace-prompt``: the tokens of a given text, printed and stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oki_trace import load_model_and_tokenizer, run_traced, score_traced, tracing
from oki_trace.errors import CaptureError, UsageError
from oki_trace.likelihood import Score, score_of
from oki_trace.records import ReplyChecks
from oki_trace.settings import Settings
from oki_trace.store.reading.reader import TraceReader
from tests.cli.commands import Oki

TEXT = "The capital of France is Paris. Übung 🙂 makes perfect."


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Any, Any]:
    """The built-in model and its tokenizer."""
    return load_model_and_tokenizer(str(smollm2_dir), use_4bit=False)


def plain_logprobs(model: Any, ids: list[int]) -> list[float]:
    """Teacher forcing with plain transformers: the logprob of each token but the first."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    rows = logits.log_softmax(-1)
    return [float(rows[at - 1, ids[at]]) for at in range(1, len(ids))]


def test_a_score_is_that_of_plain_transformers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    trace = score_traced(TEXT, model=model, tokenizer=tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert trace["prompt_token_ids"] == ids and trace["output"] == TEXT
    assert trace["steps"] == []
    steps = trace["prompt_steps"]
    assert [step["position"] for step in steps] == list(range(1, len(ids)))
    assert all(step["origin"] == "given" and step["step"] is None for step in steps)
    logprobs = [step["logprob"] for step in steps]
    assert logprobs == pytest.approx(plain_logprobs(model, ids), abs=1e-4)
    assert len(steps[0]["logit_lens"]) == model.config.num_hidden_layers + 1
    assert "".join(step["chosen_token"] for step in steps[:5]) == " capital of France is Paris"


def test_messages_are_scored_in_the_chat_template(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    messages = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    db = tmp_path / "store.db"
    trace = score_traced(messages=messages, model=model, tokenizer=tokenizer, db=db)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, continue_final_message=True)
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    assert trace["prompt_token_ids"] == ids
    expected = plain_logprobs(model, ids)
    assert [s["logprob"] for s in trace["prompt_steps"]] == pytest.approx(expected, abs=1e-4)
    assert trace["prompt_segments"][-1] == "assistant"
    with TraceReader(db) as reader:
        (message,) = reader.messages(1)
        assert message.content == "It is 4." and message.tokens == 0
        assert len(reader.steps(message.id, given=True)) == len(ids) - 1


def test_a_traced_prompt_has_a_step_for_each_token_and_the_same_reply(
    smollm2: tuple[Any, Any],
) -> None:
    model, tokenizer = smollm2
    options: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 4}
    text, plain = run_traced("Name a colour.", trace_prompt="none", **options)
    again, trace = run_traced("Name a colour.", trace_prompt="light", **options)
    assert again == text and plain["prompt_steps"] == []
    assert [s["chosen_id"] for s in trace["steps"]] == [s["chosen_id"] for s in plain["steps"]]
    steps = trace["prompt_steps"]
    assert [step["position"] for step in steps] == list(range(1, trace["prompt_len"]))
    expected = plain_logprobs(model, trace["prompt_token_ids"])
    assert [step["logprob"] for step in steps] == pytest.approx(expected, abs=1e-4)
    assert all(len(layer["topk"]) == 1 for step in steps for layer in step["logit_lens"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "exactly one of text and messages"),
        ({"text": "a", "messages": []}, "exactly one of text and messages"),
        ({"text": "a\0b"}, "holds a NUL"),
        ({"text": "a\ud800b"}, "not UTF-8"),
        ({"text": "a b c", "window": 4, "stride": 4}, "does not fit a window"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    smollm2: tuple[Any, Any], arguments: dict[str, Any], error: str
) -> None:
    model, tokenizer = smollm2
    with pytest.raises(UsageError, match=error):
        score_traced(model=model, tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize(("text", "error"), [("", "no tokens"), ("Hello", "one token")])
def test_a_text_without_a_second_token_is_refused(
    smollm2: tuple[Any, Any], text: str, error: str
) -> None:
    model, tokenizer = smollm2
    with pytest.raises(CaptureError, match=error):
        score_traced(text, model=model, tokenizer=tokenizer)


def test_a_special_token_spelled_in_a_text_is_that_token(smollm2: tuple[Any, Any]) -> None:
    """As everywhere in Hugging Face: the tokenizer reads the spelling as the token."""
    model, tokenizer = smollm2
    trace = score_traced("Hello <|im_end|> there", model=model, tokenizer=tokenizer)
    special = [step for step in trace["prompt_steps"] if step["is_special"]]
    assert [step["chosen_token"] for step in special] == ["<|im_end|>"]


def test_the_command_prints_each_token_and_the_totals(oki: Oki) -> None:
    done = oki("score", TEXT)
    assert done.status == 0 and done.err == ""
    assert done.lines[0].split() == ["position", "token", "logprob", "rank"]
    assert "perplexity" in done.lines[-1] and "bits per byte" in done.lines[-1]
    assert "conversation 1, message 1" in done.lines[-1]
    assert oki("verify").status == 0


def test_the_totals_follow_from_the_tokens(oki: Oki, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    done = oki("score", "--file", file, "--json")
    assert done.status == 0
    told = json.loads(done.out)
    logprobs = [step["logprob"] for step in told["steps"]]
    assert told["tokens"] == len(logprobs) and told["status"] == "complete"
    assert told["logprob"] == pytest.approx(sum(logprobs))
    assert told["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)))
    first = len("The")
    assert told["bytes"] == len(TEXT.encode()) - first
    bits = -sum(logprobs) / math.log(2) / told["bytes"]
    assert told["bits_per_byte"] == pytest.approx(bits)


def test_a_score_of_no_or_of_an_impossible_token_is_defined() -> None:
    """A text whose scoring was stopped at once, and one whose perplexity overflows."""
    assert math.isnan(score_of([]).perplexity) and math.isnan(score_of([]).bits_per_byte)
    assert Score(1, 1, -1e6).perplexity == math.inf


def test_a_stop_before_the_first_token_prints_and_stores_what_there_is(
    oki: Oki, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*arguments: Any, **options: Any) -> Iterator[ReplyChecks]:
        options["should_stop"]()
        yield ReplyChecks(())

    monkeypatch.setattr(tracing, "teacher_force", nothing)
    for more in ((), ("--json",)):
        done = oki("score", TEXT, *more)
        assert (done.status, done.err) == (0, "")
        assert "0 tokens" in done.out or json.loads(done.out)["perplexity"] is None


def test_a_stored_reply_scores_as_it_was_generated(oki: Oki) -> None:
    assert oki("run", "Name a colour.", "--max-new-tokens", "5").status == 0
    told = json.loads(oki("score", "--message", "2", "--json").out)
    assert told["score_of"] == 2 and told["tokens"] == 5
    for step in told["steps"]:
        assert step["logprob"] == pytest.approx(step["logprob_in_reply"], abs=1e-3)
    done = oki("score", "--message", "2")
    assert "in the reply" in done.lines[0] and "in the reply" in done.lines[-1]
    with TraceReader(Settings.from_environment().db) as reader:
        assert reader.message(told["message"]).score_of == 2


def test_a_second_turn_traces_what_is_new_in_its_prompt(oki: Oki) -> None:
    options = ("--max-new-tokens", "4", "--trace-prompt", "light")
    assert oki("run", "Name a colour.", *options).status == 0
    assert oki("run", "And another?", "--conversation", "1", *options).status == 0
    with TraceReader(Settings.from_environment().db) as reader:
        first, second = (m for m in reader.messages(1) if m.prompt_len is not None)
        steps = reader.prompt_steps(second.id)
        assert list(steps) == list(range(1, second.prompt_len or 0))
        own = [at for at, step in steps.items() if step.message_id == second.id]
        assert own == [s.position for s in reader.steps(second.id, given=True)]
        shared = (first.prompt_len or 0) + first.tokens
        assert own[0] >= shared - 1
        prompt = reader.prompt(second.id)
        assert [step.step.token_id for step in steps.values()] == list(prompt.token_ids[1:])
    assert oki("verify").status == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "Give exactly one of a text, --file and --message."),
        (("a", "--message", 1), "Give exactly one of a text, --file and --message."),
        (("",), "The text is empty."),
        (("a b", "--stride", 3), "A stride needs a window."),
        (("a b", "--window", 3, "--stride", 3), "does not fit a window"),
        (("--file", "no-such-file"), "no-such-file cannot be read"),
    ],
)
def test_wrong_usage_is_one_line(oki: Oki, arguments: tuple[Any, ...], error: str) -> None:
    done = oki("score", *arguments)
    assert done.status == 2 and done.out == ""
    assert error in done.err and len(done.err.splitlines()) == 1


def test_a_text_longer_than_the_context_names_the_windows(oki: Oki) -> None:
    long = "word " * 9000
    done = oki("score", long)
    assert done.status == 1 and "--window 8192 --stride 4096" in done.err
    assert oki("list", "--json").out.strip() == "[]"


def test_windows_score_a_long_text(oki: Oki) -> None:
    arguments = ("the cat sat on the mat and " * 12, "--window", 32, "--stride", 16)
    done = oki("score", *arguments, "--json")
    told = json.loads(done.out)
    assert done.status == 0
    assert [step["position"] for step in told["steps"]] == list(range(1, told["tokens"] + 1))
    with TraceReader(Settings.from_environment().db) as reader:
        capture = reader.message(told["message"]).capture
        assert capture is not None and capture.windows == (32, 16)
    assert told["windows"] == [32, 16] and told["model"] == "smollm2"
    for step in told["steps"]:
        assert step["full_context"] == (step["position"] < 32)
        assert step["context"] == step["position"] or 16 <= step["context"] < 32
    lines = oki("score", *arguments).lines
    assert lines[0].split() == ["position", "token", "logprob", "rank", "context"]


def test_a_score_is_listed_with_its_tokens_and_has_no_next_turn(oki: Oki) -> None:
    told = json.loads(oki("score", TEXT, "--json").out)
    (listed,) = json.loads(oki("list", "--json").out)
    assert (listed["tokens"], listed["scored"]) == (0, told["tokens"])
    assert f" {told['tokens']} scored " in oki("list").out
    done = oki("run", "And then?", "--conversation", 1)
    assert done.status == 2 and done.out == ""
    assert done.err == (
        "oki-trace: Conversation 1 is a scored text, which has no next turn. Leave out "
        "--conversation to begin a new conversation.\n"
    )
    assert oki("run", "Hi", "--max-new-tokens", 1).status == 0
    assert "scored" not in json.loads(oki("list", "--json").out)[0]


def test_an_unknown_message_or_a_question_is_refused(oki: Oki) -> None:
    assert oki("run", "Hi", "--max-new-tokens", "1").status == 0
    assert "no message 99" in oki("score", "--message", 99).err
    assert "not a finished reply" in oki("score", "--message", 1).err
