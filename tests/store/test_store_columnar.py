"""Columns say what the records say, on every engine."""

from __future__ import annotations

import numpy as np

from oki_trace.records import Status
from tests import builders
from tests.store.stores import Store


def test_columns_are_the_rows_of_the_steps(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply("none")
    steps = [builders.step(i, rng, with_lens=i != 1, with_tensors=False) for i in range(4)]
    steps[2].topk.probs[3] = np.nan
    store.writer.append(message, steps)
    found = store.reader.step_columns(message, 1, 3)
    assert found["step"]["step_index"].tolist() == [1, 2]
    assert found["step"]["token"] == [step.token for step in steps[1:3]]
    np.testing.assert_array_equal(found["step"]["prob"], [step.prob for step in steps[1:3]])
    assert np.isnan(found["step"]["settle_layer"][0])
    both = steps[1:3]
    np.testing.assert_array_equal(
        found["topk_entry"]["prob"], np.concatenate([s.topk.probs for s in both])
    )
    assert found["topk_entry"]["token"] == [t for s in both for t in s.topk.tokens]
    np.testing.assert_array_equal(
        found["attention_entry"]["weight"],
        np.concatenate([one.weights for s in both for one in s.attention]),
    )
    lens = steps[2].lens
    assert lens is not None
    np.testing.assert_array_equal(found["lens_layer"]["kl"], lens.kl)
    np.testing.assert_array_equal(found["lens_entry"]["token_id"], lens.token_ids.ravel())
    assert store.reader.step_columns(message, 4, 9)["lens_entry"]["prob"].shape == (0,)


def test_prompts_conversations_and_marks(store: Store) -> None:
    conversation, message = store.reply("none")
    prompt = store.reader.prompt(message)
    columns = store.reader.prompt_columns(message)
    assert tuple(columns["token_id"].tolist()) == prompt.token_ids
    assert tuple(columns["segment"]) == prompt.segments
    assert store.reader.conversation_columns()["title"] == ["a conversation"]
    (mark,) = store.reader.message_marks()
    assert (mark.id, mark.conversation_id, mark.status) == (message, conversation, Status.RUNNING)


def test_a_stamp_changes_with_the_store(store: Store) -> None:
    before = store.reader.stamp()
    assert store.reader.stamp() == before
    store.reply("none")
    assert store.reader.stamp() != before
