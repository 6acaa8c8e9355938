"""The light trace of a prompt: computed while the reply is decoded, as exact as by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oki_trace.errors import CaptureError
from oki_trace.llm.capture import teacher_forcing
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.teacher_forcing import GivenLenses, teacher_force
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.records import CapturePolicy, ChatMessage, Lens, ReplyChecks, Role, Sampling, Step
from oki_trace.tracing import Collector, trace_turn
from tests import tiny
from tests.families import configs

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox jumps over the lazy dog, " * 4)]
LIGHT = CapturePolicy(trace_prompt="light")
ALL_LAYERS = CapturePolicy(trace_prompt="light", lens_layers="all")


def turn(model: Any, tokens: int = 12, policy: CapturePolicy = LIGHT, **options: Any) -> Collector:
    kept = Collector()
    made = instrument(model, tiny.tokenizer())
    trace_turn(made, "tiny", MESSAGES, Sampling(tokens), policy, [kept], **options)
    return kept


def alone(model: Any, kept: Collector) -> list[Step]:
    """The steps of the same prompt, traced by itself."""
    assert kept.started is not None
    made = instrument(model, tiny.tokenizer())
    with lock_model(model):
        events = list(teacher_force(made, kept.started.prompt.token_ids, LIGHT.for_prompt))
    return [event for event in events if isinstance(event, Step)]


def assert_same(steps: list[Step], others: list[Step]) -> None:
    assert [step.position for step in steps] == [step.position for step in others]
    for one, other in zip(steps, others, strict=True):
        assert (one.token_id, one.rank, one.origin) == (other.token_id, other.rank, "given")
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.lens is not None and other.lens is not None
        assert one.lens.step_index == other.lens.step_index == -1
        assert (one.lens.token_ids == other.lens.token_ids).all()
        for name in ("probs", "entropy", "chosen_prob", "kl"):
            np.testing.assert_allclose(
                getattr(one.lens, name), getattr(other.lens, name), atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("tokens", [0, 1, 12])
@pytest.mark.parametrize("room", [0, 2**16, 2**26])
def test_a_prompt_is_traced_whole_whatever_the_reply(
    monkeypatch: pytest.MonkeyPatch, tokens: int, room: int
) -> None:
    """With and without room for steps that wait for the reply."""
    monkeypatch.setattr(teacher_forcing, "_WAITING_BYTES", room)
    model = configs.build("llama")
    kept = turn(model, tokens, ALL_LAYERS)
    assert len(kept.steps) == tokens
    assert kept.ended is not None and kept.ended.checks is not None
    assert kept.ended.checks.fault is None and kept.ended.checks.lens is not None
    assert_same(kept.prompt_steps, alone(model, kept))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "jamba", "mamba", "gemma2"])
def test_a_reply_after_a_traced_prompt_is_the_same_reply(model_type: str) -> None:
    model = configs.build(model_type)
    made = instrument(model, tiny.tokenizer())
    plain = Collector()
    trace_turn(made, "tiny", MESSAGES, Sampling(12), CapturePolicy(), [plain])
    for reuse in (False, True):
        made.fast.take_prefix(0)
        kept = turn(model, reuse=reuse)
        assert kept.started is not None and kept.started.capture.reused == 0
        assert [s.token_id for s in kept.steps] == [s.token_id for s in plain.steps]
        for one, other in zip(kept.steps, plain.steps, strict=True):
            assert one.logprob == other.logprob
        assert_same(kept.prompt_steps, alone(model, kept))


def test_nothing_runs_for_a_prompt_that_is_traced_already(monkeypatch: pytest.MonkeyPatch) -> None:
    model = configs.build("llama")
    made = instrument(model, tiny.tokenizer())
    monkeypatch.setattr(teacher_forcing, "_run", lambda *args, **options: pytest.fail("it ran"))
    with lock_model(model):
        (checks,) = teacher_force(made, [5, 6, 7], LIGHT.for_prompt, first=3)
    assert isinstance(checks, ReplyChecks)


def test_the_first_token_does_not_wait_for_the_lenses_of_the_prompt() -> None:
    model = configs.build("llama")
    order: list[str] = []

    class Sink(Collector):
        def step(self, step: Step) -> None:
            order.append(step.origin)
            super().step(step)

        def lens(self, lens: Lens) -> None:
            assert lens.step_index in [step.step_index for step in self.steps]
            super().lens(lens)

    kept = Sink()
    made = instrument(model, tiny.tokenizer())
    trace_turn(made, "tiny", MESSAGES, Sampling(12), LIGHT, [kept])
    assert order[0] == "sampled" and order.count("given") == len(kept.prompt_steps) > 40
    assert [lens.step_index for lens in kept.lenses] == list(range(12))
    positions = [step.position for step in kept.prompt_steps]
    assert positions == sorted(positions)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stop_keeps_what_is_decoded_and_the_prompt(after: int) -> None:
    model = configs.build("llama")
    kept = Collector()
    made = instrument(model, tiny.tokenizer())
    trace_turn(
        made,
        "tiny",
        MESSAGES,
        Sampling(12),
        LIGHT,
        [kept],
        should_stop=lambda: len(kept.steps) >= after,
    )
    assert kept.ended is not None and kept.ended.reason == "stopped"
    assert kept.prompt_steps and all(step.lens is not None for step in kept.prompt_steps)


def test_a_reply_that_fails_keeps_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = configs.build("llama")
    kept = Collector()
    made = instrument(model, tiny.tokenizer())
    whole = turn(model)

    def fail(*args: Any) -> Any:
        raise RuntimeError("no more room")

    monkeypatch.setattr("oki_trace.llm.decoding.decode.choose", fail)
    with pytest.raises(Exception, match="no more room"):
        trace_turn(made, "tiny", MESSAGES, Sampling(12), LIGHT, [kept])
    assert_same(kept.prompt_steps, whole.prompt_steps)


def test_steps_wait_as_long_as_they_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = configs.build("llama")
    made = instrument(model, tiny.tokenizer())
    ids = list(range(3, 60))
    for room, early in ((2**26, 0), (0, 48)):
        monkeypatch.setattr(teacher_forcing, "_WAITING_BYTES", room)
        later = GivenLenses(made, LIGHT.for_prompt)
        with lock_model(model):
            done = list(teacher_force(made, ids, LIGHT.for_prompt, later=later))
        assert len(done) == early
        rest = 0
        while steps := later.compute():
            rest += len(steps)
        assert rest == len(ids) - 1 - early


def test_the_lens_of_a_long_prompt_is_left_out_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would delay the reply; the tokens have all else, and the reply says so."""
    monkeypatch.setattr(teacher_forcing, "_WAITING_BYTES", 2**16)
    model = configs.build("llama")
    kept, whole = turn(model), turn(model, policy=ALL_LAYERS)
    assert kept.started is not None and kept.ended is not None and kept.ended.checks is not None
    assert kept.started.capture.policy.lens_layers == "none"
    assert "the lens did not read the prompt, whose 5" in kept.ended.checks.notes[0]
    assert all(step.lens is None for step in kept.prompt_steps)
    assert [s.logprob for s in kept.prompt_steps] == [s.logprob for s in whole.prompt_steps]
    assert all(step.attention for step in kept.prompt_steps)
    assert len(kept.lenses) == len(kept.steps) == 12


