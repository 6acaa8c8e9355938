"""Branches are exact: the same tokens and numbers as a fresh run with those tokens as prompt.

Tiny random models that differ in their cache: plain, with a window, with a state, with both.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from oki_trace.errors import CaptureError, UsageError
from oki_trace.generate import generate_reply
from oki_trace.llm.capture.instrument import instrument
from oki_trace.message_tree import newest_path, path_to, siblings
from oki_trace.queueing import ReplyRequest, history, new_messages, submit, submit_branch
from oki_trace.records import (
    CapturePolicy,
    Forced,
    Message,
    ModelChoice,
    Sampling,
    Status,
    StepSummary,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import tiny
from tests.families import configs

FAMILIES = {
    "dense": "llama",
    "sliding window": "mistral",
    "hybrid": "jamba",
    "recurrent": "mamba",
    "linear attention": "qwen3_next",
    "learned positions": "gpt2",
}
# What the order of the additions in a KV cache may change.
TOLERANCE = 1e-4
CHOICE = ModelChoice("tiny", dtype="float32")
POLICY = CapturePolicy(tensors="none")
QUESTION = "the quick brown fox jumps over the lazy dog " * 3


@dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Any
    model_id: str = "tiny"


@dataclass
class Talk:
    """A store and a model that answers in it."""

    writer: TraceWriter
    reader: TraceReader
    loaded: Loaded

    def ask(self, text: str, sampling: Sampling, conversation: int | None = None) -> Message:
        request = ReplyRequest(new_messages(text), CHOICE, sampling, POLICY)
        return self.answer(submit(self.writer, request, conversation, claim=True)[1])

    def branch(self, of: Message, step: int, sampling: Sampling, *forced: int) -> Message:
        chosen = Forced(forced) if forced else None
        return self.answer(
            submit_branch(self.writer, of, step, sampling, POLICY, forced=chosen, claim=True)
        )

    def answer(self, reply_id: int) -> Message:
        generate_reply(self.writer, self.reader, self.reader.message(reply_id), self.loaded)
        return self.reader.message(reply_id)

    def forget_cache(self) -> None:
        prefix = instrument(self.loaded.model, self.loaded.tokenizer).fast.prefix
        assert prefix is not None
        prefix.drop()

    def steps(self, message: Message) -> list[StepSummary]:
        return self.reader.steps(message.id)

    def ids(self, message: Message) -> list[int]:
        own = [step.token_id for step in self.steps(message)]
        return [*self.reader.prompt(message.id).token_ids, *own]


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def talk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Talk]:
    yield from talk_with(request.param, tmp_path)


@pytest.fixture
def dense(tmp_path: Path) -> Iterator[Talk]:
    yield from talk_with("llama", tmp_path)


def talk_with(model_type: str, folder: Path) -> Iterator[Talk]:
    model = configs.build(model_type)
    model.generation_config.eos_token_id = None
    with TraceWriter(folder / "store.db") as writer, TraceReader(folder / "store.db") as reader:
        yield Talk(writer, reader, Loaded(model, tiny.tokenizer()))


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return torch.as_tensor(logits.log_softmax(-1))


def test_a_branch_is_a_run_with_its_beginning_as_prompt(talk: Talk) -> None:
    origin = talk.ask(QUESTION, Sampling(8))
    kept = talk.steps(origin)[:3]
    other = (kept[2].token_id + 1) % 50 + 3
    branch = talk.branch(origin, 3, Sampling(6), other)
    assert branch.status is Status.COMPLETE
    assert (branch.parent_id, branch.branch_of, branch.branch_step) == (
        origin.parent_id,
        origin.id,
        3,
    )
    prompt = talk.reader.prompt(branch.id)
    before = talk.reader.prompt(origin.id)
    assert prompt.token_ids == (*before.token_ids, *(step.token_id for step in kept))
    assert prompt.segments[len(before) :] == ("assistant",) * 3
    assert branch.prefix_len == 3
    steps = talk.steps(branch)
    assert [step.origin for step in steps] == ["forced", *["sampled"] * 6]
    assert [step.step_index for step in steps] == list(range(7))
    assert steps[0].token_id == other
    own = logprobs(talk.loaded.model, talk.ids(branch))
    for step in steps:
        row = own[step.position - 1]
        assert step.logprob == pytest.approx(float(row[step.token_id]), abs=TOLERANCE)
        if step.origin == "sampled":
            assert step.token_id == int(row.argmax())


def test_reuse_changes_no_token_and_no_number(talk: Talk) -> None:
    origin = talk.ask(QUESTION, Sampling(8))
    sampled = Sampling(8, temperature=1.0, seed=5)
    found: dict[bool, list[Message]] = {}
    for fresh in (False, True):
        found[fresh] = []
        for step, forced in ((2, (9,)), (5, ()), (0, ())):
            if fresh:
                talk.forget_cache()
            found[fresh].append(talk.branch(origin, step, sampled, *forced))
    for reused, fresh in zip(found[False], found[True], strict=True):
        assert fresh.capture is not None and fresh.capture.reused == 0
        one, two = talk.steps(reused), talk.steps(fresh)
        assert [step.token_id for step in one] == [step.token_id for step in two]
        for left, right in zip(one, two, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=TOLERANCE)
            assert left.entropy == pytest.approx(right.entropy, abs=TOLERANCE)


def test_a_cache_that_cannot_go_back_is_not_used_and_the_reply_says_why(tmp_path: Path) -> None:
    for model_type, reuses in (("llama", True), ("mistral", False), ("jamba", False)):
        (tmp_path / model_type).mkdir()
        for talk in talk_with(model_type, tmp_path / model_type):
            origin = talk.ask(QUESTION, Sampling(6))
            capture = talk.branch(origin, 2, Sampling(3), 9).capture
            assert capture is not None
            assert (capture.reused > 8) is reuses, model_type
            assert (capture.not_reused is None) is reuses, model_type


def test_the_next_turn_runs_only_what_is_new(dense: Talk) -> None:
    first = dense.ask(QUESTION, Sampling(6))
    second = dense.ask("and then?", Sampling(4), first.conversation_id)
    shared = 0
    for one, two in zip(
        dense.ids(first)[:-1], dense.reader.prompt(second.id).token_ids, strict=False
    ):
        if one != two:
            break
        shared += 1
    assert second.capture is not None and second.capture.reused == shared > 20
    own = logprobs(dense.loaded.model, dense.ids(second))
    for step in dense.steps(second):
        assert step.logprob == pytest.approx(
            float(own[step.position - 1, step.token_id]), abs=TOLERANCE
        )


def test_continuing_a_reply_that_stopped_is_one_long_reply(dense: Talk) -> None:
    whole = dense.ask(QUESTION, Sampling(10))
    half = dense.ask(QUESTION, Sampling(4))
    rest = dense.branch(half, 4, Sampling(6))
    assert dense.ids(rest) == dense.ids(whole)
    assert rest.content == whole.content and rest.parts[0].text == whole.parts[0].text
    assert [step.origin for step in dense.steps(rest)] == ["sampled"] * 6


def test_a_branch_of_a_branch_keeps_the_whole_beginning(dense: Talk) -> None:
    origin = dense.ask(QUESTION, Sampling(6))
    first = dense.branch(origin, 2, Sampling(4), 9)
    second = dense.branch(first, 2, Sampling(3), 11)
    assert second.prefix_len == 4
    assert dense.ids(second)[: -len(dense.steps(second))] == [
        *dense.ids(first)[: -len(dense.steps(first)) + 2]
    ]
    shared = dense.reader.prefix_steps(second.id)
    first_position = (second.prompt_len or 0) - 4
    assert [(p - first_position, s.message_id, s.step.step_index) for p, s in shared.items()] == [
        (0, origin.id, 0),
        (1, origin.id, 1),
        (2, first.id, 0),
        (3, first.id, 1),
    ]


def test_a_text_is_forced_token_by_token(dense: Talk) -> None:
    request = ReplyRequest(
        new_messages(QUESTION), CHOICE, Sampling(3), POLICY, forced=Forced(text="lazy fox")
    )
    reply = dense.answer(submit(dense.writer, request, claim=True)[1])
    ids = dense.loaded.tokenizer("lazy fox", add_special_tokens=False)["input_ids"]
    steps = dense.steps(reply)
    assert [step.token_id for step in steps[: len(ids)]] == ids
    assert [step.origin for step in steps] == ["forced"] * len(ids) + ["sampled"] * 3
    assert reply.content.startswith("lazy fox")
    for step in steps[: len(ids)]:
        assert dense.reader.step(reply.id, step.step_index).decision is None


def test_a_later_turn_has_the_messages_of_its_own_branch(dense: Talk) -> None:
    origin = dense.ask(QUESTION, Sampling(6))
    branch = dense.branch(origin, 2, Sampling(4), 9)
    later = dense.ask("go on", Sampling(2), origin.conversation_id)
    messages = dense.reader.messages(origin.conversation_id)
    before = history(messages, later.id)
    assert [turn.content for turn in before] == [QUESTION, branch.content, "go on"]
    assert path_to(messages, later.id) == newest_path(messages)
    assert siblings(messages, branch) == [dense.reader.message(origin.id), branch]


def test_what_cannot_branch_says_why(dense: Talk) -> None:
    origin = dense.ask(QUESTION, Sampling(3))
    with pytest.raises(UsageError, match="Choose a step from 0 to 3"):
        submit_branch(dense.writer, origin, 4, Sampling(3), POLICY)
    question = dense.reader.message(origin.parent_id or 0)
    with pytest.raises(UsageError, match="no generated reply"):
        submit_branch(dense.writer, question, 0, Sampling(3), POLICY)
    gone = submit_branch(dense.writer, origin, 1, Sampling(3), POLICY, claim=True)
    other = dense.ask(QUESTION, Sampling(2), origin.conversation_id)
    assert other.position > origin.position
    dense.writer.delete_branch(origin.id)
    with pytest.raises(Exception, match="no message"):
        dense.answer(gone)
    failed = dense.reader.message(gone)
    assert failed.status is Status.FAILED and "no message" in (failed.reason or "")


def test_a_token_that_the_model_has_not_is_refused(dense: Talk) -> None:
    origin = dense.ask(QUESTION, Sampling(3))
    with pytest.raises(CaptureError, match="no token with the id 10,000,000"):
        dense.branch(origin, 1, Sampling(3), 10_000_000)


@pytest.mark.parametrize("text", ["half \ud83d", "a\0b"])
def test_a_text_that_cannot_be_stored_begins_no_branch(dense: Talk, text: str) -> None:
    origin = dense.ask(QUESTION, Sampling(3))
    forced = Forced(text=text)
    with pytest.raises(UsageError, match="beginning of the reply"):
        submit_branch(dense.writer, origin, 1, Sampling(3), POLICY, forced=forced)
    assert len(dense.reader.messages(origin.conversation_id)) == 2


@pytest.mark.parametrize(
    "setting", [{"encoder_repetition_penalty": 3.0}, {"begin_suppress_tokens": [260, 9]}]
)
def test_the_settings_take_forced_tokens_for_part_of_the_prompt(
    dense: Talk, setting: dict[str, Any]
) -> None:
    origin = dense.ask(QUESTION, Sampling(4))
    forced = (9, 11)
    dense.loaded.model.generation_config.update(**setting)
    branch = dense.branch(origin, 2, Sampling(6), *forced)
    prompt = torch.tensor([[*dense.reader.prompt(branch.id).token_ids, *forced]])
    fresh = dense.loaded.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6
    )
    assert dense.ids(branch) == fresh[0].tolist()


def test_an_unrelated_prompt_frees_the_cache_before_it_runs(dense: Talk) -> None:
    dense.ask(QUESTION, Sampling(3))
    fast = instrument(dense.loaded.model, dense.loaded.tokenizer).fast
    assert fast.prefix is not None
    kept = weakref.ref(fast.prefix._cache)
    assert fast.take_prefix(0) is None
    assert kept() is None


def test_a_loop_of_branches_in_a_damaged_store_ends(dense: Talk, tmp_path: Path) -> None:
    origin = dense.ask(QUESTION, Sampling(4))
    first = dense.branch(origin, 2, Sampling(4), 9)
    second = dense.branch(first, 1, Sampling(2), 11)
    with closing(sqlite3.connect(tmp_path / "store.db")) as store, store:
        store.execute("UPDATE message SET branch_of = ? WHERE id = ?", (second.id, first.id))
    assert {shared.message_id for shared in dense.reader.prefix_steps(second.id).values()} == {
        first.id
    }


def test_a_reply_of_forced_tokens_alone_ends_with_them(dense: Talk) -> None:
    origin = dense.ask(QUESTION, Sampling(3))
    branch = dense.branch(origin, 1, Sampling(0), 9, 11)
    assert (branch.status, branch.reason) == (Status.COMPLETE, "token limit")
    assert [step.token_id for step in dense.steps(branch)] == [9, 11]


@pytest.mark.parametrize("kind", ["hook", "global hook", "forward"])
def test_code_of_the_user_in_the_model_runs_for_every_token_again(dense: Talk, kind: str) -> None:
    """A hook for steering has another strength at each reply, which no identity shows."""
    layer = dense.loaded.model.model.layers[0]
    strength = 0.0
    plain = layer.forward

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + strength * torch.arange(hidden.shape[-1])

    def hook(module: Any, _inputs: Any, output: Any) -> Any:
        return steer(output) if module is layer else output

    handle = None
    if kind == "hook":
        handle = layer.register_forward_hook(hook)
    elif kind == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        layer.forward = lambda *args, **kwargs: steer(plain(*args, **kwargs))
    try:
        origin = dense.ask(QUESTION, Sampling(4))
        strength = 3.0
        branch = dense.branch(origin, 1, Sampling(3))
        own = logprobs(dense.loaded.model, dense.ids(branch))
    finally:
        if handle is not None:
            handle.remove()
    assert branch.capture is not None and branch.capture.reused == 0
    assert "hooks" in (branch.capture.not_reused or "")
    for step in dense.steps(branch):
        assert step.logprob == pytest.approx(
            float(own[step.position - 1, step.token_id]), abs=TOLERANCE
        )
