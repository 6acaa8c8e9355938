"""A step run as a graph equals the model's own, bit for bit, or the graph is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from oki_trace.llm.capture.attention import attention_rows
from oki_trace.llm.capture.instrument import Instrument, instrument
from oki_trace.llm.decoding import forward_pass
from oki_trace.llm.decoding.decode import RawStep, decode
from oki_trace.llm.decoding.generation import resolve_generation
from oki_trace.llm.fast import kv_cache, prepacked
from oki_trace.llm.fast import step_graph as module
from oki_trace.llm.fast.step_graph import GraphRun, StepGraph
from oki_trace.llm.loading.hardware import has_native_bfloat16
from oki_trace.records import Sampling
from tests import tiny
from tests.families import configs

PROMPT = (5, 6, 7, 8, 9)
STEPS = 40
# The prompt's pass and the step that is run both ways come from the model.
OWN_STEPS = 2
WITH_GRAPHS = ["llama", "gpt2", "gpt_neox", "qwen2"]
# Experts chosen by the token, several kinds of norms and positions, heads with a bias.
MORE_WITH_GRAPHS = ["qwen3_moe", "olmoe", "olmo2", "stablelm", "cohere", "phi", "gpt_bigcode"]

needs_bfloat16 = pytest.mark.skipif(
    not has_native_bfloat16(), reason="this CPU does not multiply bfloat16"
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An entry for every step that runs as a graph."""
    steps: list[int] = []
    step = GraphRun.step

    def counted(self: GraphRun, token: Tensor) -> Any:
        steps.append(int(token))
        return step(self, token)

    monkeypatch.setattr(GraphRun, "step", counted)
    yield steps


def endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model


def decoded(
    made: Instrument,
    graph: StepGraph | None,
    sampling: Sampling | None = None,
    prompt: tuple[int, ...] = PROMPT,
    tokenizer: Any = None,
) -> list[RawStep]:
    generation = resolve_generation(made.model, sampling or Sampling(STEPS), len(prompt))
    tokenizer = tokenizer or tiny.tokenizer()
    fast = replace(made.fast, step_graph=graph)
    return list(decode(made.model, tokenizer, made.hooks, fast, prompt, generation))


def ids(steps: list[RawStep]) -> list[int]:
    return [step.token_id for step in steps]


def generated(model: Any, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=STEPS)
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


def assert_same(steps: list[RawStep], others: list[RawStep]) -> None:
    assert ids(steps) == ids(others)
    for step, other in zip(steps, others, strict=True):
        assert torch.equal(step.logits, other.logits)
        assert all(map(torch.equal, step.hidden_states, other.hidden_states))
        rows, other_rows = attention_rows(step.attention), attention_rows(other.attention)
        assert rows.keys() == other_rows.keys()
        assert all(torch.equal(rows[layer], other_rows[layer]) for layer in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WITH_GRAPHS + MORE_WITH_GRAPHS)
def test_every_step_equals_the_models_own(family: str, dtype: torch.dtype, ran: list[int]) -> None:
    built = tiny.model(family) if family in tiny.FAMILIES else configs.build(family)
    made = instrument(endless(built.to(dtype)), tiny.tokenizer())
    for sampling in (Sampling(STEPS), Sampling(STEPS, temperature=1.5, seed=3)):
        for prompt in (PROMPT, (200,), tuple(range(3, 40))):
            before = len(ran)
            steps = decoded(made, made.fast.step_graph, sampling, prompt)
            assert len(ran) - before == STEPS - OWN_STEPS
            assert_same(steps, decoded(made, None, sampling, prompt))
            assert len(ran) - before == STEPS - OWN_STEPS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_reply(
    smollm2_dir: Any, smollm2: tuple[Any, Any], dtype: str, ran: list[int]
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = smollm2[1]
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=getattr(torch, dtype))
    made = instrument(endless(model.eval()), tokenizer)
    prompt = tuple(tokenizer("A lighthouse keeper told me about the sea.")["input_ids"])
    steps = decoded(made, made.fast.step_graph, prompt=prompt, tokenizer=tokenizer)
    assert len(ran) == STEPS - OWN_STEPS
    assert ids(steps) == generated(model, prompt)
    assert_same(steps, decoded(made, None, prompt=prompt, tokenizer=tokenizer))


