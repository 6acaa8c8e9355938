"""What is private stays so: files, passwords, and no statement put together from text."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import URL

from oki_trace.cli import options
from oki_trace.errors import OkiTraceError
from oki_trace.records import Status, TurnEnd
from oki_trace.store.maintenance.prune import plan, prune
from oki_trace.store.maintenance.vacuum import vacuum
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.schema import identity, migrate
from oki_trace.store.writing.copy import copy
from oki_trace.store.writing.writer import TraceWriter
from tests import builders
from tests.store.golden import build
from tests.store.stores import Store

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cr3tW0rd"


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*")}


def test_nothing_that_is_made_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "home"
        path = folder / "traces" / "store.db"
        with TraceWriter(path) as writer, TraceReader(path) as reader:
            store = Store(str(path), writer, reader)
            _, message = store.reply("half")
            writer.append(message, [builders.step(0, np.random.default_rng(0))])
            assert {"traces/store.db-wal", "traces/store.db-shm"} <= modes(folder).keys()
            writer.finish_reply(message, TurnEnd(Status.COMPLETE, "x", "end", 1.0))
            list(copy(path, folder / "copied" / "store.db"))
            prune(writer, plan(reader, max_bytes=0))
            found = modes(folder)
        vacuum(path)
        migrate.downgrade(path, "base")
        found |= modes(folder)
    finally:
        os.umask(before)
    assert {mode for name, mode in found.items() if (folder / name).is_dir()} == {0o700}
    assert {name: mode for name, mode in found.items() if mode not in (0o600, 0o700)} == {}
    assert {mode for name, mode in found.items() if not (folder / name).is_dir()} == {0o600}


def test_a_backup_cannot_be_read_by_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.unpack(identity.HISTORY[0], file)
    before = os.umask(0)
    try:
        migrate._back_up_if_older(file, identity.SCHEMA + 1)
    finally:
        os.umask(before)
    (backup,) = file.parent.glob("*.bak")
    assert backup.stat().st_mode & 0o777 == 0o600


# Every way to write a password into an address, with marks that mean something in one.
AWKWARD = st.text(st.sampled_from("@:/?#%&=+ '\"\\[]é🙂"), max_size=4)
HOSTS = st.sampled_from(["127.0.0.1:9", "[::1]:9", "localhost:9", "no-such-host.invalid", ""])
QUERIES = st.sampled_from(["", "?sslmode=require", "?application_name=x", "?nonsense=1"])


@st.composite
def addresses(draw: st.DrawFn) -> str:
    password = draw(AWKWARD) + SECRET + draw(AWKWARD)
    plain = URL.create("postgresql", username=draw(st.sampled_from(["me", "m@e", ""])))
    user = plain.set(password=password).render_as_string(hide_password=False)
    style = draw(st.sampled_from(["quoted", "raw", "query"]))
    host, query = draw(HOSTS), draw(QUERIES)
    if style == "quoted":
        return user.rstrip("/") + ("" if "@" in user else "@") + host + "/traces" + query
    if style == "raw":
        return f"postgresql://me:{password}@{host}/traces{query}"
    joined = "&" if query else "?"
    key = draw(st.sampled_from(["password", "sslpassword"]))
    return f"postgresql://me@{host}/traces{query}{joined}{key}={SECRET}"


@settings(max_examples=60, deadline=None)
@example(f"postgresql://me:@{SECRET}?@127.0.0.1:9/traces", TraceReader)
@given(address=addresses(), open_it=st.sampled_from([TraceReader, TraceWriter, migrate.ensure]))
def test_a_password_is_in_no_message(address: str, open_it: object) -> None:
    try:
        assert SECRET not in options.shown(address)
    except OkiTraceError as error:
        assert SECRET not in str(error)
    with pytest.raises(OkiTraceError) as caught:
        open_it(address)  # type: ignore[operator]
    assert SECRET not in str(caught.value)


def statements(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that hand a statement to a database."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("text", "DDL", "exec_driver_sql") or name.startswith("execute"):
                yield node


def is_put_together(node: ast.expr) -> bool:
    """Whether an expression makes text out of pieces."""
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        return not isinstance(node, ast.BinOp) or isinstance(node.op, ast.Add | ast.Mod)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("format", "join", "replace")
    return False


SOURCES = sorted((*(ROOT / "oki_trace").rglob("*.py"), *(ROOT / "migrations").rglob("*.py")))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_statement_is_put_together_from_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_put_together(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    faults = []
    for call in statements(tree):
        first = call.args[0]
        if is_put_together(first) or (isinstance(first, ast.Name) and first.id in made):
            faults.append(call.lineno)
    if path.name == "rows.py":
        # A bulk insert: the compiler's own text, repeated; every value is bound.
        assert len(faults) == 1
        return
    assert faults == []
