"""Many steps at once say what each step says by itself, on both engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from oki_trace.records import CapturePolicy, ModelChoice, Sampling, Status, TurnEnd
from tests import builders
from tests.store.stores import Store

STEPS = 7


def reply(store: Store, rng: np.random.Generator, *, lenses: int = STEPS) -> int:
    """A reply of some steps, the last of which still lack their lens; others stand beside it."""
    for _ in range(2):
        _, message = store.reply()
        store.writer.append(
            message, [builders.step(i, rng, with_lens=i < lenses) for i in range(STEPS)]
        )
    return message


def test_the_lens_of_many_steps_is_that_of_each(store: Store, rng: np.random.Generator) -> None:
    message = reply(store, rng, lenses=5)
    grid = store.reader.lens_grid(message, 1, 6)
    assert grid.step_index.tolist() == [1, 2, 3, 4]
    for row, index in enumerate(grid.step_index):
        lens = store.reader.step(message, int(index)).lens
        assert lens is not None
        assert [grid.tokens[n] for n in grid.top[row]] == [texts[0] for texts in lens.tokens]
        np.testing.assert_array_equal(grid.top_id[row], lens.token_ids[:, 0])
        np.testing.assert_array_equal(grid.top_prob[row], lens.probs[:, 0])
        for name in ("entropy", "chosen_rank", "chosen_prob", "kl"):
            np.testing.assert_array_equal(getattr(grid, name)[row], getattr(lens, name))
    assert len(set(grid.tokens)) == len(grid.tokens)


def test_numbers_that_are_not_known_are_nan(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    step = builders.step(0, rng, with_lens=True)
    assert step.lens is not None
    store.writer.append(message, [replace(step, lens=replace(step.lens, kl=step.lens.kl * np.nan))])
    assert np.isnan(store.reader.lens_grid(message).kl).all()


def test_a_reply_without_lens_or_attention_is_empty(store: Store) -> None:
    _, message = store.reply()
    grid = store.reader.lens_grid(message)
    assert grid.top.size == len(grid.step_index) == 0
    assert len(store.reader.attention_points(message, 3).weight) == 0


def test_attention_of_many_steps_is_that_of_each(store: Store, rng: np.random.Generator) -> None:
    message = reply(store, rng)
    points = store.reader.attention_points(message, 2, 3)
    for index in range(3, STEPS):
        (kept,) = [a for a in store.reader.step(message, index).attention if a.layer == 2]
        mine = points.step_index == index
        np.testing.assert_array_equal(points.position[mine], kept.positions)
        np.testing.assert_array_equal(points.weight[mine], kept.weights)
    assert set(points.step_index.tolist()) == set(range(3, STEPS))


def test_tensors_come_one_after_another(store: Store, rng: np.random.Generator) -> None:
    message = reply(store, rng)
    found = list(store.reader.iter_tensors(message, "attentions", 2, 5))
    assert [index for index, _ in found] == [2, 3, 4]
    for index, tensor in found:
        own = store.reader.tensor(message, index, "attentions")
        np.testing.assert_array_equal(tensor.array, own.array)
        assert store.reader.tensor_shape(message, index, "attentions") == own.array.shape
    assert store.reader.tensor_shape(message, 99, "attentions") is None


def test_waiting_are_the_live_replies_in_their_order(store: Store) -> None:
    _, running = store.reply()
    conversation, second = store.reply(begin=False)
    queued = store.writer.queue_reply(
        conversation, ModelChoice("tiny/model"), Sampling(), CapturePolicy()
    )
    assert store.reader.waiting() == [running, second, queued]
    store.writer.finish_reply(running, TurnEnd(Status.COMPLETE, "", "end of turn", 1.0))
    store.writer.request_stop(queued)
    assert store.reader.waiting() == [second]


def test_given_tokens_are_read_by_position(store: Store, rng: np.random.Generator) -> None:
    _, message = store.reply()
    given = [builders.given_step(at, rng, with_tensors=True) for at in range(1, 6)]
    store.writer.append(message, given)
    store.writer.append(message, [builders.step(0, rng, with_lens=True, with_tensors=True)])
    grid = store.reader.lens_grid(message, 2, 5, given=True)
    assert grid.step_index.tolist() == [2, 3, 4]
    points = store.reader.attention_points(message, 2, 2, 5, given=True)
    for row, step in enumerate(given[1:4]):
        assert step.lens is not None
        np.testing.assert_array_equal(grid.top_id[row], step.lens.token_ids[:, 0])
        np.testing.assert_array_equal(grid.kl[row], step.lens.kl)
        (kept,) = [a for a in step.attention if a.layer == 2]
        np.testing.assert_array_equal(
            points.position[points.step_index == step.position], kept.positions
        )
    found = store.reader.iter_tensors(message, "attentions", 2, 5, given=True)
    for (position, tensor), step in zip(found, given[1:4], strict=True):
        assert position == step.position
        (kept_tensor,) = [t for t in step.tensors if t.name == "attentions"]
        np.testing.assert_array_equal(tensor.to_float32(), kept_tensor.to_float32())
    # The generated step is not among them, nor they among it.
    assert store.reader.lens_grid(message).step_index.tolist() == [0]
    assert [index for index, _ in store.reader.iter_tensors(message, "attentions")] == [0]
