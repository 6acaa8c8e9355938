"""Questions and SQL about readings by installed lenses, against the records themselves."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oki_trace.analysis import questions
from oki_trace.analysis.query_session import QuerySession
from oki_trace.cli import main
from oki_trace.errors import QuestionError, UsageError
from oki_trace.records import LOGIT, Lens, Step
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.readings import ReadingWriter
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.analysis import made

STEPS = 12


def fill(db: str) -> list[Step]:
    """A reply of which every step is read by tuned-1.0, and all but two by jlens; its steps."""
    rng = np.random.default_rng(3)
    steps = []
    for index in range(STEPS):
        step = builders.step(index, rng, with_lens=True, with_tensors=False)
        assert step.lens is not None
        # The chosen token settles at any layer, or never.
        ranks = rng.integers(1, 3, size=4)
        lens = replace(step.lens, chosen_rank=ranks)
        jlens = builders.reading("jlens", lens, rng, (1, 3))
        tuned = builders.reading("tuned-1.0", lens, rng)
        lenses = (jlens, tuned) if index >= 2 else (tuned,)
        router = builders.routing(rng)
        steps.append(replace(step, lens=lens, lenses=lenses, router=router))
    with TraceWriter(db) as writer:
        _, reply = made.begin(writer, steps=0)
        writer.append(reply, steps)
        made.finish(writer, reply)
        made.whole(writer, "not read by any other lens", steps=2, model="another/model")
    return steps


def readings(steps: list[Step], name: str) -> list[Lens]:
    of_steps = [{lens.name: lens for lens in (*s.lenses, s.lens) if lens} for s in steps]
    return [lenses[name] for lenses in of_steps if name in lenses]


def rows(session: QuerySession, name: str, view: str | None = None, **options: Any) -> list[Any]:
    answer = questions.answer(session, name, view=view, **options)
    names = [column.name for column in answer.columns]
    return [dict(zip(names, row, strict=True)) for row in answer.rows]


def test_sql_has_every_row_of_every_lens(db: str) -> None:
    steps = fill(db)
    every = [lens for step in steps for lens in (*step.lenses, step.lens) if lens is not None]
    with QuerySession(db) as session, TraceReader(db) as reader:
        ids = reader.step_ids(2, 0)
        layers = session.ask(
            "SELECT step_id, lens, layer, kl, chosen_rank, top_id, top_prob FROM lens_layer "
            "WHERE message_id = 2 ORDER BY ALL"
        ).rows
        assert layers == tuple(
            sorted(
                (
                    ids[lens.step_index],
                    lens.name,
                    layer,
                    float(lens.kl[row]),
                    int(lens.chosen_rank[row]),
                    int(lens.token_ids[row, 0]),
                    float(lens.probs[row, 0]),
                )
                for lens in every
                for row, layer in enumerate(lens.layer_numbers.tolist())
            )
        )
        entries = session.ask(
            "SELECT step_id, lens, layer, rank, token_id FROM lens_entry "
            "WHERE message_id = 2 ORDER BY ALL"
        ).rows
        assert entries == tuple(
            sorted(
                (ids[lens.step_index], lens.name, layer, rank + 1, int(lens.token_ids[row, rank]))
                for lens in every
                for row, layer in enumerate(lens.layer_numbers.tolist())
                for rank in range(lens.token_ids.shape[1])
            )
        )
        experts = session.ask(
            "SELECT step_index, layer, rank, expert, weight FROM router_entry ORDER BY ALL"
        ).rows
        assert experts == tuple(
            sorted(
                (step.step_index, one.layer, rank + 1, int(one.experts[rank]), float(weight))
                for step in steps
                for one in step.router
                for rank, weight in enumerate(one.weights)
            )
        )
        settled = session.ask(
            "SELECT settle_layer, layers FROM step WHERE message_id = 2 ORDER BY step_index"
        ).rows
        assert settled == tuple((step.lens.settle_layer, 3) for step in steps if step.lens)


def test_a_lens_that_is_applied_later_is_in_the_next_answer(db: str) -> None:
    steps = fill(db)
    count = "SELECT count(*) FROM lens_layer WHERE lens = 'jlens'"
    with QuerySession(db) as session:
        assert session.ask(count).rows == ((2 * (STEPS - 2),),)
        with TraceReader(db) as reader, TraceWriter(db) as writer:
            step_id = reader.step_ids(2, 0)[0]
            assert steps[0].lens is not None
            reading = builders.reading("jlens", steps[0].lens, np.random.default_rng(0), (1, 3))
            ReadingWriter(writer).add(step_id, reading)
        assert session.ask(count).rows == ((2 * (STEPS - 1),),)
        with TraceWriter(db) as writer:
            ReadingWriter(writer).remove(2, "jlens")
        assert session.ask(count).rows == ((0,),)
        assert session.ask("SELECT count(*) FROM step").rows == ((STEPS + 2,),)


@pytest.mark.parametrize("name", [LOGIT, "jlens", "tuned-1.0"])
def test_layers_of_one_lens(db: str, name: str) -> None:
    own = readings(fill(db), name)
    with QuerySession(db) as session:
        found = [row for row in rows(session, "layers", lens=name) if row["model"] == "tiny/model"]
    assert [row["layer"] for row in found] == own[0].layer_numbers.tolist()
    assert {row["steps"] for row in found} == {len(own)}
    for place, row in enumerate(found):
        assert row["kl"] == pytest.approx(np.mean([lens.kl[place] for lens in own]), rel=1e-6)
        on_top = np.mean([lens.chosen_rank[place] == 1 for lens in own])
        assert row["agreement"] == pytest.approx(on_top)


def test_lenses_are_compared_on_the_steps_that_all_of_them_have_read(db: str) -> None:
    steps = fill(db)
    with QuerySession(db) as session:
        found = rows(session, "layers", "lens")
        chosen = rows(session, "layers", lens="jlens,tuned-1.0")
        both = rows(session, "layers", lens="logit,tuned-1.0")
        with pytest.raises(
            QuestionError, match="lens other; the lenses of these replies: jlens, l"
        ):
            rows(session, "layers", lens="tuned-1.0,other")
    mine = [row for row in found if row["model"] == "tiny/model"]
    assert {row["steps"] for row in mine} == {STEPS - 2}
    assert [(row["layer"], row["lens"]) for row in mine] == [
        *((0, LOGIT), (0, "tuned-1.0")),
        *((1, LOGIT), (1, "jlens"), (1, "tuned-1.0")),
        *((2, LOGIT), (2, "tuned-1.0")),
        *((3, LOGIT), (3, "jlens"), (3, "tuned-1.0")),
    ]
    for row in mine:
        own = readings(steps[2:], row["lens"])
        place = own[0].layer_numbers.tolist().index(row["layer"])
        assert row["kl"] == pytest.approx(np.mean([lens.kl[place] for lens in own]), rel=1e-6)
    # A model that only the Logit Lens has read is compared with nothing.
    assert {row["lens"] for row in found if row["model"] != "tiny/model"} == {LOGIT}
    assert chosen == [row for row in mine if row["lens"] != LOGIT]
    assert {row["steps"] for row in both if row["model"] == "tiny/model"} == {STEPS}


@pytest.mark.parametrize("name", [LOGIT, "jlens", "tuned-1.0"])
def test_where_tokens_settle_by_one_lens(db: str, name: str) -> None:
    own = readings(fill(db), name)
    with QuerySession(db) as session:
        found = {
            row["layer"]: row
            for row in rows(session, "settle", lens=name)
            if row["model"] == "tiny/model"
        }
        by_model = rows(session, "settle", "model", lens=name)
        assert rows(session, "settle", "class", lens=name)
        assert rows(session, "settle", "position", lens=name)
    settled = [lens.settle_layer for lens in own]
    assert len(set(settled)) > 1
    assert {layer: row["steps"] for layer, row in found.items()} == {
        layer: settled.count(layer) for layer in set(settled)
    }
    for layer, row in found.items():
        if layer is not None:
            probs = [
                lens.chosen_prob[lens.layer_numbers.tolist().index(layer)]
                for lens in own
                if lens.settle_layer == layer
            ]
            assert row["prob_at_layer"] == pytest.approx(np.mean(probs), rel=1e-6)
    (mine,) = (row for row in by_model if row["model"] == "tiny/model")
    assert mine["steps"] == len(own)
    assert mine["in_last_layer"] == pytest.approx(
        settled.count(3) / sum(x is not None for x in settled)
    )


def test_rivals_of_one_lens(db: str) -> None:
    own = readings(fill(db), "tuned-1.0")
    least = 0.2
    with QuerySession(db) as session:
        found = rows(session, "rivals", lens="tuned-1.0", least=least, from_layer=1, top=100)
        by_layer = rows(session, "rivals", "layer", lens="tuned-1.0", least=least, from_layer=1)
    has_rival = [(lens.probs[1:, 0] >= least) & (lens.chosen_rank[1:] > 1) for lens in own]
    assert {row["step"]: row["layers"] for row in found} == {
        lens.step_index: int(has.sum())
        for lens, has in zip(own, has_rival, strict=True)
        if has.any()
    }
    shares = np.mean(has_rival, axis=0)
    assert [row["share"] for row in by_layer] == pytest.approx(shares.tolist())


def test_what_is_no_lens_is_refused(db: str) -> None:
    fill(db)
    with QuerySession(db) as session:
        for name in ("layers", "settle", "rivals"):
            with pytest.raises(
                QuestionError, match="lens other; the lenses of these replies: jlens"
            ):
                rows(session, name, lens="other")
    assert questions.parse_options("layers", ["lens=jlens, logit,jlens"]) == {"lens": "jlens,logit"}
    for pair in ("lens=", "lens=A", "lens=a,b", "lens=x' OR 1", "lens=logit,"):
        with pytest.raises(UsageError, match=r"lens \(the name of a lens\)"):
            questions.parse_options("settle", [pair])
    with pytest.raises(UsageError, match=r"lens \(names of lenses with commas\)"):
        questions.parse_options("layers", ["lens=a,,b"])


def test_the_command_line_names_lenses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = str(tmp_path / "store.db")
    fill(db)

    def ask(*arguments: str) -> tuple[int, list[dict[str, str]]]:
        with pytest.raises(SystemExit) as ended:
            main(["ask", *arguments, "--format", "csv", "--db", db])
        return int(ended.value.code or 0), list(
            csv.DictReader(io.StringIO(capsys.readouterr().out))
        )

    status, table = ask("layers", "--lens", "jlens", "--lens", "logit")
    assert status == 0
    assert [row["lens"] for row in table if row["layer"] == "1"] == [LOGIT, "jlens"]
    status, table = ask("settle", "--lens", "jlens")
    assert (status, sum(int(row["steps"]) for row in table)) == (0, STEPS - 2)
    assert ask("uncertainty", "--lens", "jlens")[0] == 2
