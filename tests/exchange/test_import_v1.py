"""Traces of version 1, complete or not, are imported and shown in every view."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.store.reading.reader import TraceReader
from tests.cli.commands import Oki
from tests.cli.conftest import oki
from tests.exchange.inline import import_inline as import_path
from tests.exchange.stories import v1_trace

__all__ = ["oki"]

HOME = Path(__file__).resolve().parents[2] / "dashboard" / "Home.py"


def bring(tmp_path: Path, document: Any) -> Path:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(document))
    import_path(file, tmp_path / "t.db")
    return tmp_path / "t.db"


def without(trace: dict[str, Any], *names: str) -> dict[str, Any]:
    """The trace without these names, at any depth."""

    def less(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: less(item) for name, item in value.items() if name not in names}
        return [less(item) for item in value] if isinstance(value, list) else value

    done: dict[str, Any] = less(trace)
    return done


VARIANTS = {
    "whole": v1_trace(),
    "no ids": without(v1_trace(), "chosen_id"),
    "no lens": {
        **v1_trace(),
        "logit_lens_available": False,
        "steps": [{**step, "logit_lens": []} for step in v1_trace()["steps"]],
    },
    "older evidence": without(v1_trace(), "in_prompt", "relative"),
    "older evidence, no prompt_len": without(v1_trace(), "in_prompt", "relative", "prompt_len"),
    "no evidence": without(v1_trace(), "evidence", "evidence_provenance"),
    "no candidates": without(v1_trace(), "logits_topk"),
    "tokens alone": {
        "prompt": "x",
        "output": "a",
        "steps": [{"chosen_token": "a"}, {"chosen_token": "b"}],
    },
    "no steps": v1_trace(0),
    "nulls": {**v1_trace(), "messages": None, "evidence_provenance": None, "prompt_len": None},
    "counted from 1": {
        **v1_trace(),
        "steps": [{**step, "step": step["step"] + 1} for step in v1_trace()["steps"]],
    },
    "ragged lens": {
        **v1_trace(),
        "steps": [
            {
                **step,
                "logit_lens": [
                    {"layer": 2, "topk": step["logit_lens"][2]["topk"]},
                    {"layer": 5, "topk": step["logit_lens"][2]["topk"][:1]},
                ],
            }
            for step in v1_trace()["steps"]
        ],
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_view_shows_it(
    name: str, tmp_path: Path, oki: Oki, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = bring(tmp_path, VARIANTS[name])
    with TraceReader(db) as reader:
        (reply,) = [m for m in reader.messages(1) if m.capture]
        steps = list(reader.iter_steps(reply.id))
        assert reply.content == VARIANTS[name]["output"]
        assert [s.token for s in steps] == [s["chosen_token"] for s in VARIANTS[name]["steps"]]
        export(reader, 1, Format.HTML, tmp_path / "r.html", sys.stdout)
    for arguments in (["list"], ["show", 1], ["show", 1, "--json"]):
        assert oki(*arguments, "--db", db).status == 0
    for index in range(len(steps)):
        assert oki("show", 1, "--db", db, "--step", index).status == 0
    monkeypatch.setenv("OKI_TRACE_DB", str(db))
    try:
        # The last step's evidence is in the reply too.
        place = {"conversation": 1, "message": reply.id, "step": max(len(steps) - 1, 0)}
        explorer(AppTest.from_file(str(HOME)), place)
        if name in ("whole", "no ids", "ragged lens", "no lens"):
            explorer(AppTest.from_function(reply_map), place)
    finally:
        from dashboard import data

        data._reader(str(db)).close()
        st.cache_resource.clear()
        st.cache_data.clear()


def reply_map() -> None:
    from dashboard.views import reply_map

    reply_map.page()


def explorer(app: AppTest, place: dict[str, int]) -> None:
    """A page with this step open runs through."""
    for name, value in place.items():
        app.query_params[name] = str(value)
    app.run(timeout=60)
    assert not app.exception and not app.error


def test_what_the_trace_says_is_there_and_what_it_does_not_say_is_not_made_up(
    tmp_path: Path,
) -> None:
    with TraceReader(bring(tmp_path, v1_trace())) as reader:
        messages = reader.messages(1)
        assert [(str(m.role), m.content) for m in messages] == [
            ("user", "Capital of France?"),
            ("assistant", " Paris is."),
        ]
        reply = messages[-1]
        assert (reply.model_id, reply.prompt_len, reply.tokens) == ("some/model", 6, 3)
        assert reader.prompt(reply.id).text == "<|user|>Capital of France?<|assistant|>"
        assert reader.prompt(reply.id).tokens == ("", "", "", " France", "", "")
        step = reader.step(reply.id, 1)
        assert (step.token, step.token_id, step.position, step.rank) == (" is", 41, 7, 1)
        assert (step.prob, step.logprob) == (0.75, math.log(0.75))
        assert math.isnan(step.entropy) and math.isnan(step.logit)
        assert step.decision is None and step.sampled_prob is None
        # The candidate of the chosen token's text is that token; the other has no id of a model.
        assert step.topk.token_ids[0] == 41 and step.topk.token_ids[1] < -1
        assert step.evidence is not None
        assert step.evidence.positions.tolist() == [3, 6]
        assert step.lens is not None
        assert step.lens.settle_layer == 2
        assert step.lens.chosen_rank.tolist() == [0, 0, 1]


def test_equal_texts_are_the_same_token_and_others_are_not(tmp_path: Path) -> None:
    trace = without(v1_trace(), "chosen_id")
    with TraceReader(bring(tmp_path, trace)) as reader:
        steps = list(reader.iter_steps(2))
    assert all(step.token_id == step.topk.token_ids[0] for step in steps)
    assert len({step.token_id for step in steps}) == 3
    assert all(step.token_id != step.topk.token_ids[1] for step in steps)


def test_it_goes_out_again_as_it_came(tmp_path: Path) -> None:
    trace = v1_trace()
    with TraceReader(bring(tmp_path, trace)) as reader, (tmp_path / "x").open("w") as standard:
        export(reader, 1, Format.TRACE_V1, tmp_path / "again.json", standard)
    assert json.loads((tmp_path / "again.json").read_text()) == trace


def test_ids_that_were_not_there_are_null_and_stay_so(tmp_path: Path) -> None:
    with TraceReader(bring(tmp_path, v1_trace())) as reader, (tmp_path / "x").open("w") as file:
        export(reader, 1, Format.JSON, tmp_path / "one.json", file)
    import_path(tmp_path / "one.json", tmp_path / "u.db")
    with TraceReader(tmp_path / "u.db") as reader, (tmp_path / "x").open("w") as file:
        export(reader, 1, Format.JSON, tmp_path / "two.json", file)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    (_, reply) = json.loads((tmp_path / "one.json").read_text())["messages"]
    candidates = reply["trace"]["steps"][0]["logits_topk"]
    assert [entry["token_id"] for entry in candidates] == [40, None]


def test_a_list_of_traces_that_go_on_with_each_other_is_one_conversation(tmp_path: Path) -> None:
    first = v1_trace()
    before = [*first["messages"], {"role": "assistant", "content": first["output"]}]
    second = {**v1_trace(), "messages": [*before, {"role": "user", "content": "And Spain?"}]}
    other = {**v1_trace(), "messages": [{"role": "user", "content": "Something else"}]}
    db = bring(tmp_path, [first, second, other])
    with TraceReader(db) as reader:
        assert [m.content for m in reader.messages(1)] == [
            *("Capital of France?", first["output"], "And Spain?", first["output"]),
        ]
        assert reader.messages(2)[0].content == "Something else"
        assert reader.conversation(2).title == "Something else"
