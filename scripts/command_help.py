"""Writes ``docs/commands.md`` from the help of the commands. Run it after a change."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer import Typer
from typer.models import OptionInfo

from oki_trace.cli.app import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
EXAMPLE = "Example: "

_HEAD = """\
# Commands

The output of `oki-trace COMMAND --help` on one page. Written by `python scripts/command_help.py`.

Every command takes `--debug`, which shows tracebacks. Exit status: 0 success, 1 failure \
(one line on standard error names the fix), 2 wrong usage, 130 ended by Ctrl-C. Output to a pipe \
has no colours and no progress bars. `oki-trace --install-completion` sets up completion for \
bash, zsh, fish and PowerShell.
"""


def commands() -> dict[str, Callable[..., None]]:
    """Every command's function by name, in the order of ``oki-trace --help``."""
    made = _own(app)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        name = group.typer_instance.info.name
        made |= {f"{name} {own}": call for own, call in _own(group.typer_instance).items()}
    return made


def _own(group: Typer) -> dict[str, Callable[..., None]]:
    """The commands of the program, or of a group, without those of groups in it."""
    return {
        info.name or str(getattr(info.callback, "__name__", "")).replace("_", "-"): info.callback
        for info in group.registered_commands
        if info.callback is not None
    }


def paragraphs(command: Callable[..., None]) -> list[str]:
    """The help text, one line per paragraph."""
    text = inspect.getdoc(command) or ""
    return [" ".join(part.split()) for part in text.split("\n\n")]


def examples(command: Callable[..., None]) -> list[str]:
    """The command lines in its help."""
    return [p.removeprefix(EXAMPLE) for p in paragraphs(command) if p.startswith(EXAMPLE)]


def page() -> str:
    """The whole page."""
    every = commands()
    index = "\n".join(
        f"| [`{name}`](#oki-trace-{name.replace(' ', '-')}) | {_escaped(paragraphs(command)[0])} |"
        for name, command in every.items()
    )
    parts = [_HEAD, f"| command | |\n| --- | --- |\n{index}\n"]
    parts += [_section(name, command) for name, command in every.items()]
    return "\n".join(parts)


def _section(name: str, command: Callable[..., None]) -> str:
    body = [_escaped(p) for p in paragraphs(command) if not p.startswith(EXAMPLE)]
    shown = "\n".join(examples(command))
    rows = "\n".join(_rows(command))
    return (
        f"## oki-trace {name}\n\n"
        + "\n\n".join(body)
        + f"\n\n```sh\n{shown}\n```\n\n| | | |\n| --- | --- | --- |\n{rows}\n"
    )


def _rows(command: Callable[..., None]) -> Iterator[str]:
    """One row per argument and option: its names, the kind of value, its help."""
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, declared = get_args(parameter.annotation)
        if isinstance(declared, OptionInfo):
            # In an annotation, ``default`` holds the first name, if there is any.
            first = declared.default
            if first is ...:
                first = f"--{parameter.name.replace('_', '-')}"
            names = ", ".join(f"`{name}`" for name in (first, *(declared.param_decls or ())))
        else:
            name = (declared.metavar or parameter.name.strip("_")).strip("[]{}").upper()
            names = f"`{name}{'...' if 'list[' in str(kind) else ''}`"
        meaning = _escaped(" ".join((declared.help or "").split()))
        yield f"| {names} | {_takes(kind, declared)} | {meaning}{_default(parameter, declared)} |"


def _takes(kind: Any, declared: Any) -> str:
    """The kind of value; nothing for a switch."""
    if get_origin(kind) is not Literal:
        (kind, *_) = [one for one in get_args(kind) if one is not type(None)] or [kind]
    if kind is bool:
        return ""
    if declared.metavar and isinstance(declared, OptionInfo):
        return str(declared.metavar).lower().replace("_or_", " or ").replace("url", "URL")
    if isinstance(kind, type) and issubclass(kind, Enum):
        kind = Literal[tuple(choice.value for choice in kind)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return {int: "number", float: "number", Path: "path"}.get(kind, "text")


def _default(parameter: inspect.Parameter, declared: Any) -> str:
    if parameter.default is inspect.Parameter.empty:
        return " Required." if isinstance(declared, OptionInfo) else ""
    shown = declared.show_default
    if isinstance(shown, str):
        return f" Default: {f'`{shown}`' if shown.startswith('$') else shown}."
    if parameter.default is None or isinstance(parameter.default, bool):
        return ""
    return f" Default: `{parameter.default}`."


def _escaped(text: str) -> str:
    """Safe in a table's cell, and no markup by accident."""
    return re.sub(r"([|<])", r"\\\1", text)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
