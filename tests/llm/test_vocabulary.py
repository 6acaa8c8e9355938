"""Every token id has its own bytes, and a reply is streamed in complete characters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oki_trace.llm.capture.vocabulary import TextStream, Vocabulary, bytes_to_text
from tests import tiny

TEXTS = (
    "",
    " ",
    "words, and a number: 1234567",
    "  two spaces before,   three within, and a tab\tand lines\r\n\n",
    "\x00 NUL, \x1b[31mred\x1b[0m, bell \x07, delete \x7f, C1 \x9b",
    "naïve café — “quotes” …",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙃 🇫🇷",
    "日本語と中文，还有 한국어",
    "שלום \u202eabc\u202c مرحبا",
    "e\u0301 \u200b\ufeff \u2028",
    "\N{REPLACEMENT CHARACTER}",
    "broken: \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} and on",
    "<0x41> <|not a marker|>",
    "\ue000",
)


@dataclass(frozen=True)
class Family:
    """A tokenizer, and the prefix that it adds to every text."""

    tokenizer: Any
    before: str = ""
    byte_fallback: bool = False

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def whole(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def sentencepiece(normalizer: Any, decoder: Any) -> Any:
    """A vocabulary as SentencePiece makes it: words with ▁, and the 256 bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz,.:é", "▁▁", "th", "the", "▁the"]
    merges = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizer
    made.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def like_llama() -> Family:
    """A space is added before the text, and removed again when decoding."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return Family(sentencepiece(spaces, decoder), before=" ", byte_fallback=True)


def like_gemma() -> Family:
    """No space is added before the text, and runs of spaces are added tokens."""
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = sentencepiece(normalizers.Replace(" ", "▁"), decoders.Sequence(back))
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False), AddedToken("\n\n")])
    return Family(tokenizer, byte_fallback=True)


def byte_level() -> Family:
    return Family(tiny.tokenizer())


OTHERS: dict[str, Callable[[], Family]] = {
    "byte_level": byte_level,
    "like_llama": like_llama,
    "like_gemma": like_gemma,
}


@pytest.fixture(scope="module", params=["smollm2", *OTHERS])
def family(request: pytest.FixtureRequest) -> Family:
    if request.param == "smollm2":
        folder: Path = request.getfixturevalue("smollm2_dir")
        return Family(AutoTokenizer.from_pretrained(folder))
    return OTHERS[request.param]()


# SentencePiece's sign for a space cannot be told from a space afterwards, and
# SmolLM2 has no tokens for a few bytes, which it leaves out: some control
# characters, and those that begin the characters above U+3FFFF.
any_text = st.text(
    st.characters(
        max_codepoint=0x3FFFF,
        exclude_characters="▁\x04\x06\x13\x14\x16\x1d",
        exclude_categories=["Cs"],
    ),
    max_size=40,
)


def test_every_id_has_the_bytes_it_decodes_to(family: Family) -> None:
    vocabulary = Vocabulary(family.tokenizer)
    # After a first token, because the first of all loses its space when decoded.
    (anchor,) = family.encode("a")[-1:]
    for token_id in range(len(family.tokenizer)):
        raw = vocabulary.token_bytes(token_id)
        assert raw, token_id
        decoded = family.tokenizer.decode([anchor, token_id])
        assert decoded == "a" + raw.decode("utf-8", errors="replace"), token_id
        assert vocabulary.text(token_id) == bytes_to_text(raw), token_id


def test_special_are_those_that_a_reply_leaves_out(family: Family) -> None:
    vocabulary = Vocabulary(family.tokenizer)
    (anchor,) = family.encode("a")[-1:]
    for token_id in range(len(family.tokenizer)):
        left_out = family.whole([anchor, token_id, anchor]) == "aa"
        assert vocabulary.is_special(token_id) == left_out, token_id


def test_all_bytes_can_be_told_apart() -> None:
    for make in OTHERS.values():
        tokenizer = make().tokenizer
        vocabulary = Vocabulary(tokenizer)
        singles = {vocabulary.token_bytes(i) for i in range(len(tokenizer))}
        assert singles >= {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_text(family: Family, text: str) -> None:
    vocabulary = Vocabulary(family.tokenizer)
    joined = b"".join(vocabulary.token_bytes(i) for i in family.encode(text))
    assert joined == (family.before + text if text else "").encode()


@settings(max_examples=60, deadline=None)
@given(text=any_text.filter(bool))
def test_the_bytes_of_any_texts_tokens_are_the_text(family: Family, text: str) -> None:
    vocabulary = Vocabulary(family.tokenizer)
    joined = b"".join(vocabulary.token_bytes(i) for i in family.encode(text))
    assert joined.decode() == family.before + text


def test_markers_in_a_text_keep_their_place() -> None:
    family = byte_level()
    vocabulary = Vocabulary(family.tokenizer)
    ids = family.encode("<s>system</s>")
    assert b"".join(vocabulary.token_bytes(i) for i in ids) == b"<s>system</s>"
    assert [vocabulary.is_special(i) for i in (ids[0], ids[1], ids[-1])] == [True, False, True]


def test_half_a_character_reads_as_its_bytes() -> None:
    family = byte_level()
    vocabulary = Vocabulary(family.tokenizer)
    ids = family.encode("🙂")
    assert [vocabulary.text(i) for i in ids] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    assert bytes_to_text(b"\xc3\x28") == "<0xC3><0x28>"
    assert bytes_to_text(b"\x00\x1b[31m") == "\x00\x1b[31m"


def test_ids_beyond_the_tokenizer_are_named_and_empty(family: Family) -> None:
    """Many models have more rows in their head than the tokenizer has tokens."""
    vocabulary = Vocabulary(family.tokenizer)
    beyond = len(family.tokenizer) + 5
    assert vocabulary.text(beyond) == f"<unused {beyond}>"
    assert vocabulary.token_bytes(beyond) == b""
    assert vocabulary.is_special(beyond)
    (a,) = family.encode("a")[-1:]
    stream = TextStream(family.tokenizer)
    assert "".join(stream.push(i) for i in (a, beyond, a)) == "aa"


def test_added_runs_of_spaces_are_spaces() -> None:
    family = like_gemma()
    vocabulary = Vocabulary(family.tokenizer)
    (run,) = family.tokenizer.convert_tokens_to_ids(["▁▁▁"])
    assert (vocabulary.text(run), vocabulary.token_bytes(run)) == ("   ", b"   ")
    assert not vocabulary.is_special(run)


def test_markers_are_special_and_keep_their_own_text(smollm2_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    vocabulary = Vocabulary(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (vocabulary.text(end), vocabulary.token_bytes(end)) == ("<|im_end|>", b"<|im_end|>")
    assert vocabulary.is_special(end)
    (paris,) = tokenizer(" Paris")["input_ids"]
    assert (vocabulary.text(paris), vocabulary.is_special(paris)) == (" Paris", False)


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    """The pieces of a reply, each checked to be whole characters that stay as they are."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    so_far = "".join(pieces)
    whole = stream.finish()
    assert whole == tokenizer.decode(ids, skip_special_tokens=True)
    assert so_far + stream.rest() == whole
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_a_streamed_text_is_the_text(family: Family, text: str) -> None:
    ids = family.encode(text)
    pieces = streamed(family.tokenizer, ids)
    whole = family.whole(ids)
    assert "".join(pieces) == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces).count("\N{REPLACEMENT CHARACTER}") <= text.count(
        "\N{REPLACEMENT CHARACTER}"
    )


