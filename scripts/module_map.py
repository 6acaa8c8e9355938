"""Writes the module map in ``docs/developing.md`` from the modules' docstrings.

Run it after adding, moving or removing a module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "developing.md"
BEGIN, END = "<!-- modules -->\n", "<!-- end of modules -->\n"
TOP_LEVEL = ("oki_trace", "dashboard", "migrations", "scripts")


def folders() -> Iterator[Path]:
    """Every folder that holds modules, in the order of the map."""
    for name in TOP_LEVEL:
        inside = (path for path in (ROOT / name).rglob("*") if path.is_dir())
        yield from sorted(f for f in (ROOT / name, *inside) if any(f.glob("*.py")))


def modules(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring; empty where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


def module_map() -> str:
    """Each folder with its modules, as Markdown."""
    return "\n".join(_folder(folder) for folder in folders())


def _folder(folder: Path) -> str:
    name = folder.relative_to(ROOT).as_posix()
    rows = [f"| `{path.name}` | {summary(path)} |" for path in modules(folder) if summary(path)]
    return f"**`{name}/`**\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{module_map()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
