"""No text that a model or a user wrote reaches Markdown unescaped, read from the source.

Whatever Streamlit reads as Markdown has to be made of words of ours, of numbers,
and of what went through ``wording.escape`` or ``wording.sentence``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VIEWS = sorted(
    path for path in (ROOT / "dashboard").rglob("*.py") if "streamlit" in path.read_text("utf-8")
)

# What reads its first argument as Markdown: bodies, and the labels of widgets.
BODIES = {"caption", "markdown", "write", "title", "header", "subheader", "toast", "spinner"}
BODIES |= {"error", "warning", "info", "success", "badge", "metric", "status"}
LABELS = {"button", "download_button", "popover", "expander", "checkbox", "toggle", "radio"}
LABELS |= {"selectbox", "multiselect", "segmented_control", "pills", "slider", "number_input"}
LABELS |= {"text_input", "text_area", "date_input", "file_uploader", "tabs", "link_button"}
# Beside the first argument.
NAMED = {"help", "label", "body", "text"}
# Streamlit's own and ours that take such words.
HELPED = {"NumberColumn", "TextColumn", "DatetimeColumn", "chat_input"}
LABELS |= {"section_row", "choice", "pick", "export_button", "_choice"}
OURS = {"empty_state", "wait_for_click"}

# What gives text that is safe there: escaped, or a number in words of ours.
SAFE_CALLS = {"escape", "sentence", "counted", "size", "format_number"}
SAFE_CALLS |= {"format_difference", "_time", "len", "told"}
# Of these modules each sentence is made of words of ours and of numbers.
SAFE_CALLS |= {"in_words", "verdict", "why_no_tensors", "evidence_notes", "_cut"}
# Words of ours that are looked up: names and meanings that stand in our own sources.
OUR_WORDS = {
    # Our tables, their columns and our functions.
    "sql.py": {"table.name", "table.meaning", "function.name", "function.returns"}
    | {"function.meaning[:1].upper()", "function.meaning[1:]"}
    | {"sql_table.columns_as_markdown(table)"},
    # Our questions, their groups, options and columns.
    "questions.py": {"group", "question.group", "question.title", "question.meaning"}
    | {"question.reading", "column.description[:1].upper()", "column.description[1:]", "note"},
    "question_controls.py": {"meaning[:1].upper()", "meaning[1:]", "option.label", "label"}
    | {"option.meaning[:1].upper()", "option.meaning[1:]"},
    "store.py": {"name"},
    "sidebar.py": {"field"},
    # Its callers are looked at.
    "layout.py": {"nothing", "then", "title", "label", "name", "noun", "note"},
}
# Number formats: what they do not fit raises an error.
NUMBERS = tuple("dfge%n,")


class Module:
    """A source, and what each name in it may stand for."""

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        self.tree = ast.parse(source)
        self.parents = {
            child: parent
            for parent in ast.walk(self.tree)
            for child in ast.iter_child_nodes(parent)
        }

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def scope(self, node: ast.AST) -> Iterator[ast.AST]:
        """The function around ``node``, those around it, and the module."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Module):
                yield node

    def values(self, name: ast.Name) -> list[ast.expr]:
        """All that ``name`` may be where it stands; empty when that is not to be seen."""
        for scope in self.scope(name):
            found = list(_given_to(name.id, scope))
            if found or _is_parameter(name.id, scope):
                return found
        return []


def _is_parameter(name: str, scope: ast.AST) -> bool:
    if not isinstance(scope, ast.FunctionDef | ast.Lambda):
        return False
    return name in {one.arg for one in (*scope.args.args, *scope.args.kwonlyargs)}


