"""``lens``: installs published lenses, lists and removes them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options
from oki_trace.cli.output import cell, console, print_json, print_text, table
from oki_trace.reporting import size

if TYPE_CHECKING:
    from oki_trace.llm.lenses.library import InstalledLens

lens = typer.Typer(
    name="lens",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Install lenses that others publish, and read stored hidden states with them.",
)

Name = Annotated[str, typer.Argument(help="The lens's name, from oki-trace lens list.")]


@lens.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_FOLDER_OR_HUB_ID",
            help="A Jacobian lens's .pt file, a Tuned Lens's folder, or owner/name/path of the hub.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(show_default="the file's", help="What to call it.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Install a lens. Its file may only hold tensors; nothing in it is run.

    Example: oki-trace lens add SmolLM2_jacobian_lens.pt --name jacobian
    """
    from oki_trace.llm.lenses import library

    made = library.add(source, name)
    if json:
        print_json(_object(made))
        return
    print_text(
        f"Installed {made.name}: a {_KINDS[made.kind]} for {made.fitted.description}, "
        f"{_layers(made)}. Read with it: oki-trace run --lens {made.name} …"
    )


@lens.command("list")
def list_(json: options.Json = False) -> None:
    """List the installed lenses and what each was fitted on.

    Example: oki-trace lens list --json
    """
    from oki_trace.llm.lenses import library

    lenses = library.all_installed()
    if json:
        print_json([_object(one) for one in lenses])
        return
    if not lenses:
        print_text("No lens is installed. Install one with oki-trace lens add.")
        return
    rows = table("name", "kind", "fitted on", "layers", "size", right=("size",))
    for one in lenses:
        rows.add_row(
            cell(one.name),
            cell(_KINDS[one.kind]),
            cell(one.fitted.description),
            cell(_layers(one)),
            cell(size(one.bytes)),
        )
    console().print(rows)


@lens.command()
def remove(name: Name) -> None:
    """Remove an installed lens. What it has read stays in the stores.

    Example: oki-trace lens remove jacobian
    """
    from oki_trace.llm.lenses import library

    library.remove(name)
    print_text(f"Removed {name}.")


_KINDS = {"jacobian": "Jacobian lens", "tuned": "Tuned Lens"}


def _layers(lens: InstalledLens) -> str:
    first, last, count = lens.layers[0], lens.layers[-1], len(lens.layers)
    span = f"layers {first} to {last}" if count > 1 else f"layer {first}"
    return span if count == last - first + 1 else f"{count} of {span}"


def _object(lens: InstalledLens) -> dict[str, Any]:
    return asdict(lens)
