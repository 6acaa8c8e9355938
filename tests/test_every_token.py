"""Every token id survives in the stream, in the store and in what is shown of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.records import (
    Candidates,
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    Status,
    Step,
)
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import Collector, trace_turn
from tests import builders, tiny

PADDING = 100


def steps_of(vocabulary: Vocabulary, ids: range) -> Iterator[Step]:
    """A step for each id, which is also its only candidate."""
    one = np.ones(1, dtype=np.float32)
    for index, token_id in enumerate(ids):
        text = vocabulary.text(token_id)
        yield Step(
            step_index=index,
            position=index + 6,
            token_id=token_id,
            token=text,
            token_bytes=vocabulary.token_bytes(token_id),
            is_special=vocabulary.is_special(token_id),
            logit=0.0,
            prob=1.0,
            logprob=0.0,
            entropy=0.0,
            rank=1,
            margin=1.0,
            sampled_prob=None,
            elapsed_ms=0.0,
            topk=Candidates(np.array([token_id]), (text,), one, one),
        )


def test_every_id_of_the_vocabulary_and_of_its_padding(smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert len(tokenizer) == 49_152
    vocabulary = Vocabulary(tokenizer)
    ids = range(len(tokenizer) + PADDING)
    db = tmp_path / "store.db"
    policy = CapturePolicy(tensors="none")
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        conversation = writer.create_conversation("all there is")
        message = writer.queue_reply(
            conversation, ModelChoice("smollm2"), Sampling(), policy, claim=True
        )
        writer.start_reply(message, builders.turn_start("none"))
        steps = steps_of(vocabulary, ids)
        while some := list(itertools.islice(steps, 5_000)):
            writer.append(message, some)
        summaries = reader.steps(message)
        assert [summary.token_id for summary in summaries] == list(ids)
        for summary in summaries:
            raw = vocabulary.token_bytes(summary.token_id)
            assert summary.token_bytes == raw
            assert summary.token == vocabulary.text(summary.token_id).replace("\0", "␀")
            assert summary.is_special == vocabulary.is_special(summary.token_id)
        for step in reader.iter_steps(message):
            assert step.topk.token_ids.tolist() == [step.token_id]
            assert step.topk.tokens == (step.token,)
    padding = summaries[-PADDING:]
    assert {summary.token_bytes for summary in padding} == {b""}
    assert [summary.token for summary in padding] == [f"<unused {s.token_id}>" for s in padding]


@pytest.fixture(scope="module")
def padded() -> Any:
    """A model whose head is wider than its tokenizer knows."""
    config = tiny.model("llama").config
    config.vocab_size = tiny.VOCABULARY + PADDING
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("temperature", [None, 1.0], ids=["greedy", "sampled"])
def test_a_model_that_says_what_its_tokenizer_does_not_know(
    padded: Any, temperature: float | None
) -> None:
    tokenizer = tiny.tokenizer()
    first = len(tokenizer)
    padded.generation_config.suppress_tokens = list(range(first))
    collector, pieces = Collector(), []
    end = trace_turn(
        instrument(padded, tokenizer),
        "tiny",
        [ChatMessage(Role.USER, "the fox")],
        Sampling(6, temperature, seed=1),
        CapturePolicy(tensors="none"),
        [collector],
        on_text=lambda text, kind: pieces.append(text),
    )
    assert (end.status, end.output, "".join(pieces)) == (Status.COMPLETE, "", "")
    assert all(step.token_id >= first for step in collector.steps)
    assert all(step.token == f"<unused {step.token_id}>" for step in collector.steps)
    assert all(step.is_special and step.token_bytes == b"" for step in collector.steps)


@pytest.mark.parametrize("text", ["🙂", "é", "日本", "a\0b", "\x1b[31m\x07", "🏳️‍🌈 ok"])
def test_what_the_model_says_is_streamed_in_whole_characters(text: str) -> None:
    """Each byte a token of its own: the model is made to say just this."""
    tokenizer = tiny.tokenizer()
    vocabulary = Vocabulary(tokenizer)
    by_bytes = {vocabulary.token_bytes(i): i for i in range(len(tokenizer))}
    ids = [by_bytes[bytes([byte])] for byte in text.encode()]
    model = tiny.model("llama")
    made = instrument(model, tokenizer)
    real, left = model.forward, iter(ids)

    @functools.wraps(real)
    def say(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., next(left)] = 10.0
        return output

    model.forward = say
    collector, pieces = Collector(), []
    end = trace_turn(
        made,
        "tiny",
        [ChatMessage(Role.USER, "x")],
        Sampling(len(ids)),
        CapturePolicy(tensors="none"),
        [collector],
        on_text=lambda text, kind: pieces.append(text),
    )
    assert end.output == text
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert b"".join(step.token_bytes for step in collector.steps) == text.encode()