@settings(max_examples=60, deadline=None)
@given(text=any_text)
@example(text="\n🙂\n🙂")
@example(text="\N{REPLACEMENT CHARACTER}")
def test_any_streamed_text_is_the_text(family: Family, text: str) -> None:
    """A replacement for a character that later becomes complete is never shown."""
    pieces = streamed(family.tokenizer, family.encode(text))
    shown = "".join(pieces)
    assert shown.count("\N{REPLACEMENT CHARACTER}") <= text.count("\N{REPLACEMENT CHARACTER}")


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.sampled_from(["the", " fox", "é", "🙂", "日", "\n"]), max_size=12))
def test_markers_between_do_not_eat_spaces(family: Family, texts: list[str]) -> None:
    marker = family.tokenizer.eos_token_id
    ids = [i for text in texts for i in (*family.encode(text), marker)]
    streamed(family.tokenizer, ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_at_all_are_streamed_as_they_decode(family: Family, data: st.DataObject) -> None:
    """A bad model, or a high temperature, yields bytes that are not valid text."""
    ids = data.draw(st.lists(st.integers(0, len(family.tokenizer) + 3), max_size=30))
    if family.byte_fallback:
        # A decoder with byte fallback gives up a whole run of bytes for one bad
        # one, also those that were good and have been shown: runs of one only.
        (letter,) = family.encode("a")[-1:]
        ids = [i for one in ids for i in (one, letter)]
    streamed(family.tokenizer, ids)


def test_a_character_is_shown_when_it_is_whole() -> None:
    family = byte_level()
    stream = TextStream(family.tokenizer)
    assert [stream.push(i) for i in family.encode("a🙂b")] == ["a", "", "", "", "🙂", "b"]
    assert stream.rest() == ""


def test_an_unfinished_character_is_shown_at_the_end_alone() -> None:
    family = byte_level()
    stream = TextStream(family.tokenizer)
    assert [stream.push(i) for i in family.encode("a🙂")[:-1]] == ["a", "", "", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == "a\N{REPLACEMENT CHARACTER}"
