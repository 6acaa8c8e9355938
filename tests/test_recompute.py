"""Recomputing a reply: a faithful trace agrees in every dtype, a changed one does not."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oki_trace.api import run_traced, score_traced
from oki_trace.llm.loading.load import LoadedModel
from oki_trace.recompute import Recomputed, recompute
from oki_trace.records import ModelChoice
from oki_trace.store.reading.reader import TraceReader
from oki_trace.trace_differences import Differences
from tests import builders, tiny


def again(db: Path, model: Any, tokenizer: Any) -> Recomputed:
    """The one reply of a store, recomputed with this model."""

    def load(choice: ModelChoice) -> LoadedModel:
        return LoadedModel(
            model, tokenizer, choice.model_id, choice, "float32", "cpu", None, None, 0.0
        )

    with TraceReader(db) as reader:
        (found,) = recompute(reader, loader=load)
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_faithful_trace_agrees(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """By cached decoding, as it was made: one pass would round otherwise."""
    tokenizer = tiny.tokenizer()
    for number, settings in enumerate(SETTINGS):
        # A new one, which has no KV cache of an earlier reply: using it would round otherwise.
        model = tiny.model(family).to(dtype)
        db = tmp_path / f"{number}.db"
        run_traced(
            model=model,
            tokenizer=tokenizer,
            prompt="the quick fox",
            max_new_tokens=12,
            db=db,
            **settings,
        )
        found = again(db, model, tokenizer)
        assert found.reason is None and found.agrees, found
        assert found.logprob_difference == 0 and found.top1_differences == 0
        assert found.not_numbers == 0 and found.text_differences == 0
        assert found.lens_difference is not None and found.lens_difference < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_agrees_with_its_own_traces(
    smollm2: tuple[Any, Any], dtype: str, tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    if dtype != "float32":
        import copy

        model = copy.deepcopy(model).to(torch.bfloat16)
    db = tmp_path / "store.db"
    run_traced(
        model=model,
        tokenizer=tokenizer,
        prompt="What is gold?",
        max_new_tokens=8,
        db=db,
        trace_prompt="none",
    )
    found = again(db, model, tokenizer)
    assert found.reason is None and found.agrees and found.steps == 8, found
    assert found.logprob_difference is not None and found.logprob_difference < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE message SET content = 'fox' WHERE role = 'assistant'",
        "UPDATE step SET token = 'fox' WHERE step_index = 2",
        "UPDATE step SET token_bytes = x'666f78' WHERE step_index = 2",
    ],
)
def test_a_text_that_is_not_the_tokens_does_not_agree(change: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    db = tmp_path / "store.db"
    run_traced(model=model, tokenizer=tokenizer, prompt="the quick fox", max_new_tokens=6, db=db)
    with closing(sqlite3.connect(db)) as connection, connection:
        assert connection.execute(change).rowcount == 1
    found = again(db, model, tokenizer)
    assert found.text_differences == 1 and not found.agrees
    assert found.logprob_difference == 0


def test_another_model_does_not_agree(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    db = tmp_path / "store.db"
    run_traced(model=model, tokenizer=tokenizer, prompt="the quick fox", max_new_tokens=6, db=db)
    assert not again(db, tiny.model("llama", seed=1), tokenizer).agrees


def _measured(change: Callable[[Any], Any]) -> Differences:
    rng = np.random.default_rng(3)
    step = builders.coherent_step(0, rng)
    found = Differences()
    found.add(change(step), step)
    assert step.lens is not None
    found.add_lens(change(step), step.lens)
    return found


def test_what_is_not_a_number_is_a_difference_and_an_infinity_is_none() -> None:
    assert _measured(lambda step: step).explained(0.0)
    nothing = _measured(lambda step: replace(step, entropy=float("nan")))
    assert nothing.not_numbers == 1 and not nothing.explained(10.0)

    def without_a_logit(step: Any) -> Any:
        logits = step.topk.logits.copy()
        logits[3] = np.nan
        return replace(step, topk=replace(step.topk, logits=logits))

    assert _measured(without_a_logit).not_numbers == 1
    rng = np.random.default_rng(3)
    step = builders.coherent_step(0, rng)
    found = Differences()
    found.add(step, replace(step, entropy=float("nan")))
    assert found.entropy == float("inf") and not found.explained(10.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_given_tokens_agree_and_a_change_of_one_is_found(family: str, tmp_path: Path) -> None:
    """A traced prompt and a score in windows, read again in the same chunks."""
    model, tokenizer = tiny.model(family), tiny.tokenizer()
    own: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    text = "the quick brown fox jumps over the lazy dog and the cat sat"
    traced, scored = tmp_path / "traced.db", tmp_path / "scored.db"
    run_traced(prompt=text, max_new_tokens=4, db=traced, trace_prompt="full", **own)
    score_traced(text, db=scored, window=8, stride=4, **own)
    for db in (traced, scored):
        found = again(db, model, tokenizer)
        assert found.reason is None and found.agrees and found.steps > 8, found
        assert found.logprob_difference is not None and found.logprob_difference < 1e-4
        with closing(sqlite3.connect(db)) as connection, connection:
            connection.execute("UPDATE step SET logprob = logprob - 1 WHERE position = 6")
        changed = again(db, model, tokenizer)
        assert not changed.agrees and changed.logprob_difference == pytest.approx(1, abs=1e-2)