def test_without_a_draft_the_lens_of_the_prompt_is_left_out_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every layer needs the whole head then, as on a CPU without bfloat16 instructions."""
    monkeypatch.setattr("oki_trace.tracing._EXACT_ROWS", 8)
    model = configs.build("llama")
    kept, whole = turn(model), turn(model, policy=ALL_LAYERS)
    assert kept.started is not None and kept.ended is not None and kept.ended.checks is not None
    assert kept.started.capture.policy.lens_layers == "none"
    assert any("without a draft" in note for note in kept.ended.checks.notes)
    assert all(step.lens is None or len(step.lens.logits) == 1 for step in kept.prompt_steps)
    assert all(step.lens is not None for step in whole.prompt_steps)
    assert [step.token_id for step in kept.steps] == [step.token_id for step in whole.steps]


def test_a_long_prompt_that_must_run_in_one_piece_is_not_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("oki_trace.tracing.ONE_PIECE", 32)
    monkeypatch.setattr(teacher_forcing, "_WAITING_BYTES", 2**16)
    monkeypatch.setattr("oki_trace.tracing.runs_in_chunks", lambda made: False)
    model = configs.build("mamba")
    kept = turn(model)
    assert kept.prompt_steps == [] and len(kept.steps) == 12
    assert kept.ended is not None and kept.ended.checks is not None
    assert "the prompt was not traced" in kept.ended.checks.notes[0]
    assert turn(model, policy=ALL_LAYERS).prompt_steps


@pytest.mark.parametrize("level", ["light", "full"])
def test_a_model_that_predicts_only_the_last_token_still_replies(
    monkeypatch: pytest.MonkeyPatch, level: Any
) -> None:
    model = configs.build("llama")
    made = instrument(model, tiny.tokenizer())
    run = teacher_forcing._run

    def only_last(*args: Any, **options: Any) -> Any:
        outputs = run(*args, **options)
        outputs.logits = outputs.logits[:, -1:]
        return outputs

    teacher_forcing.runs_in_chunks(made)
    monkeypatch.setattr(teacher_forcing, "_run", only_last)
    policy = CapturePolicy(trace_prompt=level)
    if level == "full":
        with pytest.raises(CaptureError, match="does not predict the next token at every position"):
            turn(model, policy=policy)
        return
    kept = turn(model, policy=policy)
    assert len(kept.steps) == 12 and kept.prompt_steps == []
    assert kept.ended is not None and kept.ended.checks is not None
    assert "the prompt was not traced: Llama" in kept.ended.checks.notes[0]
