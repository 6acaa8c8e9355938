"""The layers at which the Logit Lens reads given tokens, from the capture to the pages."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboard.viewdata.lens import changes_data, curve_rows, joined_lens, layer_rows, lens_data
from oki_trace.api import run_traced, score_traced
from oki_trace.errors import UsageError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_path
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.teacher_forcing import teacher_force
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.records import CapturePolicy, Lens, Step
from oki_trace.store.maintenance.verify import Verification
from oki_trace.store.reading.reader import TraceReader
from tests import tiny
from tests.families import configs

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6]),
        ("every:4", [0, 4, 6]),
        ("every:3", [0, 3, 6]),
        ("every:99", [0, 6]),
        ("0,2-3", [0, 2, 3, 6]),
        ("3-2,1,1", [1, 6]),
        ("6", [6]),
    ],
)
def test_the_layers_of_a_policy_end_with_the_last(spec: str | None, layers: list[int]) -> None:
    assert list(CapturePolicy(lens_layers=spec).layers_read(6)) == layers


@pytest.mark.parametrize("spec", ["", "some", "every:0", "every:-1", "1,", "1-", "-1", "1;2", 4])
def test_layers_that_mean_nothing_are_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="lens_layers must be all, none, every:N or layers"):
        CapturePolicy(lens_layers=spec)


def test_a_layer_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    own: Any = {"model": configs.build("llama"), "tokenizer": tiny.tokenizer()}
    store = tmp_path / "traces.db"
    with pytest.raises(UsageError, match="0,99 do not fit this model, whose layers are 0 to"):
        score_traced(TEXT, lens_layers="0,99", db=store, **own)
    with TraceReader(store) as reader:
        assert reader.conversations() == []
    with pytest.raises(UsageError, match="do not fit this model"):
        run_traced(TEXT, max_new_tokens=2, trace_prompt="light", lens_layers="0,99", **own)


def test_no_lens_leaves_no_lens_and_the_reply_has_its_own() -> None:
    policy = CapturePolicy(trace_prompt="light", lens_layers="none", lenses=("jlens",))
    assert policy.for_prompt.no_lens and policy.for_prompt.lenses == ()
    assert not policy.for_reply.no_lens and policy.for_reply.lenses == ("jlens",)
    assert policy.for_reply.layers_read(3) == (0, 1, 2, 3)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("spec", ["every:2", "1", "4", "0,3"])
def test_the_layers_read_have_the_numbers_of_a_whole_lens(
    monkeypatch: pytest.MonkeyPatch, spec: str, drafted: bool
) -> None:
    monkeypatch.setattr("oki_trace.llm.fast.draft_lens.has_native_bfloat16", lambda: True)
    size = {"vocab_size": 16_384, "hidden_size": 64} if drafted else {}
    model = configs.build("llama", num_hidden_layers=4, **size)
    made = instrument(model, tiny.tokenizer())
    assert (made.fast.draft_lens is not None) == drafted

    def steps(layers: str) -> list[Step]:
        policy = CapturePolicy(tensors="none", trace_prompt="full", lens_layers=layers)
        with lock_model(model):
            events = list(teacher_force(made, list(range(5, 30)), policy))
        return [event for event in events if isinstance(event, Step)]

    wanted = CapturePolicy(lens_layers=spec).layers_read(4)
    for one, whole in zip(steps(spec), steps("all"), strict=True):
        assert one.lens is not None and whole.lens is not None
        assert one.lens.layer_numbers.tolist() == list(wanted)
        rows = list(wanted)
        assert (one.lens.token_ids == whole.lens.token_ids[rows]).all()
        assert one.lens.tokens == tuple(whole.lens.tokens[row] for row in rows)
        # The sums over many unlikely tokens are drafted, within the bounds of a draft.
        loose = {"entropy": 2e-2, "kl": 2e-2} if drafted else {}
        for name in ("logits", "probs", "entropy", "chosen_prob", "kl"):
            values = getattr(one.lens, name), getattr(whole.lens, name)[rows]
            np.testing.assert_allclose(*values, atol=loose.get(name, 1e-4), err_msg=name)
        ranks = one.lens.chosen_rank, whole.lens.chosen_rank[rows]
        np.testing.assert_allclose(*ranks, rtol=0.05 if drafted else 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reply whose prompt was read at some layers, and a text scored at others."""
    store = tmp_path_factory.mktemp("layers") / "traces.db"
    model = configs.build("llama", num_hidden_layers=4)
    own: Any = {"model": model, "tokenizer": tiny.tokenizer(), "db": store}
    run_traced(TEXT, max_new_tokens=3, trace_prompt="light", lens_layers="1,3", **own)
    score_traced(TEXT, lens_layers="every:4", **own)
    score_traced(TEXT, lens_layers="none", **own)
    return store


