"""A model that was changed after its first trace is noticed, and its next trace is exact.

Each change is made to a model that was traced before; the next trace is compared
with the changed model itself, as in ``tests/families``.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from oki_trace import run_traced
from oki_trace.errors import CaptureError
from oki_trace.llm.capture import instrument as module
from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling
from oki_trace.tracing import Collector, trace_turn
from tests import tiny
from tests.families.examine import Outcome, hold

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox")]


def replaced_head(model: Any) -> None:
    torch.manual_seed(5)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    nn.init.normal_(head.weight, std=0.4)
    model.lm_head = head


def head_in_place(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.7).add_(0.01 * torch.randn_like(model.lm_head.weight))


def head_by_data(model: Any) -> None:
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)


def resized(model: Any) -> None:
    model.resize_token_embeddings(tiny.VOCABULARY + 7)


def fewer_blocks(model: Any) -> None:
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    with torch.no_grad():  # torch copies no module whose weights hang on others
        model(input_ids=torch.tensor([[5, 6]]))


def steered(model: Any) -> None:
    def push(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 0.5 if isinstance(output, torch.Tensor) else (output[0] + 0.5, *output[1:])

    model.model.layers[1].register_forward_hook(push)


def hooked_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def patched_norm(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda states: forward(states) * 1.5


def replaced_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(model.config.hidden_size)
    nn.init.normal_(model.model.norm.weight)


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def eager_and_back(model: Any) -> None:
    model.set_attn_implementation("eager")
    run_traced("a", model=model, tokenizer=tiny.tokenizer(), max_new_tokens=2)
    model.set_attn_implementation("sdpa")


def trained(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


def rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


CHANGES: dict[str, Callable[[Any], None]] = {
    change.__name__: change
    for change in (
        *(replaced_head, head_in_place, head_by_data, resized, fewer_blocks, pruned, steered),
        *(hooked_head, patched_norm, replaced_norm, eager, eager_and_back, trained, rotary),
    )
}


def eager_copy(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def assert_exact(model: Any, lens: float = 1e-4, attention: float = 1e-4) -> None:
    found = hold(model, Outcome(type(model).__name__), twin=eager_copy(model))
    assert found.reason is None and found.lens_reason is None and found.attention_reason is None
    assert found.lens_error is not None and found.lens_error <= lens
    assert found.attention_error is not None and found.attention_error <= attention
    assert found.greedy and found.sampled


def traced(model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    options = {"max_new_tokens": 12, **options}
    tokenizer = tokenizer or tiny.tokenizer()
    return run_traced("the quick", model=model, tokenizer=tokenizer, **options)[1]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_traced_as_it_is_now(name: str) -> None:
    model = tiny.model("llama")
    assert_exact(model)
    CHANGES[name](model)
    assert_exact(model)


def test_a_model_that_was_cast() -> None:
    model = tiny.model("llama")
    assert_exact(model)
    model.to(torch.bfloat16)
    assert traced(model)["capture"]["dtype"] == "bfloat16"
    assert_exact(model, lens=1e-1, attention=1e-1)


def test_what_follows_the_head_is_read_at_each_reply() -> None:
    model = tiny.model("gemma2")
    traced(model)
    model.config.final_logit_softcapping = None
    trace = traced(model)
    last = trace["steps"][0]["logit_lens"][-2]["topk"][0]
    assert abs(last["logit"]) > 3, "the cap is gone from the lens, too"
    assert trace["checks"]["fault"] is None


# PEFT reads an attribute that transformers has renamed.
renamed = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@renamed
def test_an_adapter_with_a_head_of_its_own() -> None:
    peft = pytest.importorskip("peft")
    model = tiny.model("llama")
    assert_exact(model)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        head = adapted.base_model.model.lm_head.modules_to_save["default"]
        head.weight.mul_(-1)
    for traced_model in (adapted, adapted.base_model.model):
        trace = traced(traced_model)
        assert trace["checks"]["fault"] is None
        assert max(trace["checks"]["lens"], trace["capture"]["lens_check"]) <= 1e-4
        assert_same_tokens(traced_model, trace)
    with adapted.disable_adapter():
        without = traced(adapted)
    assert without["checks"]["fault"] is None
    assert without["steps"][0]["logits_topk"] != trace["steps"][0]["logits_topk"]


@renamed
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_in_one_line(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(tiny.model("llama"), config).eval()
    with pytest.raises(CaptureError, match=r"virtual tokens have no text to show\. Trace its base"):
        traced(adapted)


def assert_same_tokens(model: Any, trace: dict[str, Any]) -> None:
    ids = torch.tensor([trace["prompt_token_ids"]])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
    )
    assert [s["chosen_id"] for s in trace["steps"]] == made[0, ids.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantized_after_its_first_trace() -> None:
    """Its layers then have packed weights, which are no parameters."""
    model = tiny.model("llama")
    before = traced(model)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)
    trace = traced(model)
    assert_same_tokens(model, trace)
    assert trace["checks"]["fault"] is None
    assert trace["steps"][0]["prob"] != before["steps"][0]["prob"]


# ------------------------------------------------------------------ the tokenizer


def test_tokens_that_were_added_are_named() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    traced(model, tokenizer)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    new_id = tokenizer.convert_tokens_to_ids("<new>")
    with torch.no_grad():
        model.lm_head.weight[new_id] = 0.0
        model.lm_head.weight[new_id] += 10 * model.lm_head.weight[:new_id].mean(0)
    trace = traced(model, tokenizer, topk_logits=1000)
    names = {c["token"] for c in trace["steps"][0]["logits_topk"]}
    assert "<new>" in names and f"<unused {new_id}>" not in names


def test_a_changed_chat_template_is_used() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    traced(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert traced(model, tokenizer)["prompt"] == "[the quick]"


# ------------------------------------------------------------------ what is not a change


def test_the_checks_run_once_for_a_model_that_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Any] = []
    check = module._check
    monkeypatch.setattr(module, "_check", lambda model: checked.append(0) or check(model))
    for family in tiny.FAMILIES:
        model = tiny.model(family)
        for _ in range(3):
            traced(model, tiny.tokenizer())
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        traced(model, tiny.tokenizer())
        assert len(checked) == 1, family
        checked.clear()


def test_a_traced_model_is_copied_and_collected_as_before() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    before = set(vars(model))
    first = traced(model, tokenizer)
    assert set(vars(model)) == before
    assert traced(copy.deepcopy(model), tokenizer)["steps"] == first["steps"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------ kinds of caches


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_positions_are_true_in_any_cache(family: str, implementation: str) -> None:
    model = tiny.model(family)
    expected = traced(model, topk_evidence=100)
    model.generation_config.cache_implementation = implementation
    trace = traced(model, topk_evidence=100)
    assert [s["chosen_id"] for s in trace["steps"]] == [s["chosen_id"] for s in expected["steps"]]
    for step, own in zip(trace["steps"], expected["steps"], strict=True):
        assert step["attention"], "captured, not left out"
        for layer, of_own in zip(step["attention"], own["attention"], strict=True):
            weights = {e["position"]: e["weight"] for e in layer["topk"]}
            assert all(0 <= position < step["position"] for position in weights)
            for entry in of_own["topk"]:
                assert weights.get(entry["position"], 0.0) == pytest.approx(
                    entry["weight"], abs=1e-5
                )


# ------------------------------------------------------------------ while a reply runs


class _Changing(Collector):
    """A sink that changes the model during a reply."""

    def __init__(self, model: Any, change: Callable[[Any], None], at: int) -> None:
        super().__init__()
        self._model, self._change, self._at = model, change, at

    def step(self, step: Any) -> None:
        super().step(step)
        if step.step_index == self._at:
            self._change(self._model)


def test_a_head_that_is_replaced_in_the_midst_of_a_reply_is_noticed() -> None:
    """The lens still has the earlier head; the reply's own logits reveal it."""
    model, tokenizer = tiny.model("gemma2"), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    kept = _Changing(model, replaced_head, 3)
    made = instrument(model, tokenizer)
    trace_turn(made, "tiny", MESSAGES, Sampling(60), CapturePolicy(), [kept])
    assert kept.ended is not None and kept.ended.checks is not None
    fault = kept.ended.checks.fault
    assert fault is not None and "its last layer differs from the model's logits" in fault
    assert len(kept.steps) == 60
    first_bad = int(fault.split("step ")[1].split()[0])
    assert {lens.step_index for lens in kept.lenses} <= set(range(first_bad))
    again = Collector()
    made = instrument(model, tokenizer)
    trace_turn(made, "tiny", MESSAGES, Sampling(8), CapturePolicy(), [again])
    assert again.ended is not None and again.ended.checks is not None
    assert again.ended.checks.fault is None and len(again.lenses) == 8


