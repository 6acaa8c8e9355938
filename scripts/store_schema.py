"""Writes the tables in ``docs/store.md`` from the SQLAlchemy models. Run it after a change."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import JSON, BigInteger, Boolean, Column, Double, Integer, LargeBinary, Table

from oki_trace.store.schema.column_types import UtcTime
from oki_trace.store.schema.models import Base

PAGE = Path(__file__).resolve().parents[1] / "docs" / "store.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

_TYPES = (
    (UtcTime, "time"),
    (Boolean, "boolean"),
    (BigInteger, "integer"),
    (Integer, "integer"),
    (Double, "number"),
    (LargeBinary, "bytes"),
    (JSON, "JSON"),
)


def schema() -> str:
    """Every table with its docstring and one row per column, as Markdown."""
    return "\n".join(
        _table(mapper.class_.__doc__ or "", mapper.local_table)
        for mapper in sorted(Base.registry.mappers, key=lambda m: m.local_table.name)
    )


def _table(docstring: str, table: Table) -> str:
    paragraph = " ".join(docstring.replace("``", "`").split())
    rows = "\n".join(_row(column) for column in table.columns)
    return (
        f"### `{table.name}`\n\n{paragraph}\n\n| column | type | |\n| --- | --- | --- |\n{rows}\n"
    )


def _row(column: Column[object]) -> str:
    kind = next((name for of, name in _TYPES if isinstance(column.type, of)), "text")
    notes = ["key"] if column.primary_key else []
    notes += [f"of `{key.column.table.name}`" for key in column.foreign_keys]
    notes += ["may be NULL"] if column.nullable else []
    return f"| `{column.name}` | {kind} | {', '.join(notes)} |"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{schema()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
