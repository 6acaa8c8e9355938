"""Traces are exact for models with unusual parts.

Tiny random models, each compared with its own eager attention, its own head and
``generate()`` as in ``tests/families``. Windows are shorter than the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.loading.load import load
from oki_trace.records import CapturePolicy, ChatMessage, ModelChoice, Role, Sampling
from oki_trace.tracing import Collector, trace_turn
from tests import tiny
from tests.families import configs, truth
from tests.families.examine import TOKENS, Outcome, hold
from tests.llm.loading import write_gguf
from tests.models import save

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox jumps")]


def assert_exact(
    model: Any, lens: float = 1e-4, attention: float = 1e-4, **options: Any
) -> Outcome:
    """Compared with itself, with these tolerances in log-probability and in weight."""
    found = hold(model, Outcome(type(model).__name__), **options)
    assert found.reason is None and found.lens_reason is None and found.attention_reason is None
    assert found.lens_error is not None and found.lens_error <= lens
    assert found.attention_error is not None and found.attention_error <= attention
    assert found.greedy and found.sampled
    return found


def trace(model: Any, tokenizer: Any = None) -> Collector:
    kept = Collector()
    made = instrument(model, tokenizer or tiny.tokenizer())
    policy = CapturePolicy(topk_evidence=100)
    trace_turn(made, "tiny", MESSAGES, Sampling(TOKENS), policy, [kept])
    return kept


def all_ids(kept: Collector) -> list[int]:
    assert kept.started is not None
    return [*kept.started.prompt.token_ids, *(s.token_id for s in kept.steps)]


def randomized(module: torch.nn.Module, name: str) -> None:
    """Parameters that a random model starts with as zeros, and whose absence would go unnoticed."""
    torch.manual_seed(1)
    torch.nn.init.normal_(getattr(module, name), std=2.0)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("llama4_text", {"attention_chunk_size": configs.WINDOW}),
        ("gpt_oss", {}),
        ("recurrent_gemma", {"attention_window_size": configs.WINDOW}),
    ],
)
def test_positions_are_true_behind_a_window(model_type: str, changes: dict[str, Any]) -> None:
    """Each weight is at the position where the eager weights of one long pass have it."""
    if "layer_types" in changes:
        changes = {**changes, "num_hidden_layers": 4}
    model = configs.build(model_type, **changes)
    assert_exact(model)
    kept = trace(model)
    eager = truth.eager_attention(truth.eager_twin(model), all_ids(kept)[:-1])
    hidden = 0
    for step in kept.steps:
        for entry, weights in zip(step.attention, eager, strict=True):
            row = weights[:, step.position - 1].mean(0)
            assert entry.weights == pytest.approx(row[entry.positions].numpy(), abs=1e-5)
            left_out = row.clone()
            left_out[entry.positions] = 0
            assert float(left_out.abs().max()) <= 1e-6
            hidden += int((row[: step.position] == 0).sum())
    assert hidden > 0


def test_the_share_of_an_attention_sink_is_what_is_missing() -> None:
    model = configs.build("gpt_oss")
    for layer in model.model.layers:
        randomized(layer.self_attn, "sinks")
    assert_exact(model)
    kept = trace(model)
    eager = truth.eager_attention(truth.eager_twin(model), all_ids(kept)[:-1])
    for step in kept.steps:
        for entry, weights in zip(step.attention, eager, strict=True):
            missing = 1 - float(weights[:, step.position - 1].mean(0).sum())
            assert entry.missing == pytest.approx(missing, abs=1e-5)
            assert missing > 1e-3


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_that_share_a_key_head(key_heads: int) -> None:
    assert_exact(configs.build("llama", num_key_value_heads=key_heads))


# ---------------------------------------------------------------- blocks and heads


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_residual(parallel: bool) -> None:
    assert_exact(configs.build("gpt_neox", use_parallel_residual=parallel))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied: bool) -> None:
    model = configs.build("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_exact(model)


@pytest.mark.parametrize("model_type", ["phi", "gptj", "codegen"])
def test_a_head_with_a_bias(model_type: str) -> None:
    model = configs.build(model_type)
    randomized(model.get_output_embeddings(), "bias")
    assert_exact(model)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ],
)
def test_what_comes_after_the_last_block(model_type: str, changes: dict[str, Any]) -> None:
    assert_exact(configs.build(model_type, **changes))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_sixteen_bits(model_type: str, dtype: torch.dtype) -> None:
    """The lens runs in the model's own dtype; eager attention itself is rounded to 16 bits."""
    assert_exact(configs.build(model_type).to(dtype), attention=5e-2)


def wide(folder: Path) -> Path:
    """A tiny model whose matrices are large enough to be quantized."""
    model = configs.build("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    return save(folder, model, tiny.tokenizer())


def test_four_bits(tmp_path: Path) -> None:
    choice = ModelChoice(str(wide(tmp_path)), use_4bit=True, dtype="fp32", device="cpu")
    loaded = load(choice)
    assert loaded.fallback_reason is None
    model = loaded.model
    model.generation_config.eos_token_id = None
    twin = load(choice).model
    twin.set_attn_implementation("eager")
    assert_exact(model, twin=twin)
    assert instrument(model, tiny.tokenizer()).report(CapturePolicy()).quantization == "4-bit"


def test_eight_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", logger="bitsandbytes")
    folder = wide(tmp_path)

    def eight_bits(attention: str) -> Any:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            device_map={"": "cpu"},
            attn_implementation=attention,
            dtype=torch.float32,
        )
        found.generation_config.eos_token_id = None
        return found.eval()

    model = eight_bits("sdpa")
    # Which inputs are rounded to 8 bits depends on all tokens of a pass.
    assert_exact(model, attention=1e-2, twin=eight_bits("eager"), in_steps=True)
    assert instrument(model, tiny.tokenizer()).report(CapturePolicy()).quantization == "8-bit"


def test_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    loaded = load(ModelChoice(str(path)))
    model: Any = loaded.model
    model.generation_config.eos_token_id = None
    kept = trace(model, loaded.tokenizer)
    assert kept.started is not None
    report = kept.started.capture
    assert report.lens_check is not None and report.lens_check <= 1e-4
    assert report.attention_check is not None and report.attention_check <= 1e-4
    prompt = list(kept.started.prompt.token_ids)
    own = truth.generated(model, prompt, TOKENS, do_sample=False)
    assert [s.token_id for s in kept.steps] == own.tokens


@pytest.mark.parametrize(
    "places",
    [
        {"model.embed_tokens": "cpu", "model.layers.0": "disk", "lm_head": "cpu"},
        {"model.embed_tokens": "disk", "model.layers.0": "cpu", "lm_head": "disk"},
    ],
    ids=["a block on disk", "embeddings and head on disk"],
)
def test_a_device_map_over_cpu_and_disk(tmp_path: Path, places: dict[str, str]) -> None:
    whole = configs.build("llama", tie_word_embeddings=False)
    folder = save(tmp_path / "model", whole, tiny.tokenizer())
    rest = ("model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb")
    split: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={**places, **dict.fromkeys(rest, "cpu")},
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    split.generation_config.eos_token_id = None
    assert any(p.device.type == "meta" for p in split.parameters())
    assert_exact(split, twin=truth.eager_twin(whole))