def test_a_reply_checks_its_first_its_last_and_steps_between() -> None:
    model = tiny.model("llama")
    model.generation_config.eos_token_id = None
    checks = traced(model, max_new_tokens=40)["checks"]
    assert checks["steps"] == [0, 1, 2, 4, 8, 16, 32, 39]
    assert checks["lens"] <= 1e-4 and checks["attention"] <= 1e-4 and checks["fault"] is None


def test_weights_that_do_not_add_up_are_not_kept() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    made = instrument(model, tokenizer)
    take = made.hooks.take_attention

    def broken(outputs: Any) -> Any:
        return {layer: row * 1.5 for layer, row in module_rows(take(outputs)).items()}

    made.hooks.take_attention = broken  # type: ignore[method-assign]
    kept = Collector()
    try:
        trace_turn(made, "tiny", MESSAGES, Sampling(6), CapturePolicy(), [kept])
    finally:
        del made.hooks.take_attention
    assert kept.ended is not None and kept.ended.checks is not None
    assert "add up to" in str(kept.ended.checks.fault)
    assert all(not step.attention for step in kept.steps)


def module_rows(seen: Any) -> dict[int, torch.Tensor]:
    from oki_trace.llm.capture.attention import attention_rows

    return attention_rows(seen)


# ------------------------------------------------------------------ threads


