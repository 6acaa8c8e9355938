"""Steps read back as they were written, on every engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oki_trace.errors import NotFound, StoreError
from oki_trace.records import (
    ChatMessage,
    Effect,
    Role,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.stores import Store, assert_same, plain


def test_a_step_reads_back_as_it_was(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    steps = [builders.step(i, rng, with_lens=i != 1) for i in range(3)]
    for step in steps:
        assert store.writer.append(message, [step]) is False
    for step in steps:
        assert_same(store.reader.step(message, step.step_index), step)
    considered = store.reader.candidates(message)
    assert plain(list(considered.items())) == plain([(s.step_index, s.topk) for s in steps])
    for found, written in zip(store.reader.iter_steps(message), steps, strict=True):
        assert_same(found, written)


def test_tensors_read_back_bit_for_bit(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("exact")
    step = builders.step(0, rng)
    store.writer.append(message, [step])
    assert store.reader.tensor_names(message, 0) == ["attentions", "hidden_states", "logits"]
    for tensor in step.tensors:
        assert plain(store.reader.tensor(message, 0, tensor.name)) == plain(tensor)


def test_mode_none_keeps_the_rows_alone(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("none")
    store.writer.append(message, [builders.step(0, rng)])
    assert store.reader.tensor_names(message, 0) == []
    assert store.reader.message_bytes(message) == 0
    with pytest.raises(NotFound, match="no tensor logits"):
        store.reader.tensor(message, 0, "logits")


def test_a_lens_may_trail_its_step(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    steps = [builders.step(i, rng) for i in range(2)]
    lens = dataclasses.replace(
        builders.lens(0, rng), chosen_rank=np.array([9, 2, 1, 1], dtype=np.int64)
    )
    store.writer.append(message, steps)
    assert store.reader.step(message, 0).lens is None
    assert store.reader.steps(message)[0].settle_layer is None
    store.writer.append(message, [], [lens])
    assert plain(store.reader.step(message, 0).lens) == plain(lens)
    assert store.reader.steps(message)[0].settle_layer == 2
    assert store.reader.step(message, 1).lens is None


def test_another_writer_may_go_on(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    store.writer.append(message, [builders.step(0, rng)])
    with TraceWriter(store.db, checkpoint=False) as second:
        second.append(message, [builders.step(1, rng)], [builders.lens(0, rng)])
    assert len(store.reader.steps(message)) == 2
    assert store.reader.step(message, 0).lens is not None


def test_steps_come_in_order_or_not_at_all(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    store.writer.append(message, [builders.step(0, rng)])
    for index in (0, 2):
        with pytest.raises(StoreError, match="write step 1 first"):
            store.writer.append(message, [builders.step(index, rng)])
    with pytest.raises(NotFound, match="no step 5 for its lens"):
        store.writer.append(message, [builders.step(1, rng)], [builders.lens(5, rng)])
    assert [step.step_index for step in store.reader.steps(message)] == [0]
    store.writer.append(message, [builders.step(1, rng)])
    assert [step.step_index for step in store.reader.steps(message, since=0)] == [1]


def test_what_is_not_a_number_is_null_and_nan_again(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    step = builders.step(0, rng, with_lens=True)
    assert step.lens is not None
    nan = float("nan")
    logits, kl = step.topk.logits.copy(), step.lens.kl.copy()
    logits[-1], kl[0], kl[1] = -np.inf, np.inf, nan
    weights = np.full_like(step.attention[0].weights, np.nan)
    step = dataclasses.replace(
        step,
        prob=nan,
        entropy=nan,
        logprob=-np.inf,
        topk=dataclasses.replace(step.topk, logits=logits),
        attention=(
            dataclasses.replace(step.attention[0], weights=weights, missing=nan),
            *step.attention[1:],
        ),
        lens=dataclasses.replace(step.lens, kl=kl),
    )
    store.writer.append(message, [step])
    assert_same(store.reader.step(message, 0), step)
    assert np.isnan(store.reader.steps(message)[0].prob)


def test_greedy_steps_and_steps_without_attention_or_candidates(
    store: Store, rng: np.random.Generator
) -> None:
    _, message = store.reply()
    bare = builders.step(0, rng, topk_lens=1, topk_attention=0)
    bare = dataclasses.replace(
        bare,
        sampled_prob=None,
        topk=dataclasses.replace(bare.topk, sampled_probs=None, noise=None),
        decision=None,
        attention=(),
    )
    no_entries = builders.step(1, rng, topk_attention=0, with_lens=True, topk_lens=0)
    store.writer.append(message, [bare, no_entries])
    assert_same(store.reader.step(message, 0), bare)
    assert_same(store.reader.step(message, 1), no_entries)


def test_a_decision_reads_back_as_it_was(store: Store, rng: np.random.Generator) -> None:
    """With a draw, without one, and with numbers that are none."""
    _, message = store.reply()
    drawn = builders.step(0, rng)
    assert drawn.decision is not None
    penalised = dataclasses.replace(
        drawn.decision,
        drawn=False,
        noise=None,
        runner_up=None,
        effects=(),
        greedy=dataclasses.replace(drawn.decision.greedy, noise=None),
    )
    nan = float("nan")
    broken = dataclasses.replace(
        drawn.decision, effects=(Effect("top-k", "5", 3, nan, nan),), noise=-0.1
    )
    steps = [
        drawn,
        dataclasses.replace(builders.step(1, rng), decision=penalised),
        dataclasses.replace(builders.step(2, rng), decision=broken),
        dataclasses.replace(builders.step(3, rng), decision=None),
    ]
    store.writer.append(message, steps)
    for found, written in zip(store.reader.iter_steps(message), steps, strict=True):
        assert_same(found, written)
    told = [summary.greedy_id for summary in store.reader.steps(message)]
    assert told == [s.decision and s.decision.greedy.token_id for s in steps]
    assert [s.differs_from_greedy for s in steps] == [True, True, True, False]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_text_can_be_kept(store: Store, data: st.DataObject) -> None:
    hostile = st.text(
        st.one_of(
            st.characters(codec="utf-8"),
            st.sampled_from("\x00\x1b\u202e\u200f\ufeff\ud83d\ude00'\"%\\;<>"),
        ),
        max_size=12,
    )
    rng = np.random.default_rng(0)
    words = data.draw(st.lists(hostile, min_size=5, max_size=5))
    raw = data.draw(st.binary(max_size=8))
    step = builders.step(0, rng, topk=5, token=words[0], with_lens=True, topk_lens=5)
    assert step.lens is not None
    step = dataclasses.replace(
        step,
        token_bytes=raw,
        topk=dataclasses.replace(step.topk, tokens=tuple(words)),
        lens=dataclasses.replace(step.lens, tokens=(tuple(words),) * 4),
    )
    conversation, message = store.reply()
    store.writer.rename_conversation(conversation, words[1])
    said = store.writer.add_message(conversation, ChatMessage(Role.USER, words[2]))
    store.writer.append(message, [step])

    def shown(word: str) -> str:
        return "".join(
            "\u2400" if c == "\x00" else "\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in word
        )

    found = store.reader.step(message, 0)
    assert found.token == shown(words[0])
    assert found.token_bytes == raw
    assert found.topk.tokens == tuple(map(shown, words))
    assert found.lens is not None and found.lens.tokens[3] == tuple(map(shown, words))
    assert store.reader.message(said).content == shown(words[2])
    assert store.reader.conversation(conversation).title == shown(words[1])


def test_large_prompts_take_several_statements(store: Store) -> None:
    _, message = store.reply(begin=False)
    start = builders.turn_start(tokens=20_000)
    store.writer.start_reply(message, start)
    found = store.reader.prompt(message)
    assert found == start.prompt
    assert len(found) == 20_000
