"""The preallocated cache equals transformers' own, and copies nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedCache, StaticCache

from oki_trace.llm.capture.attention import attention_rows
from oki_trace.llm.capture.buffers import is_persistent
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.decoding.decode import decode
from oki_trace.llm.decoding.forward_pass import LastQuery
from oki_trace.llm.decoding.generation import resolve_generation
from oki_trace.llm.fast import kv_cache
from oki_trace.llm.fast.kv_cache import PreallocatedLayer, preallocate
from oki_trace.records import Sampling
from tests import tiny


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 3, count, width, generator=made) for width in (8, 5))
    return keys.to(dtype), values.to(dtype)


SPARE = 16


def grown(length: int) -> tuple[DynamicCache, DynamicCache]:
    """Transformers' cache and a preallocated one, both with the same prompt."""
    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        cache.update(*tokens(length), 0)
    preallocate(caches[1], SPARE)
    return caches


def same(left: Any, right: Any) -> bool:
    return torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)


def test_it_equals_the_dynamic_cache_at_every_step() -> None:
    own, preallocated = grown(7)
    for step in range(2 * SPARE + 5):
        given = own.update(*tokens(1, step), 0)
        got = preallocated.update(*tokens(1, step), 0)
        assert torch.equal(given[0], got[0]) and torch.equal(given[1], got[1])
        assert own.get_seq_length() == preallocated.get_seq_length()
        assert own.layers[0].get_mask_sizes(1) == preallocated.layers[0].get_mask_sizes(1)


def test_a_step_copies_nothing_within_the_buffers() -> None:
    _, preallocated = grown(7)
    places = [preallocated.update(*tokens(1, step), 0)[0].data_ptr() for step in range(2 * SPARE)]
    assert len(set(places[:SPARE])) == 1
    assert len(set(places)) == 2


def test_keys_of_earlier_steps_do_not_change() -> None:
    """A row of attention may be computed later than its step."""
    own, preallocated = grown(7)
    held, expected = [], []
    for step in range(SPARE + 5):
        expected.append(own.update(*tokens(1, step), 0)[0])
        held.append(preallocated.update(*tokens(1, step), 0)[0])
    assert all(map(is_persistent, held)) and not any(map(is_persistent, expected))
    assert all(torch.equal(*pair) for pair in zip(held, expected, strict=True))


@pytest.mark.parametrize("length", [1, SPARE - 1, SPARE, SPARE + 1, 3 * SPARE])
def test_many_tokens_at_once(length: int) -> None:
    own, preallocated = grown(3)
    for cache in (own, preallocated):
        cache.update(*tokens(length, 1), 0)
        cache.update(*tokens(1, 2), 0)
    assert same(own.layers[0], preallocated.layers[0])


def test_changes_of_the_cache_by_a_model_are_followed() -> None:
    own, preallocated = grown(9)
    for cache in (own, preallocated):
        cache.crop(-4)
        cache.update(*tokens(1, 1), 0)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        cache.update(*tokens(2, 2), 0)
    assert same(own.layers[0], preallocated.layers[0])
    for cache in (own, preallocated):
        cache.reset()
        assert cache.get_seq_length() == 0
        cache.update(*tokens(2, 3), 0)
        cache.update(*tokens(1, 4), 0)
    assert same(own.layers[0], preallocated.layers[0])


def test_a_wider_type_is_not_narrowed() -> None:
    own, preallocated = grown(3)
    for cache in (own, preallocated):
        cache.update(*tokens(1, 1, torch.float64), 0)
        cache.update(*tokens(1, 2, torch.float64), 0)
    assert preallocated.layers[0].keys.dtype == torch.float64
    assert same(own.layers[0], preallocated.layers[0])


def test_other_caches_are_left_unchanged() -> None:
    model = tiny.model("gemma2")
    windows = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), past_key_values=windows)
    before = [type(layer) for layer in windows.layers]
    preallocate(windows, 1)
    for kind, layer in zip(before, windows.layers, strict=True):
        assert type(layer) is (PreallocatedLayer if kind is DynamicLayer else kind)
    assert len(set(before)) == 2
    preallocate(None, 1)
    still = StaticCache(config=model.config, max_cache_len=8)
    kept = list(still.layers)
    preallocate(still, 1)
    assert still.layers == kept
    assert not issubclass(QuantizedCache, DynamicCache)
    unused = DynamicCache()
    preallocate(unused, 1)
    assert unused.get_seq_length() == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_reply_longer_than_the_buffers_is_captured_exactly(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "MAX_SPARE", SPARE)
    model = tiny.model(family)
    model.generation_config.eos_token_id = None
    found = instrument(model, tiny.tokenizer())
    prompt = (5, 6, 7, 8)
    count = 2 * SPARE + 12
    generation = resolve_generation(model, Sampling(count), len(prompt))
    steps = list(decode(model, tiny.tokenizer(), found.hooks, found.fast, prompt, generation))
    made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)[0]
    assert [step.token_id for step in steps] == made[len(prompt) :].tolist()
    # Gemma 2 runs eager attention, which has the weights already.
    later = [isinstance(seen, LastQuery) for seen in steps[-1].attention.values()]
    assert later == [family != "gemma2"] * len(later)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(made[None, :-1], output_attentions=True).attentions
    for step in steps:
        for layer, row in attention_rows(step.attention).items():
            own = whole[layer - 1][0, :, step.position - 1, : step.position]
            torch.testing.assert_close(row, own[:, -row.shape[1] :], atol=1e-5, rtol=0)
