"""Given tokens are traced exactly: every number compared with one plain pass of the model.

Tiny random models of families that differ in attention, cache, head or state; the texts are
longer than their windows, and the chunks shorter than the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from oki_trace.errors import CaptureError, UsageError
from oki_trace.llm.capture import teacher_forcing
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.teacher_forcing import Windows, teacher_force
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.records import CapturePolicy, ReplyChecks, Step
from tests import tiny
from tests.families import configs, truth

FAMILIES = {
    "dense": "llama",
    "mixture of experts": "mixtral",
    "sliding window": "mistral",
    "sinks": "gpt_oss",
    "hybrid": "jamba",
    "recurrent": "mamba",
    "softcap": "gemma2",
    "scaled logits": "cohere",
    "local and global layers": "gemma3_text",
    "learned positions": "gpt2",
    "alibi": "bloom",
    "linear attention": "qwen3_next",
}
TOLERANCE = 1e-4
LENGTH = 45


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_forcing, "_CHUNK_TOKENS", (16, 16))


def ids_of(model: Any, length: int = LENGTH) -> list[int]:
    torch.manual_seed(5)
    return torch.randint(3, int(model.get_input_embeddings().weight.shape[0]), (length,)).tolist()


def traced(
    model: Any, ids: Sequence[int], policy: CapturePolicy | None = None, **options: Any
) -> tuple[list[Step], ReplyChecks]:
    made = instrument(model, tiny.tokenizer())
    policy = policy or CapturePolicy(topk_evidence=100)
    with lock_model(model):
        *steps, checks = teacher_force(made, ids, policy, **options)
    assert isinstance(checks, ReplyChecks)
    return [step for step in steps if isinstance(step, Step)], checks


@pytest.mark.parametrize("model_type", FAMILIES.values(), ids=FAMILIES.keys())
def test_given_tokens_have_the_numbers_of_one_plain_pass(model_type: str) -> None:
    model = configs.build(model_type)
    ids = ids_of(model)
    made = instrument(model, tiny.tokenizer())
    steps, checks = traced(model, ids)
    assert [step.position for step in steps] == list(range(1, LENGTH))
    assert [step.token_id for step in steps] == ids[1:]
    assert all(step.step_index == -1 and step.origin == "given" for step in steps)
    assert checks.fault is None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)
    for step in steps:
        own = logprobs[step.position - 1]
        assert step.logprob == pytest.approx(float(own[step.token_id]), abs=TOLERANCE)
        assert step.entropy == pytest.approx(float(-(own.exp() * own).sum()), abs=TOLERANCE)
        assert step.rank == int((own > own[step.token_id]).sum()) + 1
        top = own.topk(len(step.topk.tokens)).values
        assert torch.tensor(step.topk.probs.tolist()).log().sub(top).abs().max() <= TOLERANCE
        assert made.lens.projection is None or step.lens is not None
        if step.lens is not None:
            assert step.lens.chosen_prob[-1] == pytest.approx(step.prob, abs=TOLERANCE)
    if made.lens.projection is not None:
        check_lens(model, made, ids, steps)
    eager = truth.eager_attention(truth.eager_twin(model), ids)
    check_attention(eager, steps)


def check_lens(model: Any, made: Any, ids: list[int], steps: Sequence[Step]) -> None:
    """Every layer against the model's own code after the blocks."""
    blocks = made.structure.blocks
    streams = truth.block_outputs(model, blocks, ids)[:-1]
    layers = [truth.logits_had_it_ended_with(model, blocks[-1], ids, s) for s in streams]
    layers.append(truth.logits(model, ids))
    for step in steps:
        assert step.lens is not None
        for layer, logits in enumerate(layers):
            own = logits[step.position - 1].log_softmax(-1)
            ranked = torch.from_numpy(step.lens.token_ids[layer])
            mine = torch.from_numpy(step.lens.logits[layer]).log_softmax(-1)
            difference = mine - logits[step.position - 1][ranked].log_softmax(-1)
            assert float(difference.abs().max()) <= TOLERANCE
            assert float(own[step.token_id].exp()) == pytest.approx(
                float(step.lens.chosen_prob[layer]), abs=TOLERANCE
            )


