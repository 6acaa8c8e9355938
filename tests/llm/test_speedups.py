"""The optional fast paths can be switched off or deleted, and every reply says which it used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oki_trace.llm.capture.instrument import instrument
from oki_trace.records import CapturePolicy, CaptureReport, ChatMessage, Role, Sampling
from oki_trace.tracing import Collector, trace_turn
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("preallocated KV cache", "step graph", "prepacked weights"),
    *("draft lens", "prefix reuse"),
]
STEPS = 12


def turn(model: Any) -> tuple[CaptureReport, list[int], list[Any]]:
    """The capture report, the tokens, and all numbers of one reply."""
    model.generation_config.eos_token_id = None
    collector = Collector()
    messages = [ChatMessage(Role.USER, "the quick brown fox")]
    made = instrument(model, tiny.tokenizer())
    trace_turn(made, "tiny", messages, Sampling(STEPS), CapturePolicy(), [collector])
    assert collector.started is not None
    numbers = [
        [step.logit, step.entropy, step.topk.probs.tolist(), step.evidence.weights.tolist()]
        for step in collector.steps
        if step.evidence is not None
    ]
    lenses = [[lens.logits.tolist(), lens.kl.tolist()] for lens in collector.lenses]
    ids = [step.token_id for step in collector.steps]
    return collector.started.capture, ids, [*numbers, *lenses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_a_reply_is_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama").to(dtype)
    fast, fast_ids, fast_numbers = turn(model)
    monkeypatch.setenv("OKI_TRACE_FAST", "0")
    plain, ids, numbers = turn(model)
    assert list(fast.speedups) == list(plain.speedups) == NAMES
    assert set(plain.speedups.values()) == {"switched off by OKI_TRACE_FAST"}
    assert fast.speedups["step graph"] is None and fast.speedups["preallocated KV cache"] is None
    assert ids == fast_ids and len(ids) == STEPS
    assert numbers == fast_numbers
    monkeypatch.delenv("OKI_TRACE_FAST")
    assert turn(model)[0].speedups == fast.speedups


def test_a_path_that_is_off_says_why() -> None:
    capture, _, _ = turn(tiny.model("gemma2"))
    assert capture.speedups["step graph"] == "its cache holds more than growing keys and values"
    assert capture.speedups["prepacked weights"] == "needs a step graph"
    assert capture.speedups["draft lens"]
    assert "step graph off (its cache holds" in capture.fast_paths


def test_the_package_can_be_deleted(tmp_path: Path) -> None:
    """The product without ``llm/fast``: a turn is traced, and gives the tokens of generate()."""
    copied = tmp_path / "oki_trace"
    shutil.copytree(ROOT / "oki_trace", copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("golden"))
    shutil.rmtree(copied / "llm" / "fast")
    script = tmp_path / "turn.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, oki_trace\n"
        "from oki_trace import run_traced\n"
        "from tests import tiny\n"
        f"assert oki_trace.__file__.startswith({str(tmp_path)!r})\n"
        "model = tiny.model('llama')\n"
        "model.generation_config.eos_token_id = None\n"
        "tokenizer = tiny.tokenizer()\n"
        "_, reply = run_traced('the quick', None, 6, model, tokenizer)\n"
        "ids = torch.tensor([reply['prompt_token_ids']])\n"
        "own = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1]:].tolist()\n"
        "assert [step['chosen_id'] for step in reply['steps']] == own, reply\n"
        "assert reply['steps'][0]['logit_lens'], 'the lens is there'\n"
        "print(reply['capture']['speedups']['step graph'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the package oki_trace.llm.fast is missing"
