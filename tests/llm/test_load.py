"""Loading: what is got from each kind of name, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from oki_trace.errors import ModelError, UsageError
from oki_trace.llm.fourbit import NF4, QuantizationFallback
from oki_trace.llm.hardware import native_dtype
from oki_trace.llm.load import load, load_model_and_tokenizer
from oki_trace.records import ModelChoice

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 300


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def llama_config(**changes: Any) -> LlamaConfig:
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**{**small, **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Llama with a tokenizer, in float32. Copy it before breaking it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(name: object, **options: Any) -> str:
    """What a person is told when ``name`` cannot be loaded."""
    with pytest.raises(ModelError) as caught:
        load(ModelChoice(str(name), **options))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "`")) or "not installed" in message
    return message


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
def test_dtype_asked_for(tiny: Path, name: str, dtype: str) -> None:
    loaded = load(ModelChoice(str(tiny), dtype=name, device="cpu"))
    assert loaded.dtype == dtype
    assert loaded.model.dtype == getattr(torch, dtype)
    assert loaded.device == "cpu"


def test_torch_dtype_is_taken_too(tiny: Path) -> None:
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


def test_progress_is_told(tiny: Path) -> None:
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
    with pytest.raises(ModelError, match=r"cut short.*download it again"):
        load_model_and_tokenizer("someone/tiny-llama", False, cache)


def test_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.warns(QuantizationFallback, match="quantized already"):
        loaded = load(ModelChoice(str(path), use_4bit=True))
    assert loaded.dtype == "float32"
    assert loaded.quantization == "gguf, dequantized"
    ids = loaded.tokenizer("the fox", return_tensors="pt")
    assert loaded.model(**ids).logits.shape[-1] == loaded.model.config.vocab_size

    os.truncate(path, path.stat().st_size - 4096)
    assert "cut short" in refusal(path)
    path.write_bytes(b"<html>" + bytes(100))
    assert "not a GGUF file" in refusal(path)


def write_gguf(path: Path) -> Path:
    """A tiny Llama as llama.cpp's converter would write it."""
    from gguf import GGUFWriter, TokenType

    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=1)
    state = LlamaForCausalLM(config).state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "ox"]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    controls = [len(token) > 2 for token in tokens]
    types = [TokenType.CONTROL if control else TokenType.NORMAL for control in controls]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "o x"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names |= {f"model.layers.0.{k}.weight": f"blk.0.{v}.weight" for k, v in parts.items()}
    for name, tensor in state.items():
        writer.add_tensor(names[name], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    """bitsandbytes takes these shapes and, on some CPUs, refuses them at the first token."""
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
    with pytest.warns(QuantizationFallback, match=r"4-bit was asked for.*quantized already"):
        loaded = load(ModelChoice(str(broken / "again"), use_4bit=True))
    assert loaded.requested.use_4bit
    assert "bitsandbytes" in str(loaded.fallback_reason)


def test_4bit_without_bitsandbytes_falls_back_visibly(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own, where importing it fails as on a machine without it."""
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('no such library')")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from oki_trace.llm.load import load\n"
        "from oki_trace.records import ModelChoice\n"
        f"loaded = load(ModelChoice({str(tiny)!r}, use_4bit=True))\n"
        "print(loaded.dtype, loaded.quantization, loaded.fallback_reason)"
    )
    done = run_python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.stdout.startswith("float32 None bitsandbytes does not work here")
    assert "no such library" in done.stdout
    assert "QuantizationFallback" in done.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
    )


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/model", "nowhere/else/at/all", "nowhere.gguf", "C:\\models\\x"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    assert f"There is no {name} here" in refusal(name)


def test_empty_name() -> None:
    assert "name is empty" in refusal("  ")


def test_a_file_that_is_not_a_model(tiny: Path) -> None:
    assert "Name the folder that holds it" in refusal(tiny / "model.safetensors")


def test_unknown_hub_id_while_offline() -> None:
    assert "HF_HUB_OFFLINE is set" in refusal("someone/never-downloaded")


def test_folder_without_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    assert "has no config.json" in refusal(broken)


def test_folder_of_ggufs_names_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert str(tmp_path / "tiny.gguf") in refusal(tmp_path)


def test_pickled_weights_are_not_opened(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(broken)
    torch.save(state, broken / "pytorch_model.bin")
    assert "only safetensors is read" in refusal(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000])
@pytest.mark.parametrize("use_4bit", [False, True])
def test_half_downloaded_weights(broken: Path, keep: int, use_4bit: bool) -> None:
    os.truncate(broken / "model.safetensors", keep)
    message = refusal(broken, use_4bit=use_4bit)
    assert "model.safetensors is" in message
    assert "download it again" in message


def test_missing_shard(tiny: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="100KB")
    write_tokenizer(tmp_path)
    load(ModelChoice(str(tmp_path)))
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name} (1 of" in refusal(tmp_path)


def test_missing_weights_are_not_made_up(broken: Path) -> None:
    weights = broken / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    message = refusal(broken)
    assert "lacks weights" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_classifier_is_refused(tmp_path: Path) -> None:
    LlamaForSequenceClassification(llama_config(pad_token_id=0)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert "lacks weights that a causal language model needs (lm_head" in refusal(tmp_path)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert "encoder-decoder model (t5)" in refusal(tmp_path)


def test_masked_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert "fill in masked words" in refusal(tmp_path)


def test_vision_model_is_refused(broken: Path) -> None:
    edit_config(broken, model_type="vit", architectures=["ViTForImageClassification"])
    assert "not a causal language model" in refusal(broken)


def test_unknown_model_type(broken: Path) -> None:
    edit_config(broken, model_type="llama99", architectures=["Llama99ForCausalLM"])
    message = refusal(broken)
    assert "'llama99', unknown to transformers" in message
    assert "pip install --upgrade transformers" in message


def test_config_without_type(broken: Path) -> None:
    edit_config(broken, model_type=None)
    assert "names no model_type" in refusal(broken)


def test_config_that_is_not_json(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "llama", ')
    assert "not valid JSON" in refusal(broken)


def test_own_code_is_not_run(broken: Path, tmp_path: Path) -> None:
    edit_config(
        broken,
        model_type="own",
        architectures=["Own"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    )
    (broken / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "trust_remote_code=True" in refusal(broken)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_tokenizer_trouble(broken: Path, damage: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if damage == "missing":
            (broken / name).unlink()
        else:
            (broken / name).write_text('{"model": {')
    message = refusal(broken)
    assert "tokenizer" in message
    assert "tokenizer.json" in message


def test_too_big_for_this_machine(broken: Path) -> None:
    edit_config(broken, hidden_size=65536, intermediate_size=262144, num_hidden_layers=200)
    message = refusal(broken, device="cpu")
    assert "GB of memory" in message
    assert "--4bit" in message


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_memory_that_runs_out_while_loading(tmp_path: Path) -> None:
    """In a process of its own, held to an address space that the weights do not fit into."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=1024, n_layer=8, n_head=8)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    code = (
        "import resource\n"
        "from oki_trace.errors import ModelError\n"
        "from oki_trace.llm.load import load\n"
        "from oki_trace.records import ModelChoice\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, -1))\n"
        "try:\n"
        f"    load(ModelChoice({str(tmp_path)!r}, dtype='fp32', device='cpu'))\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    assert "not enough memory" in run_python(code).stdout


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dtype": "int3"}, UsageError, "no dtype 'int3'"),
        ({"device": "toaster"}, UsageError, "no device 'toaster'"),
    ],
)
def test_options_that_make_no_sense(
    tiny: Path, options: dict[str, str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        load(ModelChoice(str(tiny), **options))


def test_device_that_is_not_there(tiny: Path) -> None:
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    assert "sees no cuda:7 device" in refusal(tiny, device="cuda:7")


# ---------------------------------------------------------------- the hub's answers


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for gated and unknown models, on the loopback address."""

    def answer(self) -> None:
        code = "GatedRepo" if "/gated" in self.path else "RepoNotFound"
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET = answer

    def log_message(self, *args: Any) -> None:
        pass


def test_what_the_hub_answers(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        port = server.server_port
        said = ask_hub(f"http://127.0.0.1:{port}", tmp_path, "someone/gated", "someone/unknown")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    gated, unknown = said
    assert "is gated" in gated
    assert "hf auth login" in gated
    assert "no model of that name on the hub" in unknown


@pytest.mark.slow
def test_no_network(tmp_path: Path) -> None:
    (said,) = ask_hub("http://127.0.0.1:9", tmp_path, "someone/unreachable")
    assert "the hub cannot be reached" in said


def ask_hub(endpoint: str, cache: Path, *names: str) -> list[str]:
    code = (
        "from oki_trace.errors import ModelError\n"
        "from oki_trace.llm.load import load\n"
        "from oki_trace.records import ModelChoice\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        f"        load(ModelChoice(name), cache_dir={str(cache)!r})\n"
        "    except ModelError as error:\n"
        "        print(error)\n"
    )
    done = run_python(code, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1")
    return done.stdout.splitlines()


def test_no_warning_when_all_went_well(tiny: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(ModelChoice(str(tiny)))
