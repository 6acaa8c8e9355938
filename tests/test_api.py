"""``run_traced`` and ``load_model_and_tokenizer``, as scripts and notebooks call them."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

import oki_trace
from oki_trace import load_model_and_tokenizer, run_traced
from oki_trace.errors import CaptureError, UsageError
from oki_trace.exchange.json_export import trace_of
from oki_trace.llm.loading.quantization import QuantizationFallback
from oki_trace.records import Status
from oki_trace.store.reading.reader import TraceReader
from tests import tiny

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over the lazy dog"},
]
TOKENS = 8

# The names of the contract, and after the gap those that stand beside them.
TRACE = {
    *("format", "version", "model_id", "prompt", "prompt_len", "prompt_token_ids", "output"),
    *("messages", "status", "evidence_provenance", "logit_lens_available", "generation"),
    *("capture", "steps", "prompt_steps"),
    *("reason", "prompt_tokens", "prompt_segments", "checks"),
    *("parts", "template"),
}
STEP = {
    *("step", "chosen_token", "chosen_id", "position", "prob", "logprob", "entropy", "rank"),
    *("logits_topk", "evidence", "attention", "logit_lens"),
    *("margin", "sampled_prob", "decision"),
    *("chosen_bytes", "is_special", "logit", "origin"),
}
CANDIDATE = {*("rank", "token_id", "token", "logit", "prob"), "sampled_prob", "noise"}
EVIDENCE = {"rank", "position", "token_id", "token", "weight", "in_prompt", "relative"}
ATTENTION = {*("layer", "topk"), "missing"}
ATTENDED = {"rank", "position", "weight"}
LENS = {*("layer", "topk", "chosen_rank", "chosen_prob", "entropy"), "kl"}
LENS_CANDIDATE = {"rank", "token_id", "token", "logit", "prob"}


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    return tiny.model("llama"), tiny.tokenizer()


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def traced(request: pytest.FixtureRequest, llama: tuple[Any, Any]) -> tuple[str, dict[str, Any]]:
    model, tokenizer = llama
    sampling: dict[str, Any] = {}
    if request.param == "sampled":
        sampling = {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "seed": 1}
    return run_traced(None, MESSAGES, TOKENS, model, tokenizer, **sampling)


# ------------------------------------------------------------------- signatures


def test_the_package_offers_both() -> None:
    assert {"load_model_and_tokenizer", "run_traced"} <= set(oki_trace.__all__)
    assert oki_trace.run_traced is run_traced
    assert oki_trace.load_model_and_tokenizer is load_model_and_tokenizer
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = oki_trace.no_such_name


def test_callers_of_the_tool_replaced_need_not_change() -> None:
    """The parameters that there were, in their order, each by place or by name."""

    def leading(function: Any, count: int) -> list[tuple[str, Any]]:
        parameters = list(inspect.signature(function).parameters.values())
        kinds = {p.kind for p in parameters[:count]}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        # What follows cannot be given by accident.
        assert {p.kind for p in parameters[count:]} == {inspect.Parameter.KEYWORD_ONLY}
        assert all(p.default is not inspect.Parameter.empty for p in parameters)
        return [(p.name, p.default) for p in parameters[:count]]

    assert leading(load_model_and_tokenizer, 3) == [
        ("model_id", None),
        ("use_4bit", True),
        ("cache_dir", None),
    ]
    assert leading(run_traced, 8) == [
        ("prompt", None),
        ("messages", None),
        ("max_new_tokens", 64),
        ("model", None),
        ("tokenizer", None),
        ("topk_logits", 10),
        ("topk_evidence", 10),
        ("topk_lens", 5),
    ]


# -------------------------------------------------------------------- arguments


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "messages": MESSAGES}])
def test_exactly_one_of_prompt_and_messages(given: dict[str, Any], llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    with pytest.raises(UsageError, match="Give exactly one of prompt and messages"):
        run_traced(**given, model=model, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"messages": []}, "There are no messages"),
        ({"messages": [{"role": "user"}]}, "needs a role .* and a content"),
        ({"messages": [{"content": "a"}]}, "needs a role .* and a content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "needs a role .* and a content"),
        ({"messages": ["the fox"]}, "needs a role .* and a content"),
        ({"messages": "the fox"}, "needs a role .* and a content"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string"),
        ({"prompt": ["the fox"]}, "must be a string"),
        ({"prompt": "a", "max_new_tokens": -1}, "(?i)max_new_tokens must be 0 or more"),
        ({"prompt": "a", "temperature": -0.5}, "(?i)temperature must be"),
        ({"prompt": "a", "temperature": math.nan}, "(?i)temperature must be"),
        ({"prompt": "a", "top_p": 0}, "(?i)top_p must be"),
        (
            {"prompt": "a", "topk_logits": 0},
            "(?i)topk_logits must be a whole number from 1 to 1000",
        ),
        ({"prompt": "a", "tensors": "all", "db": "never.db"}, "(?i)tensors must be one of"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    given: dict[str, Any], complaint: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = llama
    store = tmp_path / "store.db"
    with pytest.raises(UsageError, match=complaint):
        run_traced(**{"db": store, **given}, model=model, tokenizer=tokenizer)
    assert not store.exists()


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_model_and_tokenizer_go_together(missing: str, llama: tuple[Any, Any]) -> None:
    given = {"model": llama[0], "tokenizer": llama[1]}
    with pytest.raises(UsageError, match="both model and tokenizer"):
        run_traced("a", **{**given, missing: None})


def test_a_prompt_is_one_user_message(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    by_prompt = run_traced("the fox", model=model, tokenizer=tokenizer, max_new_tokens=3)
    message = [{"role": "user", "content": "the fox"}]
    assert run_traced(None, message, 3, model, tokenizer) == by_prompt
    assert by_prompt[1]["messages"] == message


def test_without_a_model_the_default_is_loaded(
    llama: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama
    folder = save(model, tokenizer, tmp_path / "model")
    monkeypatch.setenv("OKI_TRACE_MODEL", str(folder))
    with warnings.catch_warnings():
        # Whether so small a model can be held in 4-bit is bitsandbytes' affair.
        warnings.simplefilter("ignore", QuantizationFallback)
        _, trace = run_traced("the fox", max_new_tokens=2)
    assert trace["model_id"] == str(folder)
    assert len(trace["steps"]) == 2


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ trace object


def test_the_trace_has_exactly_these_names(traced: tuple[str, dict[str, Any]]) -> None:
    _, trace = traced
    assert set(trace) == TRACE
    assert (trace["format"], trace["version"]) == ("oki-trace", 2)
    assert len(trace["steps"]) == TOKENS
    for step in trace["steps"]:
        assert set(step) == STEP
        assert {frozenset(c) for c in step["logits_topk"]} == {frozenset(CANDIDATE)}
        assert {frozenset(e) for e in step["evidence"]} == {frozenset(EVIDENCE)}
        assert {frozenset(a) for a in step["attention"]} == {frozenset(ATTENTION)}
        assert {frozenset(p) for a in step["attention"] for p in a["topk"]} == {frozenset(ATTENDED)}
        assert {frozenset(row) for row in step["logit_lens"]} == {frozenset(LENS)}
        kept = {frozenset(c) for row in step["logit_lens"] for c in row["topk"]}
        assert kept == {frozenset(LENS_CANDIDATE)}


def test_the_trace_is_plain_json(traced: tuple[str, dict[str, Any]]) -> None:
    _, trace = traced
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace


def test_the_trace_says_what_was_given_and_got(
    traced: tuple[str, dict[str, Any]], llama: tuple[Any, Any]
) -> None:
    text, trace = traced
    _, tokenizer = llama
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    chosen = [step["chosen_id"] for step in trace["steps"]]
    assert trace["prompt"] == prompt
    assert trace["prompt_token_ids"] == ids
    assert trace["prompt_len"] == len(ids)
    assert trace["messages"] == MESSAGES
    assert trace["output"] == text == tokenizer.decode(chosen, skip_special_tokens=True)
    assert trace["status"] == "complete"
    assert trace["model_id"] == "LlamaForCausalLM", "a model without a name is named by its class"
    assert trace["logit_lens_available"] is True
    assert trace["generation"]["max_new_tokens"] == TOKENS
    assert trace["capture"]["layers"] == tiny.LAYERS


def test_positions_count_through_prompt_and_reply(traced: tuple[str, dict[str, Any]]) -> None:
    _, trace = traced
    length = trace["prompt_len"]
    ids = [*trace["prompt_token_ids"], *(step["chosen_id"] for step in trace["steps"])]
    seen_own = False
    for index, step in enumerate(trace["steps"]):
        assert (step["step"], step["position"]) == (index, length + index)
        for entry in step["evidence"]:
            assert 0 <= entry["position"] < step["position"]
            assert entry["token_id"] == ids[entry["position"]]
            assert entry["in_prompt"] is (entry["position"] < length)
            inside = entry["in_prompt"]
            assert entry["relative"] == (None if inside else entry["position"] - length)
            seen_own = seen_own or not inside
    assert seen_own, "no step looked at the reply itself: nothing was tested"


def test_what_is_said_twice_is_the_same(traced: tuple[str, dict[str, Any]]) -> None:
    _, trace = traced
    sampled = trace["generation"]["do_sample"]
    for step in trace["steps"]:
        # The model's own distribution: the step, its candidates, the last row of the lens.
        top = step["logits_topk"]
        assert [c["rank"] for c in top] == list(range(1, 11))
        probs = [c["prob"] for c in top]
        assert probs == sorted(probs, reverse=True)
        assert step["logprob"] == pytest.approx(math.log(step["prob"]), abs=1e-6)
        assert step["margin"] == pytest.approx(probs[0] - probs[1], abs=1e-7)
        mine = [c for c in top if c["token_id"] == step["chosen_id"]]
        assert [c["rank"] for c in mine] == [step["rank"]]
        assert mine[0]["prob"] == pytest.approx(step["prob"], rel=1e-6)
        assert mine[0]["token"] == step["chosen_token"]
        # What sampling made of it.
        assert (step["sampled_prob"] is not None) == sampled
        if sampled:
            assert mine[0]["sampled_prob"] == pytest.approx(step["sampled_prob"], rel=1e-6)
            assert sum(c["sampled_prob"] for c in top) == pytest.approx(1, abs=1e-6)
            assert all(c["sampled_prob"] == 0 for c in top[4:]), "top_k is 4"
        lens = step["logit_lens"]
        assert [row["layer"] for row in lens] == list(range(tiny.LAYERS + 1))
        last = lens[-1]
        assert [c["token_id"] for c in last["topk"]] == [c["token_id"] for c in top[:5]]
        assert [c["logit"] for c in last["topk"]] == [c["logit"] for c in top[:5]]
        assert [c["prob"] for c in last["topk"]] == pytest.approx(probs[:5], rel=1e-6)
        assert last["chosen_rank"] == step["rank"]
        assert last["chosen_prob"] == pytest.approx(step["prob"], rel=1e-6)
        assert last["entropy"] == pytest.approx(step["entropy"], rel=1e-5)
        assert last["kl"] == pytest.approx(0, abs=1e-5)
        # Evidence is the attention of the last layer.
        attention = step["attention"]
        assert [a["layer"] for a in attention] == list(range(1, tiny.LAYERS + 1))
        evidence = [{name: e[name] for name in ATTENDED} for e in step["evidence"]]
        assert evidence == attention[-1]["topk"]
        for layer in attention:
            weights = [entry["weight"] for entry in layer["topk"]]
            assert weights == sorted(weights, reverse=True)
            assert [entry["rank"] for entry in layer["topk"]] == list(range(1, 11))
            assert sum(weights) <= 1 + 1e-6
            assert layer["missing"] == pytest.approx(0, abs=1e-6), "no learned sink here"


def test_as_many_as_asked_for_are_kept_and_no_more_than_there_are(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    _, trace = run_traced(
        "the fox", None, 2, model, tokenizer, topk_logits=1000, topk_evidence=1, topk_lens=2
    )
    step = trace["steps"][0]
    assert len(step["logits_topk"]) == tiny.VOCABULARY
    assert math.fsum(c["prob"] for c in step["logits_topk"]) == pytest.approx(1, abs=1e-5)
    assert [len(a["topk"]) for a in step["attention"]] == [1] * tiny.LAYERS
    assert [len(row["topk"]) for row in step["logit_lens"]] == [2] * (tiny.LAYERS + 1)


def test_no_tokens_asked_for(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    text, trace = run_traced("the fox", None, 0, model, tokenizer)
    assert (text, trace["output"], trace["steps"], trace["status"]) == ("", "", [], "complete")


def test_a_real_model_answers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text, trace = run_traced(
        "What is the capital of France?", max_new_tokens=12, model=model, tokenizer=tokenizer
    )
    assert "Paris" in text
    assert trace["status"] == "complete"
    assert trace["reason"] == "end of turn"


# --------------------------------------------------------------------- the store


def stored(db: str | Path) -> dict[str, Any]:
    """The trace of the one reply in a store, as an export gives it."""
    with TraceReader(db) as reader:
        (conversation,) = reader.conversations()
        messages = reader.messages(conversation.id)
        trace = trace_of(reader, messages, messages[-1])
    assert trace is not None
    return trace


def as_stored(value: Any) -> Any:
    """NUL cannot be kept as text everywhere: the store shows it as ␀ (bytes are beside it)."""
    return json.loads(json.dumps(value).replace("\\u0000", "␀"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tensors", ["none", "half", "exact"])
def test_the_store_gives_back_the_very_same_trace(
    family: str, tensors: Any, tmp_path: Path
) -> None:
    """Every number to the last bit: also those that were computed in 32 bits."""
    _, trace = run_traced(
        messages=MESSAGES,
        max_new_tokens=TOKENS,
        model=tiny.model(family),
        tokenizer=tiny.tokenizer(),
        temperature=0.9,
        seed=3,
        db=tmp_path / "store.db",
        tensors=tensors,
    )
    assert stored(tmp_path / "store.db") == as_stored(trace)


def test_the_store_gets_the_whole_conversation(llama: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = llama
    url = f"sqlite:///{tmp_path / 'store.db'}"
    text, _ = run_traced(None, MESSAGES, 3, model, tokenizer, db=url)
    run_traced("second", None, 3, model, tokenizer, db=url)
    with TraceReader(url) as reader:
        second, first = reader.conversations()
        assert (first.title, second.title) == ("over the lazy dog", "second")
        messages = reader.messages(first.id)
        assert [(str(m.role), m.content) for m in messages] == [
            *((m["role"], m["content"]) for m in MESSAGES),
            ("assistant", text.replace("\0", "␀")),
        ]
        assert messages[-1].status is Status.COMPLETE
        names = ["attentions", "hidden_states", "logits"]
        assert reader.tensor_names(messages[-1].id, 2) == names


def test_nothing_is_kept_unless_asked(llama: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = llama
    _, trace = run_traced("the fox", None, 2, model, tokenizer)
    assert trace["capture"]["policy"]["tensors"] == "none"
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_leaves_no_reply_running(tmp_path: Path) -> None:
    """In a notebook the process lives on, so nobody would ever find it interrupted."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(CaptureError, match="encoder-decoder") as caught:
        run_traced("the fox", model=model, tokenizer=tiny.tokenizer(), db=tmp_path / "store.db")
    with TraceReader(tmp_path / "store.db") as reader:
        reply = reader.messages(1)[-1]
    assert (reply.status, reply.reason) == (Status.FAILED, str(caught.value))


