"""Every step is the one that ``generate()`` makes, however the model is built and called.

Models that branch once, at some length, and wrappers between the caller and the model's own
code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from oki_trace import run_traced
from oki_trace.errors import CaptureError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.decoding.special_lengths import special_lengths
from oki_trace.llm.fast.step_graph import GraphRun
from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling
from oki_trace.tracing import Collector, trace_turn
from tests import tiny
from tests.families import truth

SWITCH = 40
STEPS = 60


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every step that is run as a graph."""
    steps: list[int] = []
    step = GraphRun.step

    def counted(self: GraphRun, token: Tensor) -> Any:
        steps.append(int(token))
        return step(self, token)

    monkeypatch.setattr(GraphRun, "step", counted)
    yield steps


def tiny_config(config: type[Any], **settings: Any) -> Any:
    torch.manual_seed(0)
    return config(**{**tiny._COMMON, "num_key_value_heads": 2, **settings})


def endless(model: Any) -> Any:
    model.eval()
    model.generation_config.eos_token_id = None
    return model


def traced(model: Any, prompt: str = "the quick", **options: Any) -> dict[str, Any]:
    options = {"max_new_tokens": STEPS, **options}
    return run_traced(prompt, model=model, tokenizer=tiny.tokenizer(), **options)[1]


def assert_generated(model: Any, trace: dict[str, Any]) -> None:
    """The greedy tokens and their probabilities are those of ``generate()``."""
    own = truth.generated(model, trace["prompt_token_ids"], len(trace["steps"]), do_sample=False)
    assert [step["chosen_id"] for step in trace["steps"]] == own.tokens
    for step, logits in zip(trace["steps"], own.logits, strict=True):
        logprob = float(logits.double().log_softmax(-1)[step["chosen_id"]])
        assert step["logprob"] == pytest.approx(logprob, abs=1e-5)
    assert trace["checks"]["fault"] is None


# ------------------------------------------------------------------ branches on the length


def longrope() -> Any:
    """Phi-3 as published: another rotary scaling, and a new cache, beyond SWITCH tokens."""
    width = 32 // 4 // 2
    return endless(
        Phi3ForCausalLM(
            tiny_config(
                Phi3Config,
                original_max_position_embeddings=SWITCH,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * width,
                    "long_factor": [8.0] * width,
                    "original_max_position_embeddings": SWITCH,
                },
            )
        )
    )


def dynamic_ntk() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config = tiny_config(LlamaConfig, max_position_embeddings=SWITCH, rope_parameters=rope)
    model = LlamaForCausalLM(config)
    model.config.max_position_embeddings = 128
    return endless(model)


def window_reached() -> Any:
    return endless(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=SWITCH)))


@pytest.mark.parametrize("make", [longrope, dynamic_ntk, window_reached])
def test_a_reply_that_crosses_a_length_is_generates(make: Callable[[], Any]) -> None:
    model = make()
    trace = traced(model)
    assert trace["prompt_len"] < SWITCH < trace["prompt_len"] + STEPS
    assert_generated(model, trace)


def test_a_graph_is_left_where_the_model_prepares_a_step_otherwise(ran: list[int]) -> None:
    model = longrope()
    trace = traced(model)
    assert_generated(model, trace)
    assert 0 < len(ran) < STEPS - 2
    (note,) = trace["checks"]["notes"]
    assert "the step graph was not used: the model prepares this step differently" in note


