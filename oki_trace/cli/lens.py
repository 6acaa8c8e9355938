"""``lens``: installs published lenses, lists and removes them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options
from oki_trace.cli.output import (
    cell,
    console,
    print_error,
    print_json,
    print_text,
    progress_bar,
    table,
)
from oki_trace.cli.session import reply_stream
from oki_trace.errors import UsageError
from oki_trace.reporting import counted, size

if TYPE_CHECKING:
    from oki_trace.apply_lens import Applied
    from oki_trace.llm.lenses.library import InstalledLens

lens = typer.Typer(
    name="lens",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Install published lenses and apply them to stored hidden states.",
)

Name = Annotated[str, typer.Argument(help="The lens's name, from oki-trace lens list.")]


@lens.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_FOLDER_OR_HUB_ID",
            help="A Jacobian lens's .pt file, a Tuned Lens's folder, or a hub owner/name/path.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(show_default="the file's", help="The lens's name.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Install a lens. The file may contain only tensors; no code in it is executed.

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
    """Remove an installed lens. Its stored results are kept.

    Example: oki-trace lens remove jacobian
    """
    from oki_trace.llm.lenses import library

    library.remove(name)
    print_text(f"Removed {name}.")


@lens.command("apply")
def apply_(
    name: Name,
    conversation: Annotated[
        int | None, typer.Option(help="Apply the lens to this conversation.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Apply the lens to all conversations.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Apply a lens to stored hidden states, without running the model.

    Only the model's embeddings, final norm, head and one block are loaded.

    Ctrl-C keeps what has been read; the next call goes on from there.

    Example: oki-trace lens apply jacobian --conversation 3
    """
    if (conversation is None) != all_:
        raise UsageError("Give exactly one of --conversation and --all.")
    from oki_trace.apply_lens import apply_lens
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    store = options.store_of(db)
    with (
        TraceReader(store) as reader,
        TraceWriter(store, checkpoint=False) as writer,
        reply_stream() as stream,
        progress_bar("reading") as progress,
    ):
        stop = stream.should_stop
        done = apply_lens(writer, reader, name, conversation, should_stop=stop, progress=progress)
    if json:
        print_json(asdict(done))
    else:
        _print_applied(done)
    for message, reason in done.refused.items():
        print_error(f"message {message}: {reason}")
    raise typer.Exit(stream.exit_status or (1 if done.refused else 0))


def _print_applied(done: Applied) -> None:
    if not done.steps and not done.refused:
        print_text("No step with stored hidden states is unread.")
    if done.steps:
        print_text(
            f"Read {counted(done.steps, 'step')} of {counted(done.messages, 'message')} with "
            f"{done.lens} in {done.seconds:.1f} s."
        )
        blocks = counted(done.loaded_blocks, "block")
        print_text(
            f"Loaded the model's tail and {blocks}: {size(done.loaded_bytes)} in "
            f"{done.load_seconds:.1f} s.",
            "dim",
        )
    if done.stopped:
        print_text("Stopped. The same command goes on from here.", "dim")


_KINDS = {"jacobian": "Jacobian lens", "tuned": "Tuned Lens"}


def _layers(lens: InstalledLens) -> str:
    first, last, count = lens.layers[0], lens.layers[-1], len(lens.layers)
    span = f"layers {first} to {last}" if count > 1 else f"layer {first}"
    return span if count == last - first + 1 else f"{count} of {span}"


def _object(lens: InstalledLens) -> dict[str, Any]:
    return asdict(lens)
