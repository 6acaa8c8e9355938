"""Files, modules, links and examples that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import module_map

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def tree() -> str:
    """The annotated file tree of the developer guide."""
    page = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
    return "\n" + page.partition("## Source tree")[2].split("```")[1]


def test_every_file_the_tree_names_is_there() -> None:
    """Below the folder under which it stands, as deep as it may be."""
    room = ROOT
    named = 0
    for line in tree().strip().splitlines():
        first = line.split()[0]
        if first.endswith("/") and not line.startswith("    "):
            room = ROOT / first if line == line.lstrip() else ROOT / "oki_trace" / first
            assert room.is_dir(), line
        elif line.startswith("  ") and not line.startswith("    "):
            room = ROOT / "oki_trace"
        for name in re.findall(r"\w+\.py\b|(?<=[ ,])\w+/(?=[:;, ]|$)", line):
            here = room.name == name.rstrip("/")
            assert here or any(room.rglob(name.rstrip("/"))), f"{name} in: {line}"
            named += 1
    assert named > 50


def test_the_tree_names_every_room_and_every_module_at_the_top() -> None:
    text = tree()
    top = [p for p in (ROOT / "oki_trace").iterdir() if not p.name.startswith("_")]
    names = {p.name + "/" if p.is_dir() else p.name for p in top if p.suffix in ("", ".py")}
    assert [name for name in sorted(names) if name not in text] == []
    for folder in ("dashboard/", "migrations/", "tests/", "docs/", "scripts/", "data/"):
        assert f"\n{folder}" in text


def test_the_map_of_modules_is_what_their_docstrings_say() -> None:
    page = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
    written = page.partition(module_map.BEGIN)[2].partition(module_map.END)[0]
    assert written.strip() == module_map.module_map().strip(), "run: python scripts/module_map.py"
    modules = [path for folder in module_map.folders() for path in module_map.modules(folder)]
    assert [p for p in modules if p.stem != "__init__" and not module_map.summary(p)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_within_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            lines = other.read_text(encoding="utf-8").splitlines()
            heads = [re.sub(r"[^\w\- ]", "", h.lstrip("# ")).lower() for h in lines if h[:1] == "#"]
            assert anchor in [head.replace(" ", "-") for head in heads], target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_in_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:oki_trace|dashboard|migrations|scripts|tests)/[\w/]+\.py)\b", text)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)[)#]", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set((ROOT / "docs").glob("*.md")) | {ROOT / "SECURITY.md"} <= seen


def test_every_command_the_readme_shows_is_one() -> None:
    from oki_trace.cli.app import app

    names = {
        info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands
    }
    shown = set(re.findall(r"(?m)^(?:\$ )?oki-trace (\w+)", README))
    assert len(shown) >= 7 and shown <= names
