"""Harmful model files are refused in one line, within seconds and in little memory."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from oki_trace.llm.loading.file_checks import check_folder, check_gguf, check_numbers
from oki_trace.llm.loading.gguf_header import read_gguf_header
from tests.llm.loading import edit_config, refusal, write_gguf

GGUF_STRING, GGUF_ARRAY, GGUF_UINT32 = 8, 9, 4


def gguf_with(*entries: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + b"".join(entries)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def array(name: str, of: int, length: int, values: bytes = b"") -> bytes:
    return entry(name, GGUF_ARRAY, struct.pack("<IQ", of, length) + values)


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf_with(array("x", GGUF_STRING, 1 << 60)), "declares 1,152,921,504,606,846,976 values"),
        (gguf_with(array("x", GGUF_STRING, 1 << 24, bytes(8 << 24))), "16,777,216 values in x"),
        (gguf_with(array("x", GGUF_UINT32, 1 << 19)), "is truncated"),
        (gguf_with(entry("x", GGUF_STRING, struct.pack("<Q", 1 << 50))), "bytes in x"),
        (gguf_with(entry("x", 77, b"")), "an entry x of an unknown kind"),
        (gguf_with(tensors=1 << 40), "declares 1,099,511,627,776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 61), "entries"),
        (
            gguf_with(*(array(f"x{i}", GGUF_UINT32, 1 << 19, bytes(4 << 19)) for i in range(5))),
            "declares more than 2,097,152 values",
        ),
        (b"GGUF" + struct.pack("<I", 99), "version 99"),
        (b"GGUF", "is truncated"),
        (
            gguf_with(entry("llama.block_count", GGUF_UINT32, struct.pack("<I", 10**9))),
            "llama.block_count = 1,000,000,000",
        ),
    ],
    ids=range(11),
)
def test_a_gguf_that_declares_too_much(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    began = time.monotonic()
    assert said in refusal(path)
    assert time.monotonic() - began < 5


def test_nested_arrays_are_bounded_too(tmp_path: Path) -> None:
    value = b""
    for _ in range(2000):
        value = struct.pack("<IQ", GGUF_ARRAY, 1) + value
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_with(entry("x", GGUF_ARRAY, value + struct.pack("<IQ", 4, 0))))
    assert "unknown kind" in refusal(path)


def test_the_header_of_a_whole_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    header = read_gguf_header(path)
    assert header.tensors == 12
    assert header.numbers["llama.block_count"] == 1
    assert check_gguf(path).tensors == 12
    whole = path.read_bytes()
    # Wherever it is cut within its header, the error says so.
    for length in range(4, 3000, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is truncated"):
            read_gguf_header(path)


# ---------------------------------------------------------------- safetensors


def _with_tensor(path: Path, **values: Any) -> None:
    """Add a tensor to a safetensors file's header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length]) | {"more": values}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_sparse_file(broken: Path) -> None:
    """A gigabyte of holes takes no disk space, but memory when it is read."""
    weights = broken / "model.safetensors"
    end = max(
        value["data_offsets"][1]
        for name, value in _header(weights).items()
        if name != "__metadata__"
    )
    size = 1 << 30
    _with_tensor(weights, dtype="F32", shape=[size // 4], data_offsets=[end, end + size])
    os.truncate(weights, weights.stat().st_size + size)
    refused = refusal(weights.parent)
    assert "is incomplete: only " in refused and " of its 1,0" in refused


def _header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found: dict[str, Any] = json.loads(content[8 : 8 + length])
    return found


def test_an_oversized_header(broken: Path) -> None:
    weights = broken / "model.safetensors"
    text = b"{" + b" " * 17_000_000 + b"}"
    weights.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "has a header of 17,000,002 bytes" in refusal(broken)


def test_a_config_with_more_parameters_than_weights(broken: Path) -> None:
    edit_config(broken, intermediate_size=1 << 19, hidden_size=1024, head_dim=16)
    assert "parameters, but its weights have" in refusal(broken, device="cpu")


# ---------------------------------------------------------------- numbers and files


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000"),
        ({"num_hidden_layers": 1000}, "its weights have 21 tensors in all"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_attention_heads": 10**8}, "num_attention_heads"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_that_no_model_has(broken: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(broken, **changes)
    began = time.monotonic()
    assert said in refusal(broken)
    assert time.monotonic() - began < 5


def test_numbers_of_large_models_are_accepted() -> None:
    check_numbers(
        {
            "num_hidden_layers": 126,
            "vocab_size": 262_208,
            "num_attention_heads": 128,
            "n_routed_experts": 384,
            "max_position_embeddings": 10_485_760,
            "vision_config": {"depth": 32, "num_hidden_layers": 48},
        },
        "config.json",
        None,
    )


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_pipe_among_the_files(broken: Path, name: str) -> None:
    (broken / name).unlink()
    os.mkfifo(broken / name)
    assert f"{broken / name} is a named pipe" in refusal(broken)


def test_a_device_among_the_files(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.json").symlink_to("/dev/zero")
    assert "tokenizer.json is a device" in refusal(broken)


def test_a_pipe_as_a_gguf(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    assert "is neither a file nor a folder" in refusal(tmp_path / "model.gguf")


def test_an_oversized_text(broken: Path) -> None:
    os.truncate(broken / "tokenizer.json", 1 << 34)
    assert "no model needs more than" in refusal(broken)


def test_an_index_that_leads_out_of_the_folder(broken: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    state = load_file(broken / "model.safetensors")
    save_file(state, elsewhere, metadata={"format": "pt"})
    (broken / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "../elsewhere.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../elsewhere.safetensors, which is not in the folder" in refusal(broken)


def test_a_valid_model_folder(tiny: Path) -> None:
    found = check_folder(tiny)
    assert found is not None
    assert found.tensors == 21
    assert found.bytes < (tiny / "model.safetensors").stat().st_size


def test_an_incomplete_download_is_not_refused(tiny: Path, tmp_path: Path) -> None:
    """The parts that have arrived do not describe the missing ones."""
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="50KB")
    parts = sorted(tmp_path.glob("*-of-*.safetensors"))
    for part in parts[1:]:
        part.unlink()
    edit_config(tmp_path, num_hidden_layers=30)
    assert check_folder(tmp_path) is None


def test_unrelated_files_are_ignored(tmp_path: Path) -> None:
    """A GGUF file may be in any folder; only the files that belong to a model are checked."""
    path = write_gguf(tmp_path / "tiny.gguf")
    os.mkfifo(tmp_path / "control")
    os.mkfifo(tmp_path / "other.json")
    assert check_gguf(path).tensors == 12
    assert check_folder(tmp_path.parent) is None
    os.mkfifo(tmp_path / "tokenizer_config.json")
    assert "tokenizer_config.json is a named pipe" in refusal(path)