class SwitchesUnseen(LlamaForCausalLM):
    """Branches on an attribute, invisible to tracing, at a length that its config names."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        there = outputs.past_key_values
        length = 0 if there is None else int.__index__(there.get_seq_length())
        if str(length) == str(self.config.switch_window):
            outputs.logits = outputs.logits.flip(-1)
        return outputs


def test_a_switch_that_the_config_names_is_run_both_ways(ran: list[int]) -> None:
    model = endless(SwitchesUnseen(tiny_config(LlamaConfig, switch_window=SWITCH)))
    assert special_lengths(model) == [SWITCH]
    trace = traced(model)
    assert_generated(model, trace)
    assert ran, "a graph was used until then"
    assert "it gives different numbers" in trace["checks"]["notes"][0]


@pytest.mark.parametrize("at", [3, 20])
def test_what_fails_in_the_midst_of_a_reply_does_not_end_it(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = endless(tiny.model("llama"))
    made = instrument(model, tiny.tokenizer())
    assert made.fast.step_graph is not None
    function, calls = made.fast.step_graph.function, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > at:
            raise MemoryError("no more")
        return function(*arguments)

    graph = replace(made.fast.step_graph, function=failing)
    made = replace(made, fast=replace(made.fast, step_graph=graph))
    kept = Collector()
    messages = [ChatMessage(Role.USER, "the quick")]
    trace_turn(made, "tiny", messages, Sampling(STEPS), CapturePolicy(), [kept])
    assert kept.started is not None and kept.ended is not None and kept.ended.checks is not None
    own = truth.generated(model, list(kept.started.prompt.token_ids), STEPS, do_sample=False)
    assert [step.token_id for step in kept.steps] == own.tokens
    (note,) = kept.ended.checks.notes
    assert "it failed (MemoryError: no more)" in note


# ------------------------------------------------------------------ third-party kernels


def flash_like(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Any:
    """The contract of flash attention: no 4-D mask, the window comes as an argument."""
    assert attention_mask is None or attention_mask.ndim == 2
    queries, keys = query.shape[2], key.shape[2]
    at = torch.arange(keys - queries, keys)[:, None]
    seen = torch.arange(keys)[None] <= at
    if sliding_window is not None:
        seen &= torch.arange(keys)[None] > at - sliding_window
    return sdpa_attention_forward(module, query, key, value, seen[None, None], **kwargs)


@pytest.fixture
def flash() -> str:
    name = "windowed_kernel"
    AttentionInterface.register(name, flash_like)
    AttentionMaskInterface.register(name, lambda *args, attention_mask=None, **kwargs: None)
    return name


@pytest.mark.parametrize("window", [None, 6, 24])
def test_a_kernel_that_takes_its_window_as_an_argument(flash: str, window: int | None) -> None:
    config = tiny_config(MistralConfig, sliding_window=window)
    model = endless(MistralForCausalLM(config))
    twin = truth.eager_twin(model)
    model.set_attn_implementation(flash)
    prompt = "the quick brown fox jumps over the lazy dog " * 2
    trace = traced(model, prompt, max_new_tokens=8, topk_evidence=1000)
    assert trace["prompt_len"] > 30
    assert_generated(model, trace)
    ids = [*trace["prompt_token_ids"], *(step["chosen_id"] for step in trace["steps"])]
    eager = truth.eager_attention(twin, ids[:-1])
    for step in trace["steps"]:
        for layer, weights in zip(step["attention"], eager, strict=True):
            own = weights[:, step["position"] - 1].mean(0)
            for entry in layer["topk"]:
                assert entry["weight"] == pytest.approx(float(own[entry["position"]]), abs=1e-5)
            seen = sum(entry["weight"] for entry in layer["topk"])
            assert seen == pytest.approx(1.0, abs=1e-4)
            if window is not None:
                assert len({e["position"] for e in layer["topk"] if e["weight"] > 0}) <= window


def test_a_window_longer_than_the_shortest_check_is_checked_beyond(flash: str) -> None:
    """A kernel with a hidden window agrees with eager attention on a short text only."""

    def hiding(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        kwargs["sliding_window"] = kwargs.pop("hidden_window", 24)
        return flash_like(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("hiding", hiding)
    AttentionMaskInterface.register("hiding", lambda *args, attention_mask=None, **kwargs: None)
    model = endless(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=24)))
    for layer in model.model.layers:
        layer.self_attn.forward = _without_window(layer.self_attn)
    model.set_attn_implementation("hiding")
    made = instrument(model, tiny.tokenizer())
    tap = type(made.hooks._tap).__name__
    assert tap != "KernelTap", "it would show weights that the kernel does not give"


def _without_window(attention: Any) -> Callable[..., Any]:
    forward = type(attention).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        window, attention.config.sliding_window = attention.config.sliding_window, None
        try:
            return forward(attention, *args, **kwargs)
        finally:
            attention.config.sliding_window = window

    return call


def test_flex_attention_is_traced_or_said_to_be_missing() -> None:
    """Its masks are no tensors. On a CPU it needs a compiler, which may be missing."""
    model = endless(tiny.model("llama"))
    model.set_attn_implementation("flex_attention")
    ids = torch.arange(3, 20)[None]
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except Exception as error:
        with pytest.raises(CaptureError, match=type(error).__name__):
            traced(model, max_new_tokens=3)
        return
    trace = traced(model, max_new_tokens=3)
    assert_generated(model, trace)
    for step in trace["steps"]:
        assert step["attention"] or "not available" in trace["evidence_provenance"]


class _BlockMask:
    """Like the mask of flex attention: it can be indexed, but is no tensor."""

    def __getitem__(self, index: Any) -> _BlockMask:
        return self


def test_a_mask_that_is_no_tensor_ends_no_turn(flash: str) -> None:
    def masked(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        assert isinstance(mask, _BlockMask)
        return flash_like(module, query, key, value, None, **kwargs)

    AttentionInterface.register("block_masked", masked)
    AttentionMaskInterface.register("block_masked", lambda *args, **kwargs: _BlockMask())
    model = endless(tiny.model("llama"))
    model.set_attn_implementation("block_masked")
    trace = traced(model, max_new_tokens=6)
    assert_generated(model, trace)
    assert all(step["attention"] for step in trace["steps"]), "asked of the model itself"


# ------------------------------------------------------------------ ways of calling a model


class OwnGenerate(LlamaForCausalLM):
    """A subclass whose generate() takes other arguments."""

    def generate(self, text: str, steps: int) -> str:  # type: ignore[override]
        raise AssertionError("not to be called")


def test_a_generate_of_the_models_own_is_not_used() -> None:
    model = endless(OwnGenerate(tiny_config(LlamaConfig)))
    plain = endless(LlamaForCausalLM(model.config))
    plain.load_state_dict(model.state_dict())
    trace = traced(model)
    assert_generated(plain, trace)
    assert "a generate() of its own" in trace["generation"]["replaced"]


def test_a_model_without_generate_is_refused_in_one_line() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.model("llama")
            self.config, self.device = self.inner.config, torch.device("cpu")
            self.dtype, self.generation_config = torch.float32, self.inner.generation_config

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return self.inner.get_output_embeddings()

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    with pytest.raises(CaptureError, match=r"Bare has no generate\(\)\. Choose a model"):
        traced(Bare().eval(), max_new_tokens=2)


def compiled_whole(model: Any) -> Any:
    return torch.compile(model)


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def compiled_block(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile()
    model.model.norm.forward = torch.compile(model.model.norm.forward)
    return model


# torch.compile imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(
    "compiled", [compiled_whole, compiled_in_place, compiled_forward, compiled_block]
)
@pytest.mark.parametrize("before", [False, True], ids=["at first", "after a first trace"])
def test_a_compiled_model_is_traced_through_its_own_code(
    compiled: Callable[[Any], Any], before: bool
) -> None:
    model, plain = endless(tiny.model("llama")), endless(tiny.model("llama"))
    expected = traced(plain, max_new_tokens=6)
    if before:
        traced(model, max_new_tokens=2)
    wrapped = compiled(model)
    state = [(m._compiled_call_impl, m.__dict__.get("forward")) for m in model.modules()]
    trace = traced(wrapped, max_new_tokens=6)
    assert trace["steps"] == expected["steps"]
    after = [(m._compiled_call_impl, m.__dict__.get("forward")) for m in model.modules()]
    assert after == state, "compiled as before"


def test_long_special_lengths_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = tiny_config(
        MistralConfig, sliding_window=3_000_000, max_position_embeddings=10_000_000
    )
    trace = traced(endless(MistralForCausalLM(config)), max_new_tokens=2)
    assert trace["evidence_provenance"].endswith("not checked beyond 3,000,000 tokens")
