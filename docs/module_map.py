"""Writes the map of all modules into ``docs/developing.md``, from their docstrings: run it after
adding, moving or removing one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("developing.md")
BEGIN, END = "<!-- modules -->\n", "<!-- end of modules -->\n"
ROOMS = ("oki_trace", "dashboard", "migrations", "docs")


def folders() -> Iterator[Path]:
    """Every folder that holds modules, in order."""
    for room in ROOMS:
        inside = (path for path in (ROOT / room).rglob("*") if path.is_dir())
        yield from sorted(f for f in (ROOT / room, *inside) if any(f.glob("*.py")))


def modules(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem))


def told(path: Path) -> str:
    """The first sentence of a module's docstring; empty where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


def module_map() -> str:
    """Each folder with its modules, as Markdown."""
    return "\n".join(_folder(folder) for folder in folders())


def _folder(folder: Path) -> str:
    name = folder.relative_to(ROOT).as_posix()
    rows = [f"| `{path.name}` | {told(path)} |" for path in modules(folder) if told(path)]
    return f"**`{name}/`**\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{module_map()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