def _given_to(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from _part(name, target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            rows = node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else [node.iter]
            for row in rows:
                yield from _part(name, node.target, row)
        elif isinstance(node, ast.NamedExpr) and node.target.id == name:
            yield node.value


def _part(name: str, target: ast.expr, value: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Name):
        if target.id == name:
            yield value
    elif isinstance(target, ast.Tuple | ast.List):
        apart = value.elts if isinstance(value, ast.Tuple | ast.List) else None
        for at, one in enumerate(target.elts):
            if apart is not None:
                yield from _part(name, one, apart[at])
            elif any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(one)):
                yield value


def is_safe(node: ast.expr, module: Module, seen: frozenset[str] = frozenset()) -> bool:
    """Whether nothing that was written by others can be in what ``node`` comes to."""

    def safe(one: ast.expr) -> bool:
        return is_safe(one, module, seen)

    if ast.unparse(node) in OUR_WORDS.get(module.name, ()):
        return True
    match node:
        case ast.Constant():
            return True
        case ast.JoinedStr():
            return all(safe(one) for one in node.values)
        case ast.FormattedValue(value=value, format_spec=ast.JoinedStr(values=[ast.Constant(v)])):
            return str(v).endswith(NUMBERS) or safe(value)
        case ast.FormattedValue(value=value):
            return safe(value)
        case ast.IfExp():
            return safe(node.body) and safe(node.orelse)
        case ast.BoolOp():
            return all(safe(one) for one in node.values)
        case ast.BinOp():
            return safe(node.left) and safe(node.right)
        case ast.Tuple() | ast.List():
            return all(safe(one) for one in node.elts)
        case ast.Dict():
            return all(safe(one) for one in node.values)
        case ast.GeneratorExp() | ast.ListComp():
            return safe(node.elt)
        case ast.Call(func=ast.Attribute(attr="join"), args=[of]):
            return safe(of)
        case ast.Call(func=ast.Attribute(attr="get", value=ast.Name() as known), args=[_, other]):
            return safe(known) and safe(other)
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return name in SAFE_CALLS
        case ast.Subscript(value=ast.Name() as name):
            return safe(name)
        case ast.Name(id=name):
            if name in seen:
                return True
            values = module.values(node)
            more = seen | {name}
            return bool(values) and all(is_safe(one, module, more) for one in values)
    return False


def read_as_markdown(call: ast.Call) -> Iterator[ast.expr]:
    """The arguments of ``call`` that Streamlit reads as Markdown."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if name in BODIES | LABELS:
        yield from call.args[:1]
    if name in OURS:
        yield from call.args
    if name == "progress":
        yield from call.args[1:2]
    if name in BODIES | LABELS | HELPED | OURS | {"progress", "box"}:
        if name == "box":
            yield from call.args[:1]
        yield from (one.value for one in call.keywords if one.arg in NAMED)


def unsafe(module: Module) -> list[str]:
    return [
        f"{module.name}:{call.lineno}: {ast.unparse(argument)}"
        for call in module.calls()
        for argument in read_as_markdown(call)
        if not is_safe(argument, module)
    ]


@pytest.mark.parametrize("path", VIEWS, ids=lambda path: path.name)
def test_no_text_of_others_is_read_as_markdown(path: Path) -> None:
    assert unsafe(Module(path.read_text("utf-8"), path.name)) == []


HOSTILE = """
def page(message, titles):
    title = message.title
    st.caption(title)
    st.markdown(f"**{message.model_id}**")
    st.button(titles[0], help=message.text)
    for name in titles:
        st.write("by " + name)
    bar.progress(0.5, message.detail)
    known = wording.escape(title)
    known = title
    st.badge(known)
"""
FINE = """
def page(message, titles):
    label = wording.escape(message.title) or "Untitled"
    st.button(f"**{label}**" if message else label, help=f"{message.tokens:,} tokens")
    st.caption(" ".join(wording.escape(title) for title in titles))
    for name, key in (("One", "a"), ("Two", message.key)):
        st.caption(name)
    st.text(message.title)
"""


def test_the_rule_sees_what_it_forbids() -> None:
    assert len(unsafe(Module(HOSTILE, "page.py"))) == 7
    assert unsafe(Module(FINE, "page.py")) == []