def check_attention(eager: Sequence[Any], steps: Sequence[Step]) -> None:
    for step in steps:
        for weights, layer in zip(eager, step.attention, strict=True):
            row = weights[:, step.position - 1].mean(0)
            expected = row[torch.tensor(layer.positions)]
            assert torch.tensor(layer.weights).sub(expected).abs().max() <= TOLERANCE
            rest = float(row.sum()) - float(layer.weights.sum())
            assert abs(rest) <= TOLERANCE, "an attended position is missing"


def test_full_tensors_are_those_of_a_reply() -> None:
    """With every head, and the same keys as the model had."""
    model = configs.build("mistral")
    ids = ids_of(model)
    steps, _ = traced(model, ids, CapturePolicy(tensors="exact", topk_evidence=100))
    eager = truth.eager_attention(truth.eager_twin(model), ids)
    for step in steps:
        tensors = {tensor.name: tensor for tensor in step.tensors}
        assert set(tensors) == {"logits", "hidden_states", "attentions"}
        assert float(tensors["logits"].array[step.token_id]) == pytest.approx(step.logit)
        attentions = tensors["attentions"]
        for rows, weights in zip(attentions.array, eager, strict=True):
            own = weights[:, step.position - 1, attentions.key_offset : step.position]
            assert torch.from_numpy(rows).sub(own).abs().max() <= TOLERANCE
    check_attention(eager, steps)


def test_a_text_that_goes_on_is_traced_from_there() -> None:
    model = configs.build("llama")
    ids = ids_of(model)
    whole, _ = traced(model, ids)
    rest, _ = traced(model, ids, first=30)
    assert [step.position for step in rest] == list(range(30, LENGTH))
    for mine, own in zip(rest, whole[29:], strict=True):
        assert mine.logprob == pytest.approx(own.logprob, abs=1e-5)
        assert [a.layer for a in mine.attention] == [a.layer for a in own.attention]


def test_a_stop_keeps_the_steps_before_it() -> None:
    model = configs.build("llama")
    calls: list[int] = []
    steps, _ = traced(
        model, ids_of(model), should_stop=lambda: bool(calls.append(1)) or len(calls) == 2
    )
    assert [step.position for step in steps] == list(range(1, 1 + 2 * teacher_forcing.LENS_STEPS))


def test_windows_predict_each_token_once_with_enough_before_it() -> None:
    model = configs.build("llama")
    ids = ids_of(model)
    steps, _ = traced(model, ids, windows=Windows(20, 8))
    assert [step.position for step in steps] == list(range(1, LENGTH))
    spans = list(Windows(20, 8).spans(LENGTH))
    assert spans == [(0, 20), (8, 28), (16, 36), (24, 44), (32, 45)]
    for step in steps:
        start, end = next(span for span in spans if span[0] < step.position < span[1])
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids[start:end]])).logits[0]
        logprobs = own[step.position - 1 - start].double().log_softmax(-1)
        assert step.logprob == pytest.approx(float(logprobs[step.token_id]), abs=TOLERANCE)
        assert min(int(a.positions.min()) for a in step.attention) >= start


@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 8), (8, 9), (8, -1)])
def test_a_stride_that_fits_no_window_is_refused(length: int, stride: int) -> None:
    with pytest.raises(UsageError, match="does not fit a window"):
        Windows(length, stride)


@pytest.mark.parametrize("length", [0, 1, True, 2.5, "4"])
def test_a_window_of_less_than_two_tokens_is_refused(length: Any) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        Windows.of(length, None)


@pytest.mark.parametrize(("length", "stride"), [(2, 1), (8, 3), (20, 8), (7, 6)])
def test_the_context_of_a_token_is_that_of_the_first_window_with_it(
    length: int, stride: int
) -> None:
    windows = Windows(length, stride)
    spans = list(windows.spans(60))
    for position in range(1, 60):
        start = next(start for start, end in spans if start <= position < end)
        assert windows.context(position) == position - start
        assert position < length or windows.context(position) >= length - stride


def test_windows_overlap_by_half_by_default() -> None:
    assert Windows.of(9, None) == Windows(9, 4)
    assert Windows.of(None, None) is None


def test_logits_that_are_not_finite_are_refused() -> None:
    model = configs.build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CaptureError, match="not finite at position 1"):
        traced(model, ids_of(model))


def test_two_tokens_make_one_step_and_one_token_none() -> None:
    model = configs.build("llama")
    assert [step.position for step in traced(model, [5, 6])[0]] == [1]
    assert traced(model, [5])[0] == []