def test_steps_continue_beyond_the_preallocated_cache(
    monkeypatch: pytest.MonkeyPatch, ran: list[int]
) -> None:
    monkeypatch.setattr(kv_cache, "MAX_SPARE", 8)
    made = instrument(endless(tiny.model("llama")), tiny.tokenizer())
    steps = decoded(made, made.fast.step_graph)
    assert len(ran) == STEPS - OWN_STEPS
    assert_same(steps, decoded(made, None))


def test_attention_computed_later_is_that_of_its_step() -> None:
    """The keys of a step are a view of a buffer that later steps extend."""
    made = instrument(endless(tiny.model("llama")), tiny.tokenizer())
    at_once = []
    generation = resolve_generation(made.model, Sampling(STEPS), len(PROMPT))
    steps = []
    for step in decode(made.model, tiny.tokenizer(), made.hooks, made.fast, PROMPT, generation):
        at_once.append(attention_rows(step.attention))
        steps.append(step)
    for rows, step in zip(at_once, steps, strict=True):
        later = attention_rows(step.attention)
        assert all(torch.equal(later[layer], row) for layer, row in rows.items())
        assert {row.shape[1] for row in rows.values()} == {step.position}


# Models that a graph cannot represent


def held_before(layer: Any, given: dict[str, Any]) -> int:
    """The number of tokens in the cache that a layer receives."""
    cache = next(
        (given[name] for name in forward_pass.CACHE_NAMES if given.get(name) is not None), None
    )
    return cache.get_seq_length(layer.self_attn.layer_idx) if cache is not None else 0


