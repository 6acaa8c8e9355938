"""What the tool that this one replaces promised, claim by claim, and where each is proved.

Each test here shows the claim itself, on a small model; ``PROOFS`` names the
tests that hold it in depth, and a test sees to it that they are there.
"""

from __future__ import annotations

import ast
import inspect
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from oki_trace import load_model_and_tokenizer, run_traced
from tests import tiny

TESTS = Path(__file__).resolve().parent

PROOFS = {
    "the chosen token of every step": [
        "test_api.py::test_the_trace_says_what_was_given_and_got",
        "test_tracing.py",
    ],
    "the next-token distribution, top-k": [
        "test_api.py::test_what_is_said_twice_is_the_same",
        "llm/test_capture.py",
    ],
    "evidence: the attention of the newest position": [
        "test_api.py::test_positions_count_through_prompt_and_reply",
        "llm/test_capture.py",
    ],
    "a Logit Lens at every layer": [
        "test_api.py::test_what_is_said_twice_is_the_same",
        "llm/test_capture.py",
    ],
    "any causal model of Hugging Face": ["llm/test_load.py"],
    "4-bit is optional, with a fallback": ["llm/test_load.py"],
    "a chat template, or USER and ASSISTANT": ["llm/test_chat.py"],
    "a dashboard to chat in, each reply traced": ["dashboard/test_browser_chat.py"],
    "a click on a token shows its step": [
        "dashboard/test_browser_chat.py",
        "exchange/test_report.py",
    ],
    "everything runs locally": ["dashboard/test_start.py"],
    "its trace files open here, and ours there": [
        "exchange/test_import_v1.py::test_every_view_shows_it",
        "exchange/test_formats.py::test_version_1_has_its_names_and_no_other",
    ],
    "its scripts run unchanged": ["test_api.py::test_callers_of_the_tool_replaced_need_not_change"],
}

# The trace that its viewer reads.
V1_TRACE = {
    *("model_id", "prompt", "output", "prompt_len", "messages", "evidence_provenance"),
    *("logit_lens_available", "steps"),
}
V1_STEP = {"step", "chosen_token", "chosen_id", "logits_topk", "evidence", "logit_lens"}


@pytest.mark.parametrize("claim", PROOFS)
def test_each_claim_has_its_proof(claim: str) -> None:
    for proof in PROOFS[claim]:
        name, _, test = proof.partition("::")
        tree = ast.parse((TESTS / name).read_text(encoding="utf-8"))
        tests = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert test in tests if test else any(n.startswith("test_") for n in tests), proof


@pytest.fixture(scope="module")
def traced() -> tuple[str, dict[str, Any]]:
    return run_traced(
        prompt="the quick brown fox",
        max_new_tokens=4,
        model=tiny.model("llama"),
        tokenizer=tiny.tokenizer(),
        topk_logits=5,
        topk_evidence=3,
        topk_lens=2,
    )


def test_a_script_of_the_old_tool_runs_unchanged(tmp_path: Path) -> None:
    """Loading from a name, tracing by keywords, saving with json: only the import differs."""
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model, tokenizer = load_model_and_tokenizer(str(tmp_path / "m"), use_4bit=False, cache_dir=None)
    text, trace = run_traced(
        messages=[{"role": "user", "content": "the fox"}],
        max_new_tokens=3,
        model=model,
        tokenizer=tokenizer,
    )
    (tmp_path / "trace.json").write_text(json.dumps(trace, indent=2))
    assert json.loads((tmp_path / "trace.json").read_text())["output"] == text
    # By place as well.
    assert run_traced("the fox", None, 3, model, tokenizer, 10, 10, 5)[0] == text


def test_the_signatures_are_kept() -> None:
    assert [*inspect.signature(load_model_and_tokenizer).parameters][:3] == [
        *("model_id", "use_4bit", "cache_dir"),
    ]
    assert [*inspect.signature(run_traced).parameters][:8] == [
        *("prompt", "messages", "max_new_tokens", "model", "tokenizer"),
        *("topk_logits", "topk_evidence", "topk_lens"),
    ]


def test_every_name_of_a_version_1_trace_is_there(traced: tuple[str, dict[str, Any]]) -> None:
    _, trace = traced
    assert set(trace) >= V1_TRACE
    for step in trace["steps"]:
        assert set(step) >= V1_STEP
        assert all({"token", "prob"} <= set(entry) for entry in step["logits_topk"])
        wanted = {"token", "weight", "position", "in_prompt", "relative"}
        assert all(wanted <= set(entry) for entry in step["evidence"])
        assert all({"layer", "topk"} <= set(row) for row in step["logit_lens"])


def test_every_step_has_the_chosen_token(traced: tuple[str, dict[str, Any]]) -> None:
    text, trace = traced
    assert len(trace["steps"]) == 4
    said = b"".join(
        bytes.fromhex(step["chosen_bytes"]) for step in trace["steps"] if not step["is_special"]
    )
    assert said.decode(errors="replace") == text


def test_every_step_has_what_else_was_considered(traced: tuple[str, dict[str, Any]]) -> None:
    for step in traced[1]["steps"]:
        probs = [entry["prob"] for entry in step["logits_topk"]]
        assert len(probs) == 5 and probs == sorted(probs, reverse=True)


def test_every_step_has_its_evidence(traced: tuple[str, dict[str, Any]]) -> None:
    for step in traced[1]["steps"]:
        assert len(step["evidence"]) == 3
        assert all(0 <= entry["weight"] <= 1 for entry in step["evidence"])


def test_every_layer_says_what_it_would_have_predicted(
    traced: tuple[str, dict[str, Any]],
) -> None:
    for step in traced[1]["steps"]:
        assert [row["layer"] for row in step["logit_lens"]] == list(range(tiny.LAYERS + 1))
        last = step["logit_lens"][-1]["topk"]
        assert [entry["token"] for entry in last] == [
            entry["token"] for entry in step["logits_topk"][:2]
        ]


def test_everything_runs_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something wants to leave the machine")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run_traced("the fox", None, 2, tiny.model("gpt2"), tiny.tokenizer())
