"""Checks the user's SQL: it must be one statement that reads our tables and nothing else.

DuckDB itself has no access to other files, networks or settings (``engine``). But a SELECT may
contain a COPY or an INSERT in its WITH clause, and the cache's own files are readable. The syntax
tree from DuckDB's parser is therefore checked first: it may contain only nodes that read, and only
table functions that read no file.
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
# Scalar functions that run SQL of their own, or read settings.
_REFUSED = frozenset(
    {
        *("current_setting", "getenv", "getvariable", "json_serialize_plan", "nextval"),
        *("pg_get_viewdef", "query", "query_table", "setval", "write_log"),
    }
)
# The schemas of our tables; another name may be the folder of a file.
_SCHEMAS = frozenset({("", ""), ("", "main"), ("memory", "main"), ("", "memory")})
_A_NAME = re.compile(r"\w+\Z")
_SHOWN = ('"tables"',)
_LONGEST_NAME = 100
# The time of DuckDB's planner grows with their square.
_MOST_SELECTS = 1_000

_ONLY_TABLES = (
    "{} is not allowed: a question can read only the tables that `oki-trace sql --tables` lists."
)
TOO_DEEP = "The statement is nested too deeply: use fewer subqueries and brackets."
_ONE_SELECT = "Write one SELECT statement: the store is read-only."


def check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise QuestionError unless ``sql`` is one statement that only reads tables."""
    row = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
    assert row is not None
    try:
        tree: dict[str, Any] = json.loads(row[0])
    except RecursionError as error:
        raise QuestionError(TOO_DEEP) from error
    if tree["error"]:
        message = str(tree.get("error_message", ""))
        if "expression depth" in message:
            raise QuestionError(TOO_DEEP)
        if "memory" in message.lower() or "allocation" in message.lower():
            raise MemoryError
        if tree.get("error_type") == "parser":
            raise QuestionError(f"The SQL cannot be parsed: {message.rstrip('.')}.")
        raise QuestionError(_ONE_SELECT)
    if len(tree["statements"]) != 1:
        raise QuestionError(_ONE_SELECT)
    selects = 0
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if kind.endswith("_NODE") and kind not in _READING:
            raise QuestionError(_ONE_SELECT)
        if kind == "TABLE_FUNCTION":
            name = _name(node["function"])
            if name not in _TABLE_FUNCTIONS:
                raise QuestionError(_ONLY_TABLES.format(name + "()"))
        if kind in ("BASE_TABLE", "SHOW_REF"):
            _check_table(node)
        if kind == "FUNCTION" and _name(node) in _REFUSED:
            raise QuestionError(f"{_name(node)}() is not allowed: leave it out.")
        selects += kind == "SELECT_NODE"
        if selects > _MOST_SELECTS:
            raise QuestionError(
                f"The statement has more than {_MOST_SELECTS:,} SELECTs: use fewer."
            )


def _check_table(node: dict[str, Any]) -> None:
    """Refuse names that DuckDB reads as a file, also in parts: "x".parquet."""
    catalog, schema, name = (
        str(node.get(part, "")) for part in ("catalog_name", "schema_name", "table_name")
    )
    whole = ".".join(filter(None, (catalog, schema, name)))
    if node["type"] == "SHOW_REF":
        allowed = not catalog and not schema and name in ("", *_SHOWN)
    else:
        allowed = (catalog, schema) in _SCHEMAS and _A_NAME.match(name) is not None
    if not allowed:
        raise QuestionError(_ONLY_TABLES.format(_shortened(whole)))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _shortened(name: str) -> str:
    shown = " ".join(name.split())
    return shown if len(shown) <= _LONGEST_NAME else shown[: _LONGEST_NAME - 1] + "…"


def _name(function: dict[str, Any]) -> str:
    return str(function.get("function_name", "")).lower()
