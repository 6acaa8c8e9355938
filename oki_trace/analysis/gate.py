"""What SQL from outside may say: one statement that reads our tables, and nothing else.

DuckDB itself is shut in (``engine``): no file but the cache's, no network, no
setting. Yet its SELECT may hold a COPY or an INSERT, as a WITH clause, and the
cache's own files are within reach. So the statement's syntax tree, as DuckDB
parses it, is looked through first: only nodes that read, only table functions
that make rows of nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from oki_trace.errors import QuestionError

_READING = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_TABLE_FUNCTIONS = frozenset({"generate_series", "range", "repeat", "repeat_row", "unnest"})
# Scalar functions that run SQL of their own, or reach out of the question.
_REFUSED = frozenset({"getenv", "getvariable", "nextval", "query", "query_table", "write_log"})

_A_NAME = re.compile(r"\w+\Z")

_ONLY_TABLES = (
    "{} is not allowed: a question can read only the tables that `oki-trace sql --tables` lists."
)
_ONE_SELECT = "Ask with one SELECT statement: nothing can be changed, and nothing else is read."


def check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise QuestionError unless ``sql`` is one statement that only reads tables."""
    found = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
    assert found is not None
    tree: dict[str, Any] = json.loads(found[0])
    if tree["error"]:
        if tree.get("error_type") == "parser":
            raise QuestionError(f"The SQL cannot be read: {tree['error_message']}.")
        raise QuestionError(_ONE_SELECT)
    if len(tree["statements"]) != 1:
        raise QuestionError(_ONE_SELECT)
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in _READING:
            raise QuestionError(_ONE_SELECT)
        if kind == "TABLE_FUNCTION":
            name = _name(node["function"])
            if name not in _TABLE_FUNCTIONS:
                raise QuestionError(_ONLY_TABLES.format(name + "()"))
        # DuckDB takes a table's name that looks like a file for the file.
        if kind == "BASE_TABLE" and not _A_NAME.match(str(node.get("table_name", ""))):
            raise QuestionError(_ONLY_TABLES.format(node["table_name"]))
        if kind == "FUNCTION" and _name(node) in _REFUSED:
            raise QuestionError(f"{_name(node)}() is not allowed: ask without it.")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _name(function: dict[str, Any]) -> str:
    return str(function.get("function_name", "")).lower()
