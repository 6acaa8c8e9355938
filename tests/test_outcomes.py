"""However a turn ends, the store has the reason and every decoded step."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Message,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import trace_turn
from tests import tiny

USER = ChatMessage(Role.USER, "the quick brown fox")
ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = tiny.tokenizer()


@dataclass(frozen=True)
class Turn:
    """A reply as the store has it, and what was raised."""

    reply: Message
    steps: list[Step]
    streamed: str
    error: CaptureError | None


def take(
    folder: Path,
    model: Any,
    *,
    said: tuple[ChatMessage, ...] = (USER,),
    sampling: Sampling | None = None,
    tokenizer: Any = None,
) -> Turn:
    """One turn into a store in ``folder``, read back from there."""
    db = folder / "store.db"
    sampling = sampling or Sampling(max_new_tokens=12)
    policy = CapturePolicy(tensors="none")
    made = instrument(model, tokenizer or TOKENIZER)
    pieces: list[str] = []
    error = None
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        conversation = writer.create_conversation("a turn")
        reply = writer.queue_reply(conversation, ModelChoice("m"), sampling, policy, claim=True)
        sinks = [Recorder(writer, reply)]
        try:
            trace_turn(
                made,
                "tiny",
                said,
                sampling,
                policy,
                sinks,
                on_text=lambda text, kind: pieces.append(text),
            )
        except CaptureError as raised:
            error = raised
        return Turn(reader.message(reply), list(reader.iter_steps(reply)), "".join(pieces), error)


def assert_failed(turn: Turn, steps: int, reason: str) -> None:
    """With the reason in one line, and every step decoded before, its lens with it."""
    assert turn.error is not None
    assert (turn.reply.status, turn.reply.reason) == (Status.FAILED, str(turn.error))
    assert reason in str(turn.error)
    assert "\n" not in str(turn.error)
    assert [step.step_index for step in turn.steps] == list(range(steps))
    assert all(step.lens is not None and step.attention for step in turn.steps)
    assert turn.reply.content == turn.streamed.replace("\0", "␀")


def at_pass(model: Any, number: int, act: Callable[[Any], Any]) -> None:
    """Do something to what the model's n-th pass from now on gives, counted from 0."""
    real, passes = model.forward, itertools.count()
    armed = False

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        return act(output) if armed and next(passes) == number else output

    model.forward = forward
    instrument(model, TOKENIZER)  # which takes passes of its own
    armed = True


def with_logits(change: Any) -> Any:
    def act(output: Any) -> Any:
        output.logits = change(output.logits.clone())
        return output

    return act


def one_infinite(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 7] = math.inf
    return logits


BROKEN = {
    "all NaN": lambda logits: logits * math.nan,
    "one +inf": one_infinite,
    "all -inf": lambda logits: torch.full_like(logits, -math.inf),
}


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("kind", BROKEN)
def test_logits_that_are_not_finite(tmp_path: Path, kind: str, step: int, sampled: bool) -> None:
    model = tiny.model("llama")
    at_pass(model, step, with_logits(BROKEN[kind]))
    sampling = Sampling(12, temperature=1.0 if sampled else None, seed=1)
    turn = take(tmp_path, model, sampling=sampling)
    assert_failed(turn, step, f"The model's logits are not finite at step {step}.")


