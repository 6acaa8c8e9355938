"""Which package may import which, and which library.

Imports are read from the source, those inside functions and under ``TYPE_CHECKING``
too: a module that needs another's name for a type depends on it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "oki_trace"

# Packages and root modules from the top to the bottom: each may import those below it.
ORDER = (
    *("__main__", "cli", "bench", "dashboard", "launcher", "worker", "model_supervisor"),
    *("token_process",),
    *("model_process", "apply_lens", "recompute", "trace_differences", "analysis", "api"),
    *("scoring", "generate", "exchange"),
    *("tracing", "llm", "queueing", "store", "chat_messages", "template_options"),
    *("explain", "likelihood", "message_spans", "message_tree", "settings", "input_text"),
    *("records", "errors"),
    *("sanitize", "reporting", "child_process"),
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
    "apply_lens": SQL | {"streamlit", "duckdb"},
    "recompute": SQL | {"streamlit", "duckdb"},
    "queueing": TORCH | {"streamlit", "duckdb"},
    "launcher": TORCH | SQL | {"duckdb"},
    "worker": TORCH | {"streamlit", "duckdb"},
    "model_supervisor": TORCH | SQL | {"streamlit", "duckdb"},
    "token_process": SQL | {"streamlit", "duckdb"},
    "model_process": {"streamlit", "duckdb"},
    "cli": {"duckdb"},
}
BASE = set(ORDER[ORDER.index("settings") :])


def modules() -> Iterator[tuple[str, Path]]:
    """Every module, after the package it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        yield "dashboard", path


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = [pytest.param(name, path, id=str(path.relative_to(ROOT))) for name, path in modules()]
NAMES = {dotted(path): path for _, path in modules()}


def imports(path: Path) -> set[str]:
    """The absolute dotted names that a module imports; ``from a import b`` gives a and a.b."""
    names: set[str] = set()
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (prefix, node.module or "") if part)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def packages(path: Path) -> set[str]:
    """The packages and root modules of ours that a module imports."""
    names = {name for name in imports(path) if name.startswith(("oki_trace.", "dashboard"))}
    return {name.split(".")[1] if name.startswith("oki_trace.") else "dashboard" for name in names}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_every_package_has_a_place_in_the_order(package: str, path: Path) -> None:
    assert package == "__init__" or package in ORDER, f"add {package} to ORDER"


def test_the_order_names_what_exists() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == {package for package, _ in modules()} - {"__init__"}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_nothing_imports_upward(package: str, path: Path) -> None:
    if package == "__init__":
        pytest.skip("the package offers names of its modules")
    above = set(ORDER[: ORDER.index(package)])
    assert not packages(path) & above


@pytest.mark.parametrize("package", ORDER)
def test_no_modules_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    prefix = package if package == "dashboard" else f"oki_trace.{package}"
    own = {name for name in NAMES if name == prefix or name.startswith(f"{prefix}.")}
    # ``from a import b`` of a module b needs b, and not what else is in a.
    graph = {}
    for name in own:
        found = imports(NAMES[name]) & own - {name}
        graph[name] = {f for f in found if not any(o.startswith(f"{f}.") for o in found)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_a_package_keeps_to_its_libraries(package: str, path: Path) -> None:
    used = libraries(path)
    assert not used & FORBIDDEN.get(package, set())
    if package != "analysis":
        assert "duckdb" not in used


@pytest.mark.parametrize(("package", "path"), [p for p in MODULES if p.values[0] in BASE])
def test_base_modules_import_only_each_other(package: str, path: Path) -> None:
    assert packages(path) <= BASE
    assert libraries(path) - {"oki_trace"} <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_module_is_small_and_well_named(package: str, path: Path) -> None:
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