def lens_of(step: Step) -> Lens:
    assert step.lens is not None
    return step.lens


def test_the_store_has_rows_of_the_layers_read(stored: Path) -> None:
    with TraceReader(stored) as reader:
        assert [str(finding) for finding in Verification(reader)] == []
        given = list(reader.iter_steps(2, given=True))
        assert {tuple(lens_of(step).layer_numbers) for step in given} == {(1, 3, 4)}
        generated = list(reader.iter_steps(2))
        assert {tuple(lens_of(step).layer_numbers) for step in generated} == {(0, 1, 2, 3, 4)}
        scored = list(reader.iter_steps(3, given=True))
        assert {tuple(lens_of(step).layer_numbers) for step in scored} == {(0, 4)}
        assert all(step.lens is None for step in reader.iter_steps(4, given=True))
        for summary, step in zip(reader.steps(2, given=True), given, strict=True):
            assert summary.settle_layer == lens_of(step).settle_layer


def test_a_lens_of_other_layers_than_the_policy_says_is_found(stored: Path) -> None:
    with TraceReader(stored) as reader:
        message = reader.message(2)
        step = next(iter(reader.iter_steps(2, given=True)))
    assert message.capture is not None
    from oki_trace.store.maintenance.lens_checks import lenses_agree

    for spec, problem in (
        ("1,2,3", "lacks layer 2"),
        ("3", "has layer 1, at which it did not read"),
        ("all", "lacks layer 0, 2"),
    ):
        policy = replace(message.capture.policy, lens_layers=spec)
        changed = replace(message, capture=replace(message.capture, policy=policy))
        assert [p for p in lenses_agree(changed, step, complete=True) if problem in p]
    assert list(lenses_agree(message, step, complete=True)) == []


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_an_export_brings_the_layers_back(stored: Path, tmp_path: Path, form: Any) -> None:
    target = tmp_path / "target.db"
    for conversation in (1, 2, 3):
        path = tmp_path / f"{conversation}.{form}"
        with TraceReader(stored) as reader:
            export(reader, conversation, Format(form), path, io.StringIO())
        import_path(path, target)
    with TraceReader(stored) as old, TraceReader(target) as new:
        assert [str(finding) for finding in Verification(new)] == []
        for message in (2, 3, 4):
            pairs = zip(
                old.iter_steps(message, given=True),
                new.iter_steps(message, given=True),
                strict=True,
            )
            for one, other in pairs:
                assert one.digest == other.digest
                if one.lens is not None and other.lens is not None:
                    assert one.lens.layer_numbers.tolist() == other.lens.layer_numbers.tolist()


def test_views_name_the_layers_that_were_read(stored: Path) -> None:
    with TraceReader(stored) as reader:
        step = next(iter(reader.iter_steps(2, given=True)))
        prompt, reply = reader.lens_grid(2, given=True), reader.lens_grid(2)
    lens = lens_of(step)
    assert [row["layer"] for row in lens_data(step, lens)["rows"]] == [4, 3, 1]
    assert [row["layer"] for row in changes_data(step, lens)["rows"]] == [4, 3]
    assert [row["layer"] for row in layer_rows(lens)] == [1, 3, 4]
    assert [row["layer"] for row in curve_rows(step, lens)][:3] == [1, 3, 4]
    joined = joined_lens([(prompt, -len(prompt.step_index)), (reply, 0)])
    assert joined.top.shape == (len(prompt.step_index) + 3, 5)
    blank = np.isnan(joined.top_prob)
    assert blank[:-3, [0, 2]].all() and not blank[:, [1, 3, 4]].any() and not blank[-3:].any()
    assert {joined.tokens[token] for token in joined.top[blank]} == {""}
