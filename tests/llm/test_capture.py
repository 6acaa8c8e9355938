"""Captured numbers compared with the model itself, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling, Status, Step
from oki_trace.tracing import Collector, trace_turn
from tests import tiny

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox jumps")]
TOKENS = 12


def trace(
    model: Any,
    tokenizer: Any,
    sampling: Sampling | None = None,
    policy: CapturePolicy | None = None,
    **options: Any,
) -> Collector:
    collector = Collector()
    trace_turn(
        instrument(model, tokenizer),
        "tiny",
        MESSAGES,
        sampling or Sampling(max_new_tokens=TOKENS),
        policy or CapturePolicy(tensors="exact"),
        [collector],
        **options,
    )
    return collector


def prompt_ids(collector: Collector) -> list[int]:
    assert collector.started is not None
    return list(collector.started.prompt.token_ids)


def tensor(step: Step, name: str) -> np.ndarray:
    return next(t.array for t in step.tensors if t.name == name)


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def traced(family: str) -> tuple[Any, Collector]:
    model = tiny.model(family)
    return model, trace(model, tiny.tokenizer())


def test_greedy_tokens_are_those_of_generate(traced: tuple[Any, Collector]) -> None:
    model, collector = traced
    ids = torch.tensor([prompt_ids(collector)])
    expected = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()


def test_distribution_is_the_models_own(traced: tuple[Any, Collector]) -> None:
    model, collector = traced
    ids = prompt_ids(collector)
    for step in collector.steps:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        probs = logits.softmax(-1)
        assert step.position == len(ids)
        assert step.prob == pytest.approx(float(probs[step.token_id]), abs=1e-5)
        assert step.logprob == pytest.approx(float(probs[step.token_id].log()), abs=1e-4)
        assert step.entropy == pytest.approx(float(-(probs * probs.log()).sum()), abs=1e-4)
        top = probs.topk(10)
        assert step.topk.token_ids.tolist() == top.indices.tolist()
        assert step.topk.probs == pytest.approx(top.values.numpy(), abs=1e-5)
        assert step.rank == 1
        assert step.margin == pytest.approx(float(top.values[0] - top.values[1]), abs=1e-5)
        assert tensor(step, "logits") == pytest.approx(logits.numpy(), abs=1e-4)
        ids.append(step.token_id)


def test_lens_is_the_models_own_norm_and_head_at_every_layer(traced: tuple[Any, Collector]) -> None:
    model, collector = traced
    project = tiny.final_norm_and_head(model)
    ids = prompt_ids(collector)
    assert [lens.step_index for lens in collector.lenses] == [s.step_index for s in collector.steps]
    for step, lens in zip(collector.steps, collector.lenses, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
            # transformers norms the last entry already, so the model's logits are used for it.
            inner = [h[0, -1] for h in output.hidden_states[:-1]]
            logits = [*(project(h) for h in inner), output.logits[0, -1]]
        assert lens.token_ids.shape == (tiny.LAYERS + 1, 5)
        for layer, row in enumerate(logits):
            probs = row.softmax(-1)
            kept = torch.tensor(lens.token_ids[layer])
            assert lens.probs[layer] == pytest.approx(probs[kept].numpy(), abs=1e-4)
            assert lens.probs[layer] == pytest.approx(probs.topk(5).values.numpy(), abs=1e-4)
            assert lens.chosen_prob[layer] == pytest.approx(float(probs[step.token_id]), abs=1e-4)
            entropy = float(-(probs * probs.log()).sum())
            assert lens.entropy[layer] == pytest.approx(entropy, abs=1e-3)
            own = logits[-1].softmax(-1)
            kl = float((own * (own.log() - row.log_softmax(-1))).sum())
            assert lens.kl[layer] == pytest.approx(kl, abs=1e-3)
        assert lens.probs[-1] == pytest.approx(step.topk.probs[:5], abs=1e-6)
        assert tensor(step, "hidden_states")[:-1] == pytest.approx(
            torch.stack(inner).numpy(), abs=1e-4
        )
        last = torch.tensor(tensor(step, "hidden_states")[-1])
        assert project(last).detach().numpy() == pytest.approx(logits[-1].numpy(), abs=1e-4)
        ids.append(step.token_id)


def test_attention_is_the_models_own_eager_attention(traced: tuple[Any, Collector]) -> None:
    model, collector = traced
    ids = prompt_ids(collector)
    before = model.config._attn_implementation
    for step in collector.steps:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            eager = model(torch.tensor([ids]), output_attentions=True).attentions
        model.set_attn_implementation(before)
        record = next(t for t in step.tensors if t.name == "attentions")
        assert record.layers == tuple(range(1, tiny.LAYERS + 1))
        for row, weights in zip(record.array, eager, strict=True):
            expected = weights[0, :, -1].numpy()
            assert row == pytest.approx(expected[:, record.key_offset :], abs=1e-5)
            assert expected[:, : record.key_offset] == pytest.approx(0, abs=1e-6)
        for entry, weights in zip(step.attention, eager, strict=True):
            mean = weights[0, :, -1].mean(0).numpy()
            assert entry.weights == pytest.approx(mean[entry.positions], abs=1e-5)
            ranked = np.sort(mean)[::-1]
            assert entry.weights == pytest.approx(ranked[: len(entry.weights)], abs=1e-5)
            # Fewer than ten only where a window hides all others.
            assert ranked[len(entry.weights) : 10] == pytest.approx(0, abs=1e-6)
        assert step.evidence is not None and step.evidence.layer == tiny.LAYERS
        ids.append(step.token_id)


def test_a_sliding_window_keeps_true_positions() -> None:
    collector = trace(tiny.model("gemma2"), tiny.tokenizer())
    last = collector.steps[-1]
    sliding, full = last.attention[0], last.attention[1]
    assert sliding.positions.min() >= last.position - tiny.WINDOW
    assert full.positions.min() < last.position - tiny.WINDOW


def test_the_check_is_kept_with_the_reply(traced: tuple[Any, Collector]) -> None:
    _, collector = traced
    assert collector.started is not None
    report = collector.started.capture
    assert report.logit_lens_available and report.lens_reason is None
    assert report.lens_check is not None and report.lens_check <= 1e-4
    assert report.attention_check is not None and report.attention_check <= 1e-5


def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny.model(family)
    # transformers installs hooks of its own at the first call with output_attentions.
    trace(model, tiny.tokenizer())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    implementation = model.config._attn_implementation
    trace(model, tiny.tokenizer(), Sampling(TOKENS, temperature=1.0))
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks
    assert model.config._attn_implementation == implementation
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("seed", [0, 7])
def test_sampled_tokens_are_those_of_generate(family: str, seed: int) -> None:
    model = tiny.model(family)
    sampling = Sampling(TOKENS, temperature=0.9, top_p=0.8, top_k=20, seed=seed)
    collector = trace(model, tiny.tokenizer(), sampling)
    ids = torch.tensor([prompt_ids(collector)])
    torch.manual_seed(seed)
    expected = model.generate(
        ids, do_sample=True, temperature=0.9, top_p=0.8, top_k=20, max_new_tokens=TOKENS
    )
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()


def test_prob_is_the_models_own_and_what_sampling_made_of_it_stands_beside() -> None:
    model = tiny.model("llama")
    greedy = trace(model, tiny.tokenizer())
    sampled = trace(model, tiny.tokenizer(), Sampling(TOKENS, temperature=0.3, top_k=4, seed=1))
    first, after = greedy.steps[0], sampled.steps[0]
    assert first.sampled_prob is None and first.topk.sampled_probs is None
    assert after.topk.probs == pytest.approx(first.topk.probs)
    assert after.topk.sampled_probs is not None
    logits = torch.tensor(tensor(after, "logits")) / 0.3
    kept = logits.topk(4)
    expected = torch.zeros_like(logits).scatter(0, kept.indices, kept.values.softmax(-1))
    assert after.topk.sampled_probs == pytest.approx(expected[after.topk.token_ids].numpy())
    assert after.sampled_prob == pytest.approx(float(expected[after.token_id]))


def test_a_seed_is_always_recorded_so_that_a_sampled_reply_can_be_had_again() -> None:
    model = tiny.model("llama")
    first = trace(model, tiny.tokenizer(), Sampling(TOKENS, temperature=1.5))
    assert first.started is not None and first.started.generation.seed is not None
    again = trace(
        model,
        tiny.tokenizer(),
        Sampling(TOKENS, temperature=1.5, seed=first.started.generation.seed),
    )
    assert [s.token_id for s in again.steps] == [s.token_id for s in first.steps]


def test_repetition_penalty_changes_the_choice_and_not_the_models_own_distribution() -> None:
    model = tiny.model("qwen2")
    collector = trace(model, tiny.tokenizer(), Sampling(TOKENS, repetition_penalty=1.8))
    ids = torch.tensor([prompt_ids(collector)])
    expected = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, repetition_penalty=1.8)
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()
    assert any(s.rank > 1 for s in collector.steps)


def test_every_stop_token_of_the_generation_config_stops() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    free = trace(model, tokenizer)
    fifth = free.steps[4].token_id
    model.generation_config.eos_token_id = [1, fifth]
    stopped = trace(model, tokenizer)
    assert [s.token_id for s in stopped.steps] == [
        s.token_id for s in free.steps[: 1 + [s.token_id for s in free.steps].index(fifth)]
    ]
    assert stopped.ended is not None and stopped.ended.reason == "end of turn"
    assert len(stopped.lenses) == len(stopped.steps)


def test_a_stop_asked_for_ends_the_reply_with_all_that_was_decoded() -> None:
    collector = Collector()
    trace_turn(
        instrument(tiny.model("llama"), tiny.tokenizer()),
        "tiny",
        MESSAGES,
        Sampling(TOKENS),
        CapturePolicy(),
        [collector],
        should_stop=lambda: len(collector.steps) >= 6,
    )
    assert collector.ended is not None
    assert (collector.ended.status, len(collector.steps)) == (Status.STOPPED, 7)
    assert len(collector.lenses) == 7


def test_broken_logits_fail_the_reply_and_keep_what_was_decoded() -> None:
    model = tiny.model("llama")
    calls = 0

    def poison(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 5 else output

    made = instrument(model, tiny.tokenizer())
    handle = model.lm_head.register_forward_hook(poison)
    collector = Collector()
    with pytest.raises(CaptureError, match="not finite at step"):
        trace_turn(
            made, "tiny", MESSAGES, Sampling(TOKENS), CapturePolicy(topk_lens=1), [collector]
        )
    handle.remove()
    assert collector.ended is not None and collector.ended.status is Status.FAILED
    assert "not finite" in collector.ended.reason
    assert collector.steps


def test_a_prompt_that_leaves_no_room_is_refused_in_a_sentence() -> None:
    long = [ChatMessage(Role.USER, "x" * 200)]
    made = instrument(tiny.model("llama"), tiny.tokenizer())
    with pytest.raises(CaptureError, match="context holds 128"):
        trace_turn(made, "tiny", long, Sampling(), CapturePolicy(), [Collector()])


def test_the_reply_ends_where_the_context_does() -> None:
    model = tiny.model("llama")
    model.generation_config.eos_token_id = None
    collector = trace(model, tiny.tokenizer(), Sampling(max_new_tokens=1000))
    assert len(prompt_ids(collector)) + len(collector.steps) == 128


def test_no_tokens_asked_for_is_a_complete_empty_reply() -> None:
    collector = trace(tiny.model("llama"), tiny.tokenizer(), Sampling(max_new_tokens=0))
    assert collector.ended is not None
    assert (collector.ended.status, collector.ended.output) == (Status.COMPLETE, "")
    assert collector.steps == []


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        instrument(T5ForConditionalGeneration(config), tiny.tokenizer())


def test_smollm2_is_traced_exactly(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    collector = Collector()
    trace_turn(
        instrument(model, tokenizer),
        "smollm2",
        [ChatMessage(Role.USER, "What is the capital of France?")],
        Sampling(max_new_tokens=24),
        CapturePolicy(tensors="exact"),
        [collector],
    )
    assert collector.ended is not None and "Paris" in collector.ended.output
    ids = torch.tensor([prompt_ids(collector)])
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    assert [s.token_id for s in collector.steps] == expected[0, ids.shape[1] :].tolist()
    with torch.no_grad():
        output = model(expected[:, :-1], output_hidden_states=True)
    for step, lens in zip(collector.steps, collector.lenses, strict=True):
        at = step.position - 1
        own = output.logits[0, at].softmax(-1)
        assert lens.probs[-1] == pytest.approx(own.topk(5).values.numpy(), abs=1e-4)
        for layer in range(30):
            with torch.no_grad():
                row = model.lm_head(model.model.norm(output.hidden_states[layer][0, at]))
            probs = row.softmax(-1)
            assert lens.probs[layer] == pytest.approx(probs.topk(5).values.numpy(), abs=2e-3)


def test_weights_offloaded_to_disk_are_traced_the_same(tmp_path: Path) -> None:
    from accelerate import disk_offload

    expected = trace(tiny.model("llama"), tiny.tokenizer())
    model = tiny.model("llama")
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    offloaded = trace(model, tiny.tokenizer())
    assert [s.token_id for s in offloaded.steps] == [s.token_id for s in expected.steps]
    for one, other in zip(offloaded.lenses, expected.lenses, strict=True):
        assert one.probs == pytest.approx(other.probs, abs=1e-5)


def test_torch_may_use_as_many_threads_after_a_turn_as_before() -> None:
    before = torch.get_num_threads()
    trace(tiny.model("llama"), tiny.tokenizer())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_that_was_traced_can_still_be_trained(family: str) -> None:
    model = tiny.model(family)
    trace(model, tiny.tokenizer())
    model.train()
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
