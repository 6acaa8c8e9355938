"""The shape of the package: which room may import which, and which library.

Imports are read from the source, those inside functions and under
``TYPE_CHECKING`` too: a room that needs another's name for a type depends on it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "oki_trace"

# The higher may import the lower, never the other way round.
ORDER = (
    {"cli", "worker", "dashboard", "launcher", "api", "bench", "__main__"},
    {"model_supervisor", "model_process"},
    {
        "generate",
        "queueing",
        "tracing",
        "recompute",
        "trace_differences",
        "exchange",
        "analysis",
        "llm",
    },
    {"store"},
    {"chat_messages", "template_options"},
    {"explain"},
    {"records", "settings", "errors", "sanitize", "child_process", "input_text"},
)
TORCH = {"torch", "transformers", "accelerate", "bitsandbytes", "tokenizers"}
SQL = {"sqlalchemy", "alembic"}
FORBIDDEN = {
    "store": TORCH | {"duckdb", "streamlit"},
    "llm": SQL | {"streamlit", "duckdb"},
    "dashboard": TORCH | SQL | {"duckdb"},
    "exchange": TORCH | {"streamlit", "duckdb"},
    "analysis": TORCH | {"streamlit"},
    "tracing": {"streamlit", "duckdb"},
    "generate": {"streamlit", "duckdb"},
    "recompute": SQL | {"streamlit", "duckdb"},
    "queueing": TORCH | {"streamlit", "duckdb"},
    "launcher": TORCH | SQL | {"duckdb"},
    "worker": TORCH | {"streamlit", "duckdb"},
    "model_supervisor": TORCH | SQL | {"streamlit", "duckdb"},
    "model_process": {"streamlit", "duckdb"},
    "cli": {"duckdb"},
}
GROUND = {"records", "settings", "errors", "sanitize", "child_process", "input_text"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module with the room it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        yield first.removesuffix(".py"), path
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        yield "dashboard", path


def imports(path: Path) -> set[str]:
    """The absolute dotted names that a module imports; ``from a import b`` gives a and a.b."""
    found: set[str] = set()
    base = ROOT if path.is_relative_to(PACKAGE) else path.parent.parent
    here = path.relative_to(base).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (prefix, node.module or "") if part)
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def rooms(path: Path) -> set[str]:
    """The rooms of ours that a module imports."""
    names = {name for name in imports(path) if name.startswith(("oki_trace.", "dashboard"))}
    return {name.split(".")[1] if name.startswith("oki_trace.") else "dashboard" for name in names}


def level(room: str) -> int | None:
    return next((i for i, names in enumerate(ORDER) if room in names), None)


MODULES = [pytest.param(room, path, id=str(path.relative_to(ROOT))) for room, path in modules()]


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_module_has_a_room(room: str, path: Path) -> None:
    assert room == "__init__" or level(room) is not None, f"name the room {room} in ORDER"


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_nothing_imports_upward(room: str, path: Path) -> None:
    own = level(room)
    if own is None:
        pytest.skip("the package itself offers what its rooms make")
    known = {other: level(other) for other in rooms(path)}
    assert not {other for other, at in known.items() if at is not None and at < own}


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_room_keeps_to_its_libraries(room: str, path: Path) -> None:
    used = libraries(path)
    assert not used & FORBIDDEN.get(room, set())
    if room != "analysis":
        assert "duckdb" not in used


@pytest.mark.parametrize(("room", "path"), [p for p in MODULES if p.values[0] in GROUND])
def test_ground_floor_stands_alone(room: str, path: Path) -> None:
    assert rooms(path) <= GROUND
    assert libraries(path) - {"oki_trace"} <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_module_is_small_and_well_named(room: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert path.stem not in {"utils", "helpers", "util", "helper", "common", "misc", "manager"}


def test_import_is_light() -> None:
    """``import oki_trace`` starts fast, also where torch is not installed."""
    code = (
        "import sys, oki_trace\n"
        "heavy = {'torch', 'transformers', 'streamlit', 'sqlalchemy', 'pandas', 'duckdb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
