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
import streamlit as st
from streamlit.testing.v1 import AppTest

from oki_trace import load_model_and_tokenizer, run_traced
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import migrate
from tests import tiny
from tests.families import configs
from tests.families.examine import examine

TESTS = Path(__file__).resolve().parent

PROOFS = {
    "the chosen token of every step": [
        "test_api.py::test_the_trace_says_what_was_given_and_got",
        "llm/test_capture.py::test_greedy_tokens_are_those_of_generate",
    ],
    "the next-token distribution, top-k": [
        "test_api.py::test_what_is_said_twice_is_the_same",
        "llm/test_capture.py::test_distribution_is_the_models_own",
    ],
    "evidence: what the newest position attended to, in the prompt and in the reply so far": [
        "test_promises.py::test_evidence_is_of_the_prompt_and_of_the_reply_so_far",
        "test_api.py::test_positions_count_through_prompt_and_reply",
        "llm/test_capture.py::test_attention_is_the_models_own_eager_attention",
    ],
    "a Logit Lens at every layer": [
        "test_api.py::test_what_is_said_twice_is_the_same",
        "llm/test_capture.py::test_lens_is_the_models_own_norm_and_head_at_every_layer",
    ],
    "any causal model of Hugging Face: Qwen, Llama, Mistral, Phi, GPT-2 and so on": [
        "test_promises.py::test_the_families_named_are_traced_whole",
        "llm/test_families.py::test_a_model_type_is_traced_as_the_page_says",
        "llm/test_load.py::test_hub_id_from_the_cache",
    ],
    "attention with fallbacks where a model or its backend gives none": [
        "test_promises.py::test_a_model_without_attention_is_traced_all_the_same",
        "llm/test_families.py::test_a_model_type_is_traced_as_the_page_says",
    ],
    "a Logit Lens that is skipped where norm and head are not found": [
        "test_promises.py::test_a_model_without_a_lens_is_traced_all_the_same",
        "llm/test_families.py::test_a_model_type_is_traced_as_the_page_says",
    ],
    "4-bit is optional, with a fallback to the model's own precision": [
        "llm/test_load.py::test_4bit_on_the_built_in_model",
        "llm/test_load.py::test_4bit_that_loads_but_cannot_run_falls_back",
        "llm/test_load.py::test_4bit_without_bitsandbytes_falls_back_visibly",
    ],
    "a chat template, or USER and ASSISTANT": [
        "llm/test_chat.py::test_the_models_own_template_is_used",
        "llm/test_chat.py::test_without_a_template_the_plain_form_is_used",
    ],
    "a dashboard to chat in, each reply traced": [
        "dashboard/test_browser_chat.py::test_a_new_user_asks_and_sees_why_each_token_was_chosen",
    ],
    "a click on a token shows its step": [
        "dashboard/test_browser_chat.py::test_a_new_user_asks_and_sees_why_each_token_was_chosen",
        "exchange/test_report.py::test_a_click_and_the_keys_choose_a_step",
    ],
    "how the model arrived at a token, layer by layer": [
        "dashboard/test_page_chat.py::test_the_lens_is_shown_in_every_way",
        "dashboard/test_browser_reply_map.py::test_a_cell_tells_its_layer_and_leads_to_its_step",
    ],
    "the model and 4-bit are chosen in the sidebar": [
        "test_promises.py::test_the_model_and_4bit_are_chosen_in_the_sidebar",
    ],
    "everything runs locally; no telemetry, no cloud": [
        "privacy/test_cut_off.py::test_a_whole_turn_and_every_page_with_the_network_cut_off",
        "privacy/test_rules.py::test_nothing_here_speaks_to_another_machine",
        "dashboard/test_launch.py::test_ui_listens_here_alone_and_ends_with_what_it_started",
    ],
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
        assert test in tests, proof


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


def test_evidence_is_of_the_prompt_and_of_the_reply_so_far() -> None:
    _, trace = run_traced(
        "the fox", None, 3, tiny.model("llama"), tiny.tokenizer(), topk_evidence=100
    )
    for step in trace["steps"]:
        seen = sorted(entry["position"] for entry in step["evidence"])
        assert seen == list(range(trace["prompt_len"] + step["step"]))
        assert sum(entry["in_prompt"] for entry in step["evidence"]) == trace["prompt_len"]
        assert sum(entry["weight"] for entry in step["evidence"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "model_type", ["qwen2", "qwen3", "llama", "mistral", "phi", "phi3", "gpt2"]
)
def test_the_families_named_are_traced_whole(model_type: str) -> None:
    found = examine(model_type)
    assert found.is_whole and found.greedy and found.sampled
    assert found.lens_reason is None and found.attention_reason is None


def test_a_model_without_attention_is_traced_all_the_same() -> None:
    _, trace = run_traced("the fox", None, 3, configs.build("mamba"), tiny.tokenizer())
    assert "returns no attention weights" in trace["evidence_provenance"]
    assert len(trace["steps"]) == 3
    for step in trace["steps"]:
        assert step["evidence"] == [] and step["logits_topk"] and step["logit_lens"]


def test_a_model_without_a_lens_is_traced_all_the_same() -> None:
    """One whose head reads two streams joined, which no layer before has."""
    text, trace = run_traced("the fox", None, 3, configs.build("reformer"), tiny.tokenizer())
    assert trace["logit_lens_available"] is False and trace["output"] == text
    assert "cannot be replayed" in trace["capture"]["lens_reason"]
    assert len(trace["steps"]) == 3
    for step in trace["steps"]:
        assert step["logit_lens"] == [] and step["logits_topk"] and step["evidence"]


def test_the_model_and_4bit_are_chosen_in_the_sidebar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen there is what the reply is asked of; no process is started to answer."""
    from dashboard import data

    db = tmp_path / "chosen.db"
    migrate.ensure(db)
    monkeypatch.setenv("OKI_TRACE_DB", str(db))
    monkeypatch.setenv("OKI_TRACE_MODEL", "someone/a-model")
    monkeypatch.setattr(data, "ensure_worker", lambda: None)
    app = AppTest.from_file(str(TESTS.parent / "dashboard" / "Home.py"), default_timeout=60).run()
    try:
        assert app.sidebar.selectbox(key="model").value == "someone/a-model"
        assert app.sidebar.toggle(key="four_bit").value is False
        app.sidebar.selectbox(key="model").select("smollm2")
        app.sidebar.toggle(key="four_bit").set_value(True)
        app.chat_input[0].set_value("Hello").run()
        assert not app.exception
        with TraceReader(db) as reader:
            reply = reader.messages(1)[-1]
        assert reply.choice is not None
        assert (reply.choice.model_id, reply.choice.use_4bit) == ("smollm2", True)
    finally:
        data._reader(data.store_name()).close()
        data._writer(data.store_name()).close()
        st.cache_resource.clear()
        st.cache_data.clear()


def test_everything_runs_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something wants to leave the machine")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run_traced("the fox", None, 2, tiny.model("gpt2"), tiny.tokenizer())
