"""Two messages with one text: aligned by token or by characters, against plain transformers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from oki_trace import run_traced, score_traced, scoring
from oki_trace.analysis import questions
from oki_trace.analysis.one_text import shared_text, shared_tokens
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.question import Answer
from oki_trace.errors import QuestionError
from oki_trace.records import CapturePolicy, ModelChoice, StepSummary, TensorMode
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders, scripted, tiny

TEXT = "the quick brown fox jumps over the lazy dog. Übung 🙂 macht den Meister"


def other_tokenizer() -> Any:
    """Another vocabulary, with the same first ids for single bytes and others for its merges."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=290,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["macht den quack over brow jumps lazily under Meister"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = tiny.CHAT_TEMPLATE
    return fast


def named(family: str, seed: int) -> Any:
    model = tiny.model(family, seed)
    model.name_or_path = f"tiny/{family}-{seed}"
    return model


def plain(model: Any, ids: list[int]) -> np.ndarray:
    """Log probabilities of the token after each one, by plain transformers: (tokens, vocab)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def ids_of(tokenizer: Any, text: str = TEXT) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def rows(answer: Answer) -> list[dict[str, Any]]:
    names = [column.name for column in answer.columns]
    return [dict(zip(names, row, strict=True)) for row in answer.rows]


def score(db: str, model: Any, tokenizer: Any, tensors: TensorMode = "none", **more: Any) -> int:
    """The message of ``TEXT``, scored into the store."""
    score_traced(TEXT, model=model, tokenizer=tokenizer, db=db, tensors=tensors, **more)
    with TraceReader(db) as reader:
        return reader.message_marks()[-1].id


@pytest.mark.parametrize("tensors", ["exact", "none"])
def test_two_models_of_one_vocabulary_are_compared_at_every_token(
    tmp_path: Path, tensors: TensorMode
) -> None:
    db, tokenizer = str(tmp_path / "store.db"), tiny.tokenizer()
    models = named("llama", 0), named("gpt2", 1)
    first, second = (score(db, model, tokenizer, tensors) for model in models)
    ids = ids_of(tokenizer)
    with QuerySession(db) as session:
        answer = questions.answer(session, "compare", (str(first), str(second)))
        again = session.sql(answer.sql)
    assert answer.view == "tokens" and again.rows == answer.rows
    assert answer.about.startswith(
        f"Aligned by token: the {len(ids) - 1} tokens have the same ids and texts under both "
        "models. Log probability "
    )
    one, two = (plain(model, ids) for model in models)
    found = rows(answer)
    assert [row["position"] for row in found] == list(range(1, len(ids)))
    assert [row["other_position"] for row in found] == list(range(1, len(ids)))
    for row in found:
        at = row["position"]
        p, q = np.exp(one[at - 1]), np.exp(two[at - 1])
        assert row["logprob"] == pytest.approx(one[at - 1, ids[at]], abs=1e-4)
        assert row["other_logprob"] == pytest.approx(two[at - 1, ids[at]], abs=1e-4)
        assert row["difference"] == pytest.approx(row["other_logprob"] - row["logprob"])
        assert row["rank"] == 1 + (p > p[ids[at]]).sum()
        assert row["other_rank"] == 1 + (q > q[ids[at]]).sum()
        distance = np.abs(p - q).sum() / 2
        if tensors == "exact":
            assert row["basis"] == "full logits"
            assert row["tv"] == row["tv_most"] == pytest.approx(distance, abs=1e-5)
            assert row["kl"] == pytest.approx((p * (one - two)[at - 1]).sum(), abs=1e-4)
            assert row["kl_reverse"] == pytest.approx((q * (two - one)[at - 1]).sum(), abs=1e-4)
        else:
            assert row["basis"] == "top-10"
            assert row["tv"] - 1e-5 <= distance <= row["tv_most"] + 1e-5


def test_two_vocabularies_are_compared_by_characters(tmp_path: Path) -> None:
    db = str(tmp_path / "store.db")
    sides = (named("llama", 0), tiny.tokenizer()), (named("llama", 1), other_tokenizer())
    first, second = (score(db, *side) for side in sides)
    with QuerySession(db) as session:
        answer = questions.answer(session, "compare", (str(first), str(second)))
        again = session.sql(answer.sql)
    assert answer.view == "spans" and again.rows == answer.rows
    assert answer.about.startswith("Aligned by characters: the vocabularies differ (token ")
    bits, ends = [], []
    for model, tokenizer in sides:
        ids = ids_of(tokenizer)
        logprobs = plain(model, ids)
        sizes = [len(bytes_of(tokenizer, token)) for token in ids]
        ends.append(np.cumsum(sizes).tolist())
        bits.append([-logprobs[at - 1, ids[at]] / np.log(2) for at in range(1, len(ids))])
        assert ends[-1][-1] == len(TEXT.encode())
    # The first token has no surprisal: what is compared begins after both first tokens.
    common = sorted(set(ends[0]) & set(ends[1]))
    common = [at for at in common if is_boundary(TEXT.encode(), at)]
    found = rows(answer)
    texts = [TEXT.encode()[a:b].decode() for a, b in pairwise(common)]
    assert [row["text"] for row in found] == texts
    assert any(row["tokens"] != row["other_tokens"] for row in found)
    for row, (start, end) in zip(found, pairwise(common), strict=True):
        assert row["bytes"] == end - start
        for name, of_ends, of_bits in zip(("", "other_"), ends, bits, strict=True):
            own = [b for b, at in zip(of_bits, of_ends[1:], strict=True) if start < at <= end]
            assert row[f"{name}tokens"] == len(own)
            assert row[f"{name}bits"] == pytest.approx(sum(own), abs=1e-3)
    size = common[-1] - common[0]
    per_byte = [sum(row[name] for row in found) / size for name in ("bits", "other_bits")]
    assert (
        f"First {per_byte[0]:.3f} bits per byte, second {per_byte[1]:.3f}, over {size} bytes."
        in (answer.about)
    )
    largest = max(found, key=lambda row: abs(row["difference"]))
    assert f"The largest difference is {largest['difference']:+.2f} bits, at “" in answer.about


def bytes_of(tokenizer: Any, token: int) -> bytes:
    alphabet = {v: k for k, v in _byte_characters().items()}
    return bytes(alphabet[c] for c in tokenizer.convert_ids_to_tokens(token))


def _byte_characters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def is_boundary(text: bytes, at: int) -> bool:
    try:
        text[:at].decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Any
    model_id: str


def score_reply(db: str, reply: int, model: Any, tokenizer: Any) -> int:
    """The text of a stored reply, scored by this model."""
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        return scoring.score_into_store(
            writer,
            Loaded(model, tokenizer, model.name_or_path),
            ModelChoice(model.name_or_path),
            CapturePolicy(tensors="exact"),
            lambda instrument: scoring.of_reply(
                tokenizer, instrument.vocabulary, reader, reader.message(reply)
            ),
            of=reply,
        )


def test_a_reply_and_its_score_by_its_own_model_are_the_same(tmp_path: Path) -> None:
    db, model, tokenizer = str(tmp_path / "store.db"), named("llama", 0), tiny.tokenizer()
    _, trace = run_traced(
        "Hi", model=model, tokenizer=tokenizer, db=db, max_new_tokens=12, tensors="exact"
    )
    scored = score_reply(db, 2, model, tokenizer)
    with QuerySession(db) as session:
        for subjects in (("2", str(scored)), (str(scored), "2")):
            answer = questions.answer(session, "compare", subjects)
            assert answer.view == "tokens"
            assert answer.column("token") == tuple(s["chosen_token"] for s in trace["steps"])
            assert answer.column("position") == answer.column("other_position")
            assert answer.column("rank") == answer.column("other_rank")
            assert max(answer.column("tv")) < 1e-4 and set(answer.column("basis")) == {
                "full logits"
            }


def test_a_reply_and_its_score_by_a_model_with_another_tokenizer(tmp_path: Path) -> None:
    """The score has the whole chat template before the reply; only the reply is compared."""
    db, tokenizer, said = str(tmp_path / "store.db"), tiny.tokenizer(), "the quick Meister jumps"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    model = scripted.model(tokenizer, {len(ids_of(tokenizer, asked)): said})
    text, trace = run_traced("Hi", model=model, tokenizer=tokenizer, db=db, max_new_tokens=40)
    assert text == said and trace["steps"][-1]["chosen_token"] == "</s>"
    other, own = named("llama", 3), other_tokenizer()
    scored = score_reply(db, 2, other, own)
    with QuerySession(db) as session:
        answer = questions.answer(session, "compare", ("2", str(scored)))
    assert answer.view == "spans" and "".join(answer.column("text")) == said
    surprisal = -sum(step["logprob"] for step in trace["steps"][:-1]) / np.log(2)
    assert sum(answer.column("bits")) == pytest.approx(surprisal, abs=1e-4)
    ids = ids_of(own, asked + said)
    length = len(ids_of(own, asked))
    logprobs = plain(other, ids)
    expected = -sum(logprobs[at - 1, ids[at]] for at in range(length, len(ids))) / np.log(2)
    assert sum(answer.column("other_bits")) == pytest.approx(expected, abs=1e-3)
    assert answer.column("other_position")[0] == length


def test_different_texts_are_refused_with_the_fix(tmp_path: Path) -> None:
    db, model, tokenizer = str(tmp_path / "store.db"), named("llama", 0), tiny.tokenizer()
    for text in ("the quick fox", "a lazy dog"):
        score_traced(text, model=model, tokenizer=tokenizer, db=db)
    with QuerySession(db) as session, pytest.raises(QuestionError, match="have different texts"):
        questions.answer(session, "compare", ("1", "2"))


# --------------------------------------------------------------------- without a model


def steps(
    pieces: list[bytes], first: int = 1, special: frozenset[int] = frozenset()
) -> list[StepSummary]:
    """Given tokens with these bytes from position ``first`` on; equal bytes have one id."""
    return [
        builders.summary(
            token=piece.decode("utf-8", "backslashreplace"),
            step_index=-1,
            position=first + i,
            token_id=zlib.crc32(piece),
            token_bytes=piece,
            is_special=i in special,
        )
        for i, piece in enumerate(pieces)
    ]


def spans(left: list[StepSummary], right: list[StepSummary]) -> list[tuple[Any, ...]]:
    return [(span.left, span.right, span.text) for span in shared_text(left, right)]


def test_spans_end_where_tokens_of_both_end() -> None:
    one, two = steps([b"ab", b"c", b"de", b"f"]), steps([b"a", b"bc", b"d", b"ef"])
    assert spans(one, two) == [((0, 2), (0, 2), b"abc"), ((2, 4), (2, 4), b"def")]


def test_a_text_within_the_other_is_aligned_where_it_ends_last() -> None:
    whole, part = steps([b"xab", b"ab", b"ab!"]), steps([b"a", b"b"])
    assert spans(whole, part) == [] and spans(steps([b"x", b"ab", b"ab"]), part) == [
        ((2, 3), (0, 2), b"ab")
    ]


def test_a_span_ends_at_no_half_character() -> None:
    snake = "🐍".encode()
    one, two = steps([snake[:2], snake[2:], b"!"]), steps([snake[:2], snake[2:] + b"!"])
    assert spans(one, two) == [((0, 3), (0, 2), snake + b"!")]


def test_special_tokens_are_no_text_unless_one_side_spells_them() -> None:
    marked = steps([b"a", b"<|e|>", b"b", b"<|e|>"], special=frozenset({1, 3}))
    assert spans(marked, steps([b"a", b"b"])) == [((0, 1), (0, 1), b"a"), ((2, 3), (1, 2), b"b")]
    spelled = steps([b"a", b"<|", b"e|>", b"b", b"<|e|>"])
    assert spans(marked, spelled) == [
        ((0, 1), (0, 1), b"a"),
        ((1, 2), (1, 3), b"<|e|>"),
        ((2, 3), (3, 4), b"b"),
        ((3, 4), (4, 5), b"<|e|>"),
    ]


def test_tokens_are_found_at_the_same_positions_before_any_others() -> None:
    whole, part = steps([b"a", b"b", b"a", b"b"]), steps([b"a", b"b"])
    found = shared_tokens(whole, part)
    assert found is not None and [span.left for span in found] == [(0, 1), (1, 2)]
    found = shared_tokens(part, steps([b"a", b"b", b"a", b"b"], first=9))
    assert found is not None and [span.right for span in found] == [(2, 3), (3, 4)]
    assert shared_tokens(part, steps([b"ab"])) is None
    assert shared_tokens(part, []) is None


PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", "é".encode(), b"\xc3", b"\xa9"]), min_size=1)


@given(PIECES, st.integers(0, 40), st.integers(1, 5))
def test_spans_lose_no_text_between_the_first_and_the_last(
    pieces: list[bytes], start: int, size: int
) -> None:
    text = b"".join(pieces)[start:]
    other = [text[i : i + size] for i in range(0, len(text), size)]
    left, right = steps(pieces), steps(other)
    found = shared_text(left, right)
    for span, following in pairwise(found):
        assert span.left[1] == following.left[0] and span.right[1] == following.right[0]
    for span in found:
        for side, indices in ((left, span.left), (right, span.right)):
            assert b"".join(s.token_bytes for s in side[slice(*indices)]) == span.text