def test_a_token_that_the_model_rules_out_is_no_failure(tmp_path: Path) -> None:
    """-inf is how models say never; then only NaN and +inf are broken."""
    model = tiny.model("llama")

    def rule_out(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.arange(200, 300), -math.inf)

    model.lm_head.register_forward_hook(rule_out)
    turn = take(tmp_path, model, sampling=Sampling(8, temperature=1.5, top_k=0, seed=1))
    assert turn.reply.status is Status.COMPLETE
    for step in turn.steps:
        assert step.decision is not None and step.decision.candidates == 200
        assert math.isfinite(step.entropy)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        ({"suppress_tokens": list(range(tiny.VOCABULARY))}, 0, "suppression of 300 tokens"),
        ({"sequence_bias": [[[9], math.inf]]}, 0, "sequence bias of 1"),
    ],
)
def test_settings_that_leave_no_token(
    tmp_path: Path, config: dict[str, Any], steps: int, words: str, sampled: bool
) -> None:
    model = tiny.model("llama")
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    sampling = Sampling(12, temperature=1.0 if sampled else None, seed=1)
    turn = take(tmp_path, model, sampling=sampling)
    assert_failed(turn, steps, f"The sampling setting {words} left no token to choose.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError(""),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 80000000000 bytes."
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_in_the_middle(tmp_path: Path, error: Exception) -> None:
    model = tiny.model("llama")

    def run_out(output: Any) -> Any:
        raise error

    at_pass(model, 6, run_out)
    turn = take(tmp_path, model)
    assert_failed(turn, 6, "Out of memory while decoding. Shorten the prompt, or load the model")
    # It is over with that turn.
    assert take(tmp_path, model).reply.status is Status.COMPLETE


def test_an_error_that_only_mentions_memory_is_told_as_it_is(tmp_path: Path) -> None:
    model = tiny.model("llama")

    def refuse(output: Any) -> Any:
        raise RuntimeError("unsupported memory format option Preserve")

    at_pass(model, 2, refuse)
    turn = take(tmp_path, model)
    assert_failed(turn, 2, "RuntimeError: unsupported memory format option Preserve")


@pytest.mark.parametrize("where", ["analyze_choice", "summarize"])
def test_a_fault_of_the_capture_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from oki_trace.llm.capture import reduce

    calls = 0
    real = getattr(reduce, where)

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ZeroDivisionError("a fault")
        return real(*args)

    model = tiny.model("llama")
    instrument(model, TOKENIZER)
    monkeypatch.setattr(reduce, where, fail)
    turn = take(tmp_path, model)
    assert turn.error is not None
    assert (turn.reply.status, turn.reply.reason) == (Status.FAILED, str(turn.error))
    assert "ZeroDivisionError: a fault" in str(turn.error)
    assert [step.step_index for step in turn.steps] == list(range(len(turn.steps)))
    assert turn.steps


# --------------------------------------------------------------------- the context


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    said = (ChatMessage(Role.USER, "x" * 200),)
    turn = take(tmp_path, tiny.model("llama"), said=said)
    assert_failed(turn, 0, "tokens, but the model's context holds 128.")


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_reply_that_reaches_the_end_of_the_context(tmp_path: Path, sampled: bool) -> None:
    model = tiny.model("llama")
    model.generation_config.eos_token_id = None
    sampling = Sampling(1000, temperature=1.0 if sampled else None, seed=1)
    turn = take(tmp_path, model, sampling=sampling)
    assert turn.error is None
    assert (turn.reply.status, turn.reply.reason) == (Status.COMPLETE, "context full")
    assert turn.reply.prompt_len is not None
    assert turn.reply.prompt_len + len(turn.steps) == 128


def test_as_many_tokens_as_were_asked_for_is_the_limit_and_not_the_context(tmp_path: Path) -> None:
    turn = take(tmp_path, tiny.model("llama"), sampling=Sampling(3))
    assert (turn.reply.status, turn.reply.reason) == (Status.COMPLETE, "token limit")


def test_no_tokens_asked_for(tmp_path: Path) -> None:
    for sampling in (Sampling(0), Sampling(0, temperature=1.0)):
        turn = take(tmp_path, tiny.model("llama"), sampling=sampling)
        assert turn.error is None
        assert (turn.reply.status, turn.reply.tokens) == (Status.COMPLETE, 0)
        assert turn.reply.prompt_len


LONG_PROMPT = """
import resource, sys
from pathlib import Path
from oki_trace.records import ChatMessage, Role, Sampling
from tests import tiny
from tests.test_outcomes import take

model = tiny.model("llama")
model.config.max_position_embeddings = 16_384
model.generation_config.eos_token_id = None
folder = Path(sys.argv[1])
take(folder, model)  # all that is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
turn = take(folder, model, said=(ChatMessage(Role.USER, "the fox " * 4_000),))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(turn.reply.status, turn.reply.prompt_len, turn.reply.tokens, grown // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_a_prompt_of_more_than_8000_tokens(tmp_path: Path) -> None:
    """One layer's attention of it, whole, would be a gigabyte."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_PROMPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    status, prompt_len, tokens, megabytes = done.stdout.split()
    assert (status, int(tokens)) == ("complete", 12)
    assert int(prompt_len) > 8_000
    assert int(megabytes) < 400


# ---------------------------------------------------------------------- the prompt


@pytest.mark.parametrize(
    ("template", "said", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", (USER,), "roles must alternate"),
        ("{% for m in messages %}{{ m.nothing.more }}{% endfor %}", (USER,), "refused"),
        ("{% for m in messages %}", (USER,), "refused the messages"),
        ("{{ 1 / 0 }}", (USER,), "division by zero"),
        ("", (), ""),
        ("{% if false %}x{% endif %}", (USER,), "The prompt has no tokens. Give it some text."),
        (
            "{% for m in messages %}{% if m.role == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}hello",
            (ChatMessage(Role.SYSTEM, "be brief"), USER),
            "System role not supported. Leave out the system message",
        ),
    ],
    ids=["raises", "undefined", "syntax", "arithmetic", "plain", "empty", "role"],
)
def test_a_chat_template_that_is_broken(
    tmp_path: Path, template: str, said: tuple[ChatMessage, ...], reason: str
) -> None:
    tokenizer = tiny.tokenizer(template or None)
    turn = take(tmp_path, tiny.model("llama"), said=said, tokenizer=tokenizer)
    if not reason:
        # Nothing said at all: there is still the assistant's turn to begin.
        assert (turn.reply.status, turn.error) == (Status.COMPLETE, None)
        return
    assert_failed(turn, 0, reason)


def test_an_empty_message_is_a_prompt_all_the_same(tmp_path: Path) -> None:
    turn = take(tmp_path, tiny.model("llama"), said=(ChatMessage(Role.USER, ""),))
    assert turn.reply.status is Status.COMPLETE
