"""Summaries of rows of logits compared with plain NumPy over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oki_trace.llm.capture.distribution import BLOCK, model_distribution, summarize, top_k

# Too few for blocks, a whole number of blocks, and a partial block at the end.
SIZES = (7, BLOCK * 40, BLOCK * 40 + 13)


def rows(vocab: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * 4


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("k", [1, 5])
def test_the_best_tokens_are_those_of_a_full_sort(vocab: int, k: int) -> None:
    logits = rows(vocab)
    values, ids = top_k(logits, k)
    by_id = np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, :k]
    assert ids.tolist() == by_id.tolist()
    assert torch.equal(values, logits.gather(-1, ids))


@pytest.mark.parametrize("vocab", SIZES)
def test_equal_logits_come_in_the_order_of_their_ids(vocab: int) -> None:
    """In 16 bits ties are common; rank 1 has to be the token that argmax picks."""
    logits = rows(vocab).round()
    values, ids = top_k(logits, 5)
    by_id = np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, :5]
    assert ids.tolist() == by_id.tolist()
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()
    assert values.tolist() == np.take_along_axis(logits.numpy(), by_id, -1).tolist()


def test_tokens_ruled_out_and_negative_logits_sort_as_numbers_do() -> None:
    logits = -rows(BLOCK * 40).abs() - 1
    logits[:, 100:] = float("-inf")
    values, ids = top_k(logits, 5)
    assert ids.tolist() == np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, :5].tolist()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("vocab", (*SIZES, 49_152, 262_144))
@pytest.mark.parametrize("ruled_out", [0, 3])
def test_the_numbers_of_a_row_are_those_of_its_whole_distribution(
    vocab: int, ruled_out: int
) -> None:
    logits = rows(vocab) + torch.tensor([[0.0], [30.0], [-30.0], [1.0], [2.0], [3.0]])
    own_logits = logits[-1].clone()
    logits[:, :ruled_out] = float("-inf")
    own_logits[:ruled_out] = float("-inf")
    chosen = vocab // 2
    found = summarize(logits, [model_distribution(own_logits)], chosen, 3)

    exact = logits.double().log_softmax(-1).numpy()
    own = own_logits.double().log_softmax(-1).numpy()
    kept = np.isfinite(own)
    entropy = -(np.exp(exact) * np.where(kept, exact, 0)).sum(-1)
    kl = (np.exp(own)[kept] * (own[kept] - exact[:, kept])).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, atol=1e-5)
    np.testing.assert_allclose(found.chosen_prob, np.exp(exact[:, chosen]), rtol=1e-5)
    np.testing.assert_allclose(
        found.probs, np.exp(np.take_along_axis(exact, found.token_ids.numpy(), -1)), rtol=1e-5
    )
    ahead = (logits > logits[:, chosen, None]).sum(-1) + 1
    assert found.chosen_rank.tolist() == ahead.tolist()