def test_a_reply_that_fails_halfway_keeps_what_it_had(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    passes, breaks_at = 0, 0

    def break_later(module: Any, args: Any, output: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == breaks_at:
            raise RuntimeError("the weights fell out\nand more lines")

    model.model.layers[0].register_forward_hook(break_later)
    run_traced("the fox", None, 1, model, tokenizer)  # attached to, with passes of its own
    breaks_at = passes + 7  # one more for the trace of the prompt
    with pytest.raises(CaptureError) as caught:
        run_traced("the quick brown fox", None, 64, model, tokenizer, db=tmp_path / "s.db")
    assert "RuntimeError: the weights fell out" in str(caught.value)
    assert "\n" not in str(caught.value)
    trace = stored(tmp_path / "s.db")
    assert (trace["status"], trace["reason"]) == ("failed", str(caught.value))
    assert [step["step"] for step in trace["steps"]] == [0, 1, 2, 3, 4]
    assert all(len(step["logit_lens"]) == tiny.LAYERS + 1 for step in trace["steps"])
    chosen = [step["chosen_id"] for step in trace["steps"]]
    assert trace["output"] == tokenizer.decode(chosen, skip_special_tokens=True)


def test_a_refused_template_argument_stores_nothing(llama: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = llama
    with pytest.raises(CaptureError, match="has no argument enable_thinkng"):
        run_traced(
            "the fox",
            model=model,
            tokenizer=tokenizer,
            db=tmp_path / "store.db",
            template_args={"enable_thinkng": True},
        )
    assert list(tmp_path.iterdir()) == []


def test_thinking_calls_and_tools_are_given_as_transformers_takes_them(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(
        "{# <tool_call> reasoning_content enable_thinking #}{% for m in messages %}<s>{{ m.role }}:"
        "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.city }}"
        "{% endfor %}{% endfor %}{% if enable_thinking %}!{% endif %}{{ tools[0].function.name }}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "fox?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "name": "f", "content": "dog"},
    ]
    _, trace = run_traced(
        messages=messages,
        model=tiny.model("llama"),
        tokenizer=tokenizer,
        max_new_tokens=2,
        template_args={"enable_thinking": True},
        tools=[{"name": "f", "parameters": {}}],
        db=tmp_path / "s.db",
    )
    assert trace["prompt"] == "<s>user:fox?<s>assistant:(hm)f=Rome<s>tool:dog!f"
    assert {"user", "thinking", "tool_call", "tool"} <= set(trace["prompt_segments"])
    assert trace["template"]["arguments"] == {"enable_thinking": True}
    assert trace["messages"][2] == {"role": "tool", "content": "dog", "tool_name": "f"}
    assert [part["kind"] for part in trace["messages"][1]["parts"]] == ["thinking", "tool_call"]
    with TraceReader(tmp_path / "s.db") as reader:
        kept = reader.messages(1)
    assert kept[1].parts[1].arguments == {"city": "Rome"} and kept[2].tool_name == "f"