class DecidesByLength(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """As a model with its own window might."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        if held_before(self, kwargs) > 20:
            hidden_states = hidden_states / 2
        return super().forward(hidden_states, **kwargs)


class DecidesByValue(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class CountsTokens(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """Computes with the number without branching on it: a graph would keep it constant."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        scale = 1 + int(held_before(self, kwargs)) / 100
        return super().forward(hidden_states * scale, **kwargs)


class Draws(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.rand_like(x))


def with_layer(cls: type[nn.Module]) -> Any:
    model = tiny.model("llama")
    model.model.layers[1].__class__ = cls
    return model


def with_mlp(cls: type[nn.Module]) -> Any:
    model = tiny.model("llama")
    model.model.layers[1].mlp.__class__ = cls
    return model


def training() -> Any:
    return tiny.model("llama").train()


def hooked() -> Any:
    model = tiny.model("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    return model


UNFIT: dict[str, Callable[[], Any]] = {
    "a window": lambda: tiny.model("gemma2"),
    "states": lambda: configs.build("mamba"),
    "a decision by the length": lambda: with_layer(DecidesByLength),
    "a decision by a value": lambda: with_mlp(DecidesByValue),
    "the length as a number": lambda: with_layer(CountsTokens),
    "chance": lambda: with_mlp(Draws),
    "training": training,
    "a hook": hooked,
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_model_that_does_not_fit_has_no_graph(what: str) -> None:
    assert instrument(UNFIT[what](), tiny.tokenizer()).fast.step_graph is None


@pytest.mark.parametrize("cls", [DecidesByLength, CountsTokens])
def test_a_model_without_a_graph_decodes_as_before(cls: type[nn.Module]) -> None:
    made = instrument(endless(with_layer(cls)), tiny.tokenizer())
    assert ids(decoded(made, made.fast.step_graph)) == generated(made.model)


def hook_it(model: Any) -> None:
    calls: list[None] = []

    def late(module: Any, args: Any, output: Tensor) -> Tensor:
        calls.append(None)
        return output.flip(-1) if len(calls) % 9 == 0 else output

    model.lm_head.register_forward_hook(late)


def patch_it(model: Any) -> None:
    model.model.norm.forward = lambda hidden: hidden * 3


def swap_a_module(model: Any) -> None:
    model.model.layers[0].mlp = type(model.model.layers[0].mlp)(model.config)


def eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [hook_it, patch_it, swap_a_module, eager_attention])
def test_a_model_changed_after_it_was_loaded_is_run_as_it_is_now(
    change: Callable[[Any], None], ran: list[int]
) -> None:
    made = instrument(endless(tiny.model("llama")), tiny.tokenizer())
    assert made.fast.step_graph is not None
    change(made.model)
    steps = decoded(made, made.fast.step_graph)
    assert len(steps) == STEPS and not ran
    if change is not hook_it:  # which counts its calls
        assert ids(steps) == generated(made.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seen", [True, False], ids=["counted by torch", "behind its back"])
def test_weights_changed_between_two_replies(dtype: torch.dtype, seen: bool) -> None:
    model = endless(tiny.model("llama").to(dtype))
    made = instrument(model, tiny.tokenizer())
    first = ids(decoded(made, made.fast.step_graph))
    assert first == generated(model)
    for parameter in model.model.layers.parameters():
        with torch.no_grad():
            (parameter if seen else parameter.data).mul_(0.5)
    for _ in range(2):
        steps = ids(decoded(made, made.fast.step_graph))
        assert steps == generated(model) != first


@pytest.mark.parametrize("wrong", ["numbers", "an error"])
def test_a_failing_graph_is_not_used(wrong: str, ran: list[int]) -> None:
    made = instrument(endless(tiny.model("llama")), tiny.tokenizer())
    assert made.fast.step_graph is not None
    function = made.fast.step_graph.function

    def broken(*arguments: Any) -> Any:
        if wrong == "an error":
            raise RuntimeError("out of memory")
        logits, *rest = function(*arguments)
        return (logits.nextafter(logits + 1), *rest)

    graph = replace(made.fast.step_graph, function=broken)
    assert ids(decoded(made, graph)) == generated(made.model)
    assert not ran


def test_an_aborted_reply_does_not_affect_the_next(ran: list[int]) -> None:
    made = instrument(endless(tiny.model("llama")), tiny.tokenizer())
    generation = resolve_generation(made.model, Sampling(STEPS), len(PROMPT))
    steps = decode(made.model, tiny.tokenizer(), made.hooks, made.fast, PROMPT, generation)
    for _ in range(5):
        next(steps)
    steps.close()
    assert len(ran) == 3
    assert ids(decoded(made, made.fast.step_graph)) == generated(made.model)


# Prepacked copies of the weights


def copies_of(made: Instrument) -> list[Tensor]:
    assert made.fast.step_graph is not None
    return made.fast.step_graph.copies._copies


def bfloat16_model() -> Any:
    """Its matrices are large enough for oneDNN."""
    sizes = {"hidden_size": 96, "intermediate_size": 128}
    return endless(configs.build("llama", **sizes).bfloat16())


@needs_bfloat16
def test_copies_are_made_once_and_of_the_weights_in_use(ran: list[int]) -> None:
    made = instrument(bfloat16_model(), tiny.tokenizer())
    assert made.fast.step_graph is not None and len(made.fast.step_graph.products) > 5
    assert not copies_of(made)
    steps = decoded(made, made.fast.step_graph)
    first = copies_of(made)
    assert len(first) == len(made.fast.step_graph.products)
    assert all(copy.is_mkldnn for copy in first)
    assert_same(steps, decoded(made, None))
    decoded(made, made.fast.step_graph)
    assert copies_of(made) is first
    with torch.no_grad():
        made.model.lm_head.weight.mul_(2)
    steps = decoded(made, made.fast.step_graph)
    assert copies_of(made) is not first
    assert_same(steps, decoded(made, None))


@needs_bfloat16
@pytest.mark.parametrize("why", ["few steps", "little memory", "a long prompt"])
def test_no_copies_if_not_worthwhile(
    why: str, monkeypatch: pytest.MonkeyPatch, ran: list[int]
) -> None:
    made = instrument(bfloat16_model(), tiny.tokenizer())
    count = STEPS
    if why == "few steps":
        count = prepacked.WORTH_STEPS
    elif why == "little memory":
        free = SimpleNamespace(available=100_000)
        monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    else:
        decoded(made, made.fast.step_graph)
        assert copies_of(made)
        monkeypatch.setattr(module, "LONG_PROMPT", 4)
    before = len(ran)
    steps = decoded(made, made.fast.step_graph, Sampling(count))
    assert not copies_of(made) and len(ran) - before == count - OWN_STEPS
    assert_same(steps, decoded(made, None, Sampling(count)))


@needs_bfloat16
def test_no_weights_are_prepacked_if_products_would_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bfloat16_model()
    assert len(prepacked.prepackable(model).weights) > 5
    with monkeypatch.context() as patched:
        patched.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
        assert not prepacked.prepackable(model).weights
    assert not prepacked.prepackable(model.float()).weights
    # torch multiplies smaller ones without oneDNN, in another order.
    monkeypatch.setattr(prepacked, "MIN_SIZE", 0)
    small = configs.build("llama", hidden_size=48, intermediate_size=48).bfloat16()
    assert not prepacked.prepackable(small).weights
