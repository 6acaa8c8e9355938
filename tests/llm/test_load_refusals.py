"""Loading: the error when a model cannot be loaded."""

from __future__ import annotations

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from oki_trace.errors import UsageError
from oki_trace.llm.loading.load import load
from oki_trace.records import ModelChoice
from tests.llm.loading import (
    VOCABULARY,
    edit_config,
    llama_config,
    refusal,
    run_python,
    write_gguf,
    write_tokenizer,
)

# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/model", "nowhere/else/at/all", "nowhere.gguf", "C:\\models\\x"]
)
def test_missing_path(name: str) -> None:
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
def test_missing_or_broken_tokenizer(broken: Path, damage: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if damage == "missing":
            (broken / name).unlink()
        else:
            (broken / name).write_text('{"model": {')
    message = refusal(broken)
    assert "tokenizer" in message
    assert "tokenizer.json" in message


def test_too_big_for_this_machine(broken: Path) -> None:
    edit_config(broken, hidden_size=65536, intermediate_size=262144)
    message = refusal(broken, device="cpu")
    assert "GB of memory" in message
    assert "--4bit" in message


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_out_of_memory_while_loading(tmp_path: Path) -> None:
    """In its own process, whose address space is too small for the weights."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=1024, n_layer=8, n_head=8)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    code = (
        "import resource\n"
        "from oki_trace.errors import ModelError\n"
        "from oki_trace.llm.loading.load import load\n"
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
def test_invalid_options(
    tiny: Path, options: dict[str, str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        load(ModelChoice(str(tiny), **options))


def test_missing_device(tiny: Path) -> None:
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


def test_errors_of_the_hub(tmp_path: Path) -> None:
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
        "from oki_trace.llm.loading.load import load\n"
        "from oki_trace.records import ModelChoice\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        f"        load(ModelChoice(name), cache_dir={str(cache)!r})\n"
        "    except ModelError as error:\n"
        "        print(error)\n"
    )
    done = run_python(code, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1")
    return done.stdout.splitlines()
