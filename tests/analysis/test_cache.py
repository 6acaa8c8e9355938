"""The cache says what the store says, whatever happens to either."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from oki_trace.analysis import cache, questions
from oki_trace.analysis.folder import Folder, folder_of
from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.scope import Scope
from oki_trace.analysis.tables import TABLES
from oki_trace.errors import QuestionError, StoreError
from oki_trace.exchange.exporting import export
from oki_trace.exchange.formats import Format
from oki_trace.exchange.importing import import_path
from oki_trace.store.maintenance.prune import prune_tensors
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.analysis import made


def steps_of(session: QuerySession) -> dict[int, int]:
    """How many steps each message has, by the cache."""
    return dict(session.ask("SELECT message_id, count(*) FROM step GROUP BY 1 ORDER BY 1").rows)


def cached(db: str) -> set[int]:
    """The messages whose words lie in the files of the cache, whatever the manifest says."""
    found: set[int] = set()
    for file in folder_of(db).rglob("message.parquet"):
        found.update(pq.read_table(file)["id"].to_pylist())
    return found


class TestSameAsTheStore:
    def test_every_row_of_every_table(self, db: str) -> None:
        with TraceWriter(db) as writer:
            finished = [made.whole(writer)[1] for _ in range(3)]
            running = made.begin(writer)[1]
            with QuerySession(db) as session, TraceReader(db) as reader:
                for message in (*finished, running):
                    for step in reader.iter_steps(message):
                        assert_same(session, message, step)
                assert cached(db).isdisjoint({running}) and set(finished) <= cached(db)

    def test_columns_are_the_ones_told(self, db: str) -> None:
        with TraceWriter(db) as writer:
            made.whole(writer)
            made.begin(writer)
        with QuerySession(db) as session:
            for table in TABLES:
                found = session.ask(
                    "SELECT column_name, column_type FROM (DESCRIBE " + table.name + ")"
                )
                assert list(found.rows) == [(c.name, c.kind) for c in table.columns]

    def test_an_empty_store_has_empty_tables(self, db: str) -> None:
        TraceWriter(db).close()
        with QuerySession(db) as session:
            assert session.ask("SELECT count(*) FROM lens_entry").rows == ((0,),)

    def test_what_is_not_a_number_is_null_and_infinity_stays(self, db: str) -> None:
        rng = np.random.default_rng(0)
        step = builders.step(0, rng, with_lens=True, with_tensors=False)
        step.topk.logits[-1] = -np.inf
        step.topk.probs[-1] = np.nan
        with TraceWriter(db) as writer:
            _, reply = made.begin(writer, steps=0)
            writer.append(reply, [step])
            made.finish(writer, reply)
        with QuerySession(db) as session:
            last = session.ask("SELECT logit, prob FROM topk_entry ORDER BY rank DESC LIMIT 1").rows
        assert last == ((-np.inf, None),)


def assert_same(session: QuerySession, message: int, step: object) -> None:
    """Every entry of a step, as the reader gives it, is in the tables."""
    from oki_trace.records import Step

    assert isinstance(step, Step) and step.lens is not None
    at = {"message": message, "step": step.step_index}

    def rows(sql: str) -> list[tuple[object, ...]]:
        where = " WHERE message_id = $message AND step_index = $step ORDER BY ALL"
        return list(session.ask(sql + where, at).rows)

    assert rows("SELECT token_id, token, prob, logprob, entropy, rank, margin FROM step") == [
        (step.token_id, step.token, step.prob, step.logprob, step.entropy, step.rank, step.margin)
    ]
    top = step.topk
    assert rows("SELECT rank, token_id, token, prob FROM topk_entry") == [
        (i + 1, *row)
        for i, row in enumerate(
            zip(top.token_ids.tolist(), top.tokens, top.probs.tolist(), strict=True)
        )
    ]
    lens = step.lens
    assert rows("SELECT layer, rank, token_id, token, prob FROM lens_entry") == [
        (
            layer,
            k + 1,
            int(lens.token_ids[layer, k]),
            lens.tokens[layer][k],
            float(lens.probs[layer, k]),
        )
        for layer in range(len(lens.tokens))
        for k in range(lens.token_ids.shape[1])
    ]
    assert rows("SELECT layer, chosen_rank, kl, top_id, top_token, top_prob FROM lens_layer") == [
        (
            layer,
            int(lens.chosen_rank[layer]),
            float(lens.kl[layer]),
            int(lens.token_ids[layer, 0]),
            lens.tokens[layer][0],
            float(lens.probs[layer, 0]),
        )
        for layer in range(len(lens.tokens))
    ]
    assert rows("SELECT layer, rank, position, weight FROM attention_entry") == [
        (one.layer, rank + 1, position, weight)
        for one in step.attention
        for rank, (position, weight) in enumerate(
            zip(one.positions.tolist(), one.weights.tolist(), strict=True)
        )
    ]


class TestInStep:
    def test_what_is_deleted_leaves_the_files(self, db: str) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session:
            first, one = made.whole(writer)
            _, other = made.whole(writer)
            assert steps_of(session) == {one: 3, other: 3}
            writer.delete_conversation(first)
            assert steps_of(session) == {other: 3}
            assert one not in cached(db) and other in cached(db)

    def test_the_last_one_deleted_leaves_nothing(self, db: str) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session:
            conversation, _ = made.whole(writer)
            steps_of(session)
            writer.delete_conversation(conversation)
            assert steps_of(session) == {} and cached(db) == set()

    def test_a_running_reply_is_there_and_then_written_once(self, db: str) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session:
            _, reply = made.begin(writer, steps=2)
            assert steps_of(session) == {reply: 2} and reply not in cached(db)
            made.more(writer, reply, 2, 5)
            assert steps_of(session) == {reply: 5} and reply not in cached(db)
            made.finish(writer, reply)
            assert steps_of(session) == {reply: 5} and reply in cached(db)
            before = sorted(folder_of(db).rglob("*.parquet"))
            made.whole(writer)
            steps_of(session)
            assert set(before) <= set(folder_of(db).rglob("*.parquet"))

    def test_what_is_imported_is_asked_about(self, db: str, tmp_path: Path) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session, TraceReader(db) as reader:
            conversation, reply = made.whole(writer, "Where is it?")
            assert steps_of(session) == {reply: 3}
            export(reader, conversation, Format.JSON, tmp_path / "one.json", sys.stdout)
            import_path(tmp_path / "one.json", db)
            (other,) = steps_of(session).keys() - {reply}
            assert steps_of(session) == {reply: 3, other: 3} and other in cached(db)
            asked = session.ask("SELECT count(*) FROM message WHERE content = 'Where is it?'").rows
            assert asked == ((2,),)

    def test_pruned_tensors_are_not_asked_for_and_the_rows_stay(self, db: str) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session:
            replies = []
            for seed in (0, 1):
                _, reply = made.begin(writer, steps=0, tensors="half")
                step = builders.step(0, np.random.default_rng(seed), with_lens=True)
                writer.append(reply, [step])
                made.finish(writer, reply)
                replies.append(reply)
            two = tuple(f"{reply}:0" for reply in replies)
            assert "from full logits" in questions.answer(session, "compare", two).about
            rows = session.ask("SELECT * FROM topk_entry ORDER BY ALL").rows
            prune_tensors(writer, replies[0])
            assert "from top-10" in questions.answer(session, "compare", two).about
            assert session.ask("SELECT * FROM topk_entry ORDER BY ALL").rows == rows

    def test_a_new_title_is_seen(self, db: str) -> None:
        with TraceWriter(db) as writer, QuerySession(db) as session:
            conversation, _ = made.whole(writer)
            steps_of(session)
            writer.rename_conversation(conversation, "Renamed")
            assert session.ask("SELECT title FROM conversation").rows == (("Renamed",),)

    def test_another_store_at_the_same_place(self, tmp_path: Path) -> None:
        path = tmp_path / "store.db"
        for said in ("the first", "the second"):
            with TraceWriter(path) as writer:
                made.whole(writer, said)
            with QuerySession(path) as session:
                asked = session.ask("SELECT content FROM message WHERE role = 'user'").rows
                assert asked == ((said,),)
            for file in tmp_path.glob("store.db*"):
                if file.is_file():
                    file.unlink()

    def test_long_replies_come_whole(self, db: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("oki_trace.analysis.arrow_tables.STEPS_AT_ONCE", 4)
        with TraceWriter(db) as writer, QuerySession(db) as session:
            reply = made.whole(writer, steps=12)[1]
            found = session.ask("SELECT step_index FROM step ORDER BY message_id, step_index").rows
            assert found == tuple((i,) for i in range(12)) and steps_of(session) == {reply: 12}


class TestWhole:
    """SQLite is enough here: what is tested is the folder."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        path = str(tmp_path / "store.db")
        with TraceWriter(path) as writer:
            made.whole(writer)
            made.whole(writer)
        with QuerySession(path) as session:
            assert len(steps_of(session)) == 2
        return path

    @pytest.mark.parametrize("harm", ["torn", "missing", "manifest", "format", "all"])
    def test_a_damaged_folder_is_written_anew(self, path: str, harm: str) -> None:
        folder = folder_of(path)
        file = next(folder.rglob("lens_entry.parquet"))
        manifest = folder / "manifest.json"
        if harm == "torn":
            file.write_bytes(file.read_bytes()[:-7])
        elif harm == "missing":
            file.unlink()
        elif harm == "manifest":
            manifest.write_text(manifest.read_text()[:40])
        elif harm == "format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
        else:
            for one in folder.rglob("*"):
                if one.is_file():
                    one.unlink()
        with QuerySession(path) as session:
            assert len(steps_of(session)) == 2
            assert session.ask("SELECT count(*) FROM lens_entry").rows == ((2 * 3 * 4 * 5,),)

    def test_what_an_interrupted_write_left_is_swept_away(self, path: str) -> None:
        folder = folder_of(path)
        left = folder / ".new-left"
        left.mkdir()
        (left / "step.parquet").write_bytes(b"half")
        with TraceWriter(path) as writer:
            made.whole(writer)
        with QuerySession(path) as session:
            assert len(steps_of(session)) == 3
        assert not left.exists()

    def test_a_change_cut_short_counts_for_nothing(
        self, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with TraceWriter(path) as writer:
            made.whole(writer)

        def fail(self: Folder, manifest: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "commit", fail)
            with QuerySession(path) as session, pytest.raises(KeyboardInterrupt):
                steps_of(session)
        with QuerySession(path) as session:
            assert len(steps_of(session)) == 3
        listed = {part.name for part in Folder(folder_of(path)).manifest().parts}
        assert {entry.name for entry in folder_of(path).iterdir() if entry.is_dir()} == listed

    def test_it_is_its_users_alone(self, path: str) -> None:
        folder = folder_of(path)
        for entry in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(entry.stat().st_mode)
            assert mode == (0o700 if entry.is_dir() else 0o600), entry

    def test_rebuild(self, path: str) -> None:
        before = set(folder_of(path).rglob("*.parquet"))
        with QuerySession(path) as session:
            session.rebuild()
            assert len(steps_of(session)) == 2
        assert before.isdisjoint(folder_of(path).rglob("*.parquet"))

    def test_a_file_that_goes_while_it_is_needed(self, path: str) -> None:
        """Another process joins parts between two questions of this one."""
        with QuerySession(path) as session:
            assert len(steps_of(session)) == 2
            other = cache.Cache(path)
            other.clear()
            with TraceReader(path) as reader:
                other.sync(reader)
            assert len(steps_of(session)) == 2

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        path = tmp_path / "store.db"
        with TraceWriter(path) as writer:
            made.whole(writer)
        folder_of(str(path)).write_text("in the way")
        with QuerySession(path) as session, pytest.raises(StoreError, match="cannot be written"):
            steps_of(session)

    def test_several_processes_at_once(self, tmp_path: Path) -> None:
        path = str(tmp_path / "store.db")
        with TraceWriter(path) as writer:
            for _ in range(8):
                made.whole(writer)
        code = (
            "import sys; from oki_trace.analysis.query_session import QuerySession\n"
            "with QuerySession(sys.argv[1]) as t:\n"
            "    print(t.ask('SELECT count(*), count(DISTINCT message_id) FROM step').rows)"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [process.communicate()[0].strip() for process in running]
        assert said == ["((24, 8),)"] * 3


class TestJoining:
    def test_files_stay_few_and_nothing_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "_TIERS", (4, 12, 24))
        monkeypatch.setattr(cache, "FULL_STEPS", 24)
        path = str(tmp_path / "store.db")
        most = 0
        with TraceWriter(path) as writer, QuerySession(path) as session:
            replies = []
            for number in range(30):
                replies.append(made.whole(writer, f"question {number}", steps=1 + number % 3)[1])
                assert list(steps_of(session)) == replies
                most = max(most, len(list(folder_of(path).rglob("step.parquet"))))
            assert most <= 22 + 60 // 24
            found = session.ask("SELECT step_id, count(*) FROM lens_entry GROUP BY 1").rows
            assert Counter(count for _, count in found) == {20: sum(steps_of(session).values())}


def test_heads_are_found_where_few_replies_kept_their_tensors(tmp_path: Path) -> None:
    """An even sample over all steps would miss them."""
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        rng = np.random.default_rng(0)
        made.whole(writer, steps=400)
        conversation, kept = made.begin(writer, steps=0, tensors="half")
        writer.append(kept, [builders.step(0, rng, with_lens=True, with_tensors=True)])
        made.finish(writer, kept)
        made.whole(writer, steps=400)
        found = questions.answer(session, "heads", sample=2)
        assert found.about.startswith("1 of 1 steps read")
        with pytest.raises(QuestionError, match="No attention tensors are stored"):
            questions.answer(session, "heads", scope=Scope(conversation=conversation + 1))