def test_two_threads_trace_one_model_in_turn() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    prompts = ["the quick", "brown fox jumps over", "lazy", "dog the the"]
    alone = {p: run_traced(p, model=model, tokenizer=tokenizer)[1]["steps"] for p in prompts}
    found: dict[str, Any] = {}
    failed: list[BaseException] = []

    def work(prompt: str) -> None:
        try:
            found[prompt] = run_traced(prompt, model=model, tokenizer=tokenizer)[1]["steps"]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and found == alone


def test_a_trace_within_a_trace_of_one_model_is_refused() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    made = instrument(model, tokenizer)

    class Nested(Collector):
        def step(self, step: Any) -> None:
            super().step(step)
            run_traced("a", model=model, tokenizer=tokenizer)

    with pytest.raises(CaptureError, match="is tracing this model already"):
        trace_turn(made, "tiny", MESSAGES, Sampling(4), CapturePolicy(), [Nested()])
    assert traced(model, tokenizer)["status"] == "complete"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_holds_for_the_whole_reply(family: str) -> None:
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    plain = traced(model, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = traced(model, tokenizer)
        assert_same_tokens(model, trace)
    assert len(trace["steps"]) == 12 and trace["checks"]["fault"] is None
    assert trace["capture"]["attention_layers"], "captured under autocast, too"
    assert traced(model, tokenizer)["steps"] == plain["steps"], "and as before after it"


def test_first_traced_in_training_mode() -> None:
    model, tokenizer = tiny.model("gpt2"), tiny.tokenizer()
    model.train()
    traced(model, tokenizer)
    model.eval()
    trace = traced(model, tokenizer)
    assert trace["capture"]["attention_layers"] and trace["capture"]["lens_check"] <= 1e-4
