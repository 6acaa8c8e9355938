"""Loading: the model and tokenizer for each kind of name."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from oki_trace.errors import ModelError
from oki_trace.llm.loading.hardware import native_dtype
from oki_trace.llm.loading.load import load, load_model_and_tokenizer
from oki_trace.llm.loading.quantization import NF4, QuantizationFallback
from oki_trace.records import ModelChoice
from tests.llm.loading import (
    ROOT,
    VOCABULARY,
    llama_config,
    refusal,
    run_python,
    write_gguf,
    write_tokenizer,
)

# ---------------------------------------------------------------- what is got


def test_local_folder(tiny: Path) -> None:
    loaded = load(ModelChoice(str(tiny)))
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert not loaded.model.training
    assert (loaded.dtype, loaded.quantization, loaded.fallback_reason) == ("float32", None, None)
    assert loaded.model_id == str(tiny)
    assert loaded.seconds > 0
    assert str(tiny) in loaded.description
    ids = loaded.tokenizer("the fox", return_tensors="pt")
    out = loaded.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_relative_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert load(ModelChoice(f"./{tiny.name}")).model_id == f"./{tiny.name}"
    assert load(ModelChoice(tiny.name)).model_id == tiny.name


def test_environment_names_the_default(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OKI_TRACE_MODEL", str(tiny))
    model, tokenizer = load_model_and_tokenizer(use_4bit=False)
    assert isinstance(model, LlamaForCausalLM)
    assert len(tokenizer("fox")["input_ids"]) > 0


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("float16", "float16")]
)
def test_requested_dtype(tiny: Path, name: str, dtype: str) -> None:
    loaded = load(ModelChoice(str(tiny), dtype=name, device="cpu"))
    assert loaded.dtype == dtype
    assert loaded.model.dtype == getattr(torch, dtype)
    assert loaded.device == "cpu"


def test_a_torch_dtype_is_accepted(tiny: Path) -> None:
    model, _ = load_model_and_tokenizer(str(tiny), use_4bit=False, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_default_dtype_is_the_checkpoints_where_native(tiny: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        LlamaForCausalLM(llama_config()).to(dtype).save_pretrained(folder)
        write_tokenizer(folder)
        loaded = load(ModelChoice(str(folder), device="cpu"))
        assert loaded.model.dtype == native_dtype(dtype, cpu)
    has_bf16 = any(torch.cpu.get_capabilities().get(c) for c in ("avx512_bf16", "amx_bf16", "bf16"))
    assert native_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert native_dtype(torch.float16, cpu) == torch.float32
    assert native_dtype(None, cpu) == torch.float32


def test_progress_is_reported(tiny: Path) -> None:
    told: list[tuple[str, float | None]] = []
    load(ModelChoice(str(tiny)), progress=lambda text, done: told.append((text, done)))
    assert told[-1][1] == 1.0
    fractions = [done for text, done in told if text == "Loading weights"]
    assert fractions == sorted(fractions)
    assert len(fractions) > 2


def test_no_bars_in_a_pipe(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(ModelChoice(str(tiny)))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_hub_id_from_the_cache(tiny: Path, tmp_path: Path) -> None:
    """Laid out as the hub's cache, loaded by id without a network."""
    cache = tmp_path / "cache"
    sha = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--tiny-llama"
    shutil.copytree(tiny, repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    model, tokenizer = load_model_and_tokenizer("someone/tiny-llama", False, cache)
    assert isinstance(model, LlamaForCausalLM)
    assert len(tokenizer("fox")["input_ids"]) > 0

    weights = repository / "snapshots" / sha / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    with pytest.raises(ModelError, match=r"truncated.*download it again"):
        load_model_and_tokenizer("someone/tiny-llama", False, cache)


def test_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.warns(QuantizationFallback, match="already quantized"):
        loaded = load(ModelChoice(str(path), use_4bit=True))
    assert loaded.dtype == "float32"
    assert loaded.quantization == "gguf, dequantized"
    ids = loaded.tokenizer("the fox", return_tensors="pt")
    assert loaded.model(**ids).logits.shape[-1] == loaded.model.config.vocab_size

    os.truncate(path, path.stat().st_size - 4096)
    assert "is truncated" in refusal(path)
    path.write_bytes(b"<html>" + bytes(100))
    assert "not a GGUF file" in refusal(path)


def test_no_warning_without_a_reason(tiny: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(ModelChoice(str(tiny)))


# ---------------------------------------------------------------- 4-bit


def test_4bit_on_the_built_in_model(smollm2_dir: Path) -> None:
    loaded = load(
        ModelChoice("smollm2", use_4bit=True, dtype="fp32"), models_dir=smollm2_dir.parent
    )
    if loaded.fallback_reason is not None:
        pytest.fail(f"4-bit fell back: {loaded.fallback_reason}")
    assert loaded.quantization == NF4
    assert loaded.model.get_memory_footprint() < 200e6
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").to(loaded.model.device)
    out = loaded.model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])


def test_4bit_that_loads_but_cannot_run_falls_back(tmp_path: Path) -> None:
    """bitsandbytes accepts these shapes and, on some CPUs, refuses them at the first token."""
    config = llama_config(hidden_size=48, intermediate_size=100)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationFallback)
        loaded = load(ModelChoice(str(tmp_path), use_4bit=True))
    assert (loaded.quantization == NF4) == (loaded.fallback_reason is None)
    ids = loaded.tokenizer("the fox", return_tensors="pt").to(loaded.model.device)
    out = loaded.model.generate(**ids, min_new_tokens=3, max_new_tokens=3)
    assert out.shape[1] == ids["input_ids"].shape[1] + 3


def test_4bit_of_gpt2_runs_again_with_gradients_on(tmp_path: Path) -> None:
    """Its layers are Conv1D and have biases; a plain forward, without no_grad, must work too."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)
    whole = GPT2LMHeadModel(config).eval()
    whole.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    loaded = load(ModelChoice(str(tmp_path), use_4bit=True))
    assert loaded.quantization == NF4
    ids = loaded.tokenizer("the fox", return_tensors="pt").to(loaded.model.device)
    off = (loaded.model(**ids).logits - whole(**ids.to("cpu")).logits).abs().max()
    assert off < 0.5


def test_4bit_of_a_quantized_model_falls_back_visibly(broken: Path) -> None:
    four = load(ModelChoice(str(broken), use_4bit=True))
    four.model.save_pretrained(broken / "again")
    write_tokenizer(broken / "again")
    with pytest.warns(QuantizationFallback, match=r"4-bit was requested.*already quantized"):
        loaded = load(ModelChoice(str(broken / "again"), use_4bit=True))
    assert loaded.requested.use_4bit
    assert "bitsandbytes" in str(loaded.fallback_reason)


def test_4bit_without_bitsandbytes_falls_back_visibly(tiny: Path, tmp_path: Path) -> None:
    """In its own process, in which the import fails as on a machine without it."""
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('no such library')")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from oki_trace.llm.loading.load import load\n"
        "from oki_trace.records import ModelChoice\n"
        f"loaded = load(ModelChoice({str(tiny)!r}, use_4bit=True))\n"
        "print(loaded.dtype, loaded.quantization, loaded.fallback_reason)"
    )
    done = run_python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.stdout.startswith("float32 None bitsandbytes does not work here")
    assert "no such library" in done.stdout
    assert "QuantizationFallback" in done.stderr
