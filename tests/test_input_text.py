"""Text that cannot be stored unchanged is refused in one line, whoever enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oki_trace import run_traced
from oki_trace.cli import quantities
from oki_trace.errors import CaptureError, ModelError, UsageError
from oki_trace.input_text import require_storable
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.loading.locate import locate
from oki_trace.queueing import ReplyRequest, new_messages
from oki_trace.records import CapturePolicy, ModelChoice, Sampling
from oki_trace.records.trace import surprisal_of
from oki_trace.settings import Settings
from tests import tiny


@pytest.mark.parametrize("text", ["", "plain", "é\n\t\r🙂", "\x01\x7f\ufeff", "a" * 10_000])
def test_text_is_given_back_as_it_is(text: str) -> None:
    assert require_storable(text, "It") is text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"caf\xe9 au lait".decode(errors="surrogateescape"), r"caf\xe9 au lait"),
        ("half \ud83d a pair", "<U+D83D>"),
        ("a\0b", "a␀b"),
        ("x" * 1000 + "\0" + "y" * 1000, "x␀y"),
        ("\x1b[31m\0", "␛[31m␀"),
    ],
)
def test_what_cannot_be_kept_is_named_with_its_place(text: str, place: str) -> None:
    with pytest.raises(UsageError) as refused:
        require_storable(text, "The prompt")
    said = str(refused.value)
    assert said.startswith("The prompt holds") and place in said and len(said) < 200
    assert len(said.splitlines()) == 1 and said.isprintable()


BAD = ["a\0b", "caf\udce9"]


@pytest.mark.parametrize("text", BAD)
def test_no_way_in_changes_it_silently(text: str) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: ReplyRequest(new_messages(text), ModelChoice("tiny")),
        lambda: ReplyRequest(new_messages("Hello", system=text), ModelChoice("tiny")),
        lambda: run_traced(text, model=None, tokenizer=None),
        lambda: run_traced(messages=[{"role": "system", "content": text}]),
        lambda: Settings.from_environment({"OKI_TRACE_DB": text}),
        lambda: Settings.from_environment({"OKI_TRACE_MODEL": text}),
    ]
    for way in ways:
        with pytest.raises(UsageError, match="holds"):
            way()


WHOLE = ("max_new_tokens", "top_k", "seed")


@pytest.mark.parametrize(
    "settings",
    [
        {name: value}
        for name in (
            "temperature",
            "top_p",
            "repetition_penalty",
            "max_new_tokens",
            "top_k",
            "seed",
        )
        for value in (float("inf"), float("-inf"), float("nan"))
    ]
    + [{"max_new_tokens": 1.5}, {"seed": 0.0}],
    ids=str,
)
def test_a_setting_is_a_finite_number(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))) as refused:
        Sampling(**settings)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2.5, 0, 1001])
def test_what_is_kept_is_a_whole_number(value: Any) -> None:
    with pytest.raises(UsageError, match="topk_lens"):
        CapturePolicy(topk_lens=value)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 20 + "TB", "nan", "inf", "1e999"])
def test_a_size_is_finite(text: str) -> None:
    with pytest.raises(UsageError):
        quantities.size(text)


def test_a_surprisal_is_never_below_zero() -> None:
    assert [f"{surprisal_of(x):.2f}" for x in (0.0, -0.0, 1e-9, -1e-9, -1.5)] == [
        *["0.00"] * 4,
        "1.50",
    ]
    assert surprisal_of(float("nan")) != surprisal_of(float("nan"))


def test_the_bytes_of_byt5_are_shown() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer("aé\n", add_special_tokens=False)["input_ids"]
    assert [vocabulary.text(i) for i in ids] == ["a", "<0xC3>", "<0xA9>", "\n"]
    assert b"".join(vocabulary.token_bytes(i) for i in ids) == "aé\n".encode()
    every = tokenizer.convert_tokens_to_ids([chr(byte) for byte in range(256)])
    assert [vocabulary.token_bytes(i) for i in every] == [bytes([byte]) for byte in range(256)]
    assert all(vocabulary.text(i) for i in every)


def test_a_tokenizer_larger_than_the_model_names_the_fix() -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    tokenizer.add_tokens(["<beyond>"])
    beyond = tokenizer.convert_tokens_to_ids("<beyond>")
    model.resize_token_embeddings(beyond)
    run_traced("the fox", model=model, tokenizer=tokenizer, max_new_tokens=1)
    with pytest.raises(CaptureError, match=r"<beyond> the id .*resize_token_embeddings") as refused:
        run_traced("the fox <beyond>", model=model, tokenizer=tokenizer, max_new_tokens=1)
    assert len(str(refused.value).splitlines()) == 1


def test_a_part_of_a_gguf_file_names_the_fix(tmp_path: Any) -> None:
    part = tmp_path / "big-00002-of-00003.gguf"
    part.write_bytes(b"GGUF")
    fix = r"one of 3 parts .* --merge big-00001-of-00003\.gguf big\.gguf"
    with pytest.raises(ModelError, match=fix):
        locate(str(part))
    whole = tmp_path / "small-00001-of-00001.gguf"
    whole.write_bytes(b"GGUF")
    assert locate(str(whole)).gguf == whole.name
