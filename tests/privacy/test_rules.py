"""What the code may never do, read from its source; SECURITY.md promises it.

That no statement is put together from text is held beside the store, in
``test_store_privacy.py``; that a model's own code and pickled weights are not
opened, by doing it, in ``test_load_refusals.py``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for room in ("oki_trace", "dashboard", "migrations")
    for path in (ROOT / room).rglob("*.py")
)
BROWSER = sorted(
    path
    for room in ("oki_trace", "dashboard")
    for pattern in ("*.js", "*.html", "*.css")
    for path in (ROOT / room).rglob(pattern)
)
# Modules that run what they read, or that speak to other machines.
# The one module that reads torch files: without their code, after checks of its own.
LENS_FILES = ROOT / "oki_trace" / "llm" / "lenses" / "files.py"
RUNS_WHAT_IT_READS = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
SPEAKS = {"requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc", "websockets"}
SPEAKS |= {"http", "urllib.request", "urllib3", "sentry_sdk", "posthog", "opentelemetry"}
STATEMENT = re.compile(r"\b(SELECT|INSERT INTO|DELETE FROM|UPDATE \w+ SET|ATTACH|COPY|PRAGMA)\b")
# Ways by which text becomes markup or code in a browser.
MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(")
MARKUP += ("new Function", "srcdoc", "javascript:", "dangerouslySetInnerHTML", "createContextual")

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
each_asset = pytest.mark.parametrize("path", BROWSER, ids=lambda p: str(p.relative_to(ROOT)))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def calls(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Each call with its dotted name, as far as it is written out."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@each_source
def test_nothing_is_run_that_was_read(path: Path) -> None:
    module = tree(path)
    names = imported(module)
    forbidden = RUNS_WHAT_IT_READS
    if path == LENS_FILES:
        forbidden = forbidden - {"pickle"}
    assert not {name.partition(".")[0] for name in names} & forbidden
    for name, call in calls(module):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), name
        assert name not in ("torch.hub.load", "yaml.load", "yaml.unsafe_load"), name
        if name == "torch.load":
            assert path == LENS_FILES and is_true(given(call, "weights_only"))
        assert not name.endswith((".read_pickle", ".to_pickle")), name
        for option in ("shell", "allow_pickle", "trust_remote_code"):
            assert not is_true(given(call, option)), f"{name}({option}=True)"
        if name in ("np.load", "numpy.load"):
            assert given(call, "allow_pickle") is None


def test_the_one_pickle_that_is_read_makes_nothing_it_names() -> None:
    """Published lenses are torch files; their pickle is walked by an unpickler of our own."""
    module = tree(LENS_FILES)
    used = {
        ast.unparse(node)
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle.")
    }
    assert used == {"pickle.Unpickler"}
    (walker,) = (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    )
    methods = {node.name for node in walker.body if isinstance(node, ast.FunctionDef)}
    assert {"find_class", "persistent_load"} <= methods
    made = [name for name, _ in calls(walker)]
    assert not {"super().find_class", "getattr", "importlib.import_module"} & set(made)


def test_weights_come_from_safetensors_or_gguf_alone() -> None:
    loading = [
        (path, call)
        for path in SOURCES
        for name, call in calls(tree(path))
        if re.fullmatch(r"AutoModel\w*\.from_pretrained", name)
    ]
    assert loading
    for path, call in loading:
        alone = is_true(given(call, "use_safetensors")) or given(call, "gguf_file") is not None
        assert alone, f"{path.relative_to(ROOT)}:{call.lineno}"


@each_source
def test_nothing_here_speaks_to_another_machine(path: Path) -> None:
    """Models and the built-in's wheel are fetched by the hub's client and by pip, when asked."""
    names = imported(tree(path))
    assert not {
        name for name in names for one in SPEAKS if name == one or name.startswith(one + ".")
    }


@each_source
def test_no_statement_is_a_formatted_text(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.JoinedStr):
            said = "".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
            assert not STATEMENT.search(said), f"line {node.lineno}: {said[:60]}"


@each_source
def test_no_text_becomes_markup_in_the_explorer(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "unsafe_allow_html" not in text and "unsafe_allow_javascript" not in text
    for name, call in calls(tree(path)):
        assert not name.endswith(("components.html", "components.v1.html", "st.iframe")), name
        if name == "st.html":
            # The one style sheet of the explorer: a file of ours, and three colours of its theme.
            sheet = ast.unparse(call.args[0])
            assert path.name == "style.py" and sheet == r"f'<style>{variables}\n{css}</style>'"


@each_asset
def test_no_text_becomes_markup_in_the_browser(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [way for way in MARKUP if way in text] == []


@each_asset
def test_no_asset_is_fetched_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # The name of SVG, which no one asks for.
    assert set(re.findall(r"(?:https?:)?//[\w-]+\.[\w./-]+", text)) <= {
        "http://www.w3.org/2000/svg"
    }
    assert "@import" not in text


def test_the_rules_see_what_they_forbid() -> None:
    """On a source that breaks each of them."""
    bad = (
        "import pickle, urllib.request\n"
        "x = f'SELECT {y} FROM step'\n"
        "torch.load(p)\n"
        "subprocess.run(c, shell=True)\n"
    )
    module = ast.parse(bad)
    assert imported(module) & RUNS_WHAT_IT_READS and imported(module) & SPEAKS
    names = dict(calls(module))
    assert "torch.load" in names and is_true(given(names["subprocess.run"], "shell"))
    said = next(node for node in ast.walk(module) if isinstance(node, ast.JoinedStr))
    assert STATEMENT.search(str(said.values[0].value))  # type: ignore[attr-defined]


def test_the_page_on_security_names_the_tests_that_hold_it() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert len(named) >= 10
    for path, test in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{path}::{test}"
