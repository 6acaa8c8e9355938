"""``delete``, ``rename``, ``prune`` and ``vacuum``: what goes, and what it is called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from oki_trace.cli import options, quantities
from oki_trace.cli.output import bar, console, inert, print_json, table
from oki_trace.errors import UsageError
from oki_trace.reporting import counted, size

if TYPE_CHECKING:
    from oki_trace.store.maintenance.prune import PrunePlan

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

LISTED = 20


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(rename)
    app.command()(delete)
    app.command()(prune)
    app.command()(vacuum)


def rename(
    conversation: Annotated[int, typer.Argument(help="Its number, as in: oki-trace list")],
    title: Annotated[str, typer.Argument(help="The new title.")],
    db: options.Db = None,
) -> None:
    """Give a conversation another title.

    Example: oki-trace rename 1 "The capital of France"
    """
    from oki_trace.store.writing.writer import TraceWriter

    if not title.strip():
        raise UsageError("The title is empty. Give the conversation a name.")
    with _existing(db) as where, TraceWriter(where, checkpoint=False) as writer:
        writer.rename_conversation(conversation, title.strip())


def delete(
    conversations: Annotated[
        list[int], typer.Argument(help="Their numbers, as in: oki-trace list")
    ],
    yes: Yes = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Delete conversations with every message, step and tensor. There is no way back.

    Numbers are never given again. The disk has the room back after: oki-trace vacuum

    Example: oki-trace delete 3 --yes

    Example: oki-trace delete 4 5 6
    """
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    wanted = list(dict.fromkeys(conversations))
    with _existing(db) as where:
        with TraceReader(where) as reader:
            found = [reader.conversation(number) for number in wanted]
        if not yes:
            for c in found:
                console().print(
                    Text(f"{c.id}  {inert(c.title, keep='')}  ({c.tokens:,} tokens)"),
                    soft_wrap=True,
                )
            _ask(f"Delete {counted(len(found), 'conversation')} for good?")
        with TraceWriter(where, checkpoint=False, making_room=True) as writer:
            for number in wanted:
                writer.delete_conversation(number)
    if json:
        print_json({"deleted": wanted})
    else:
        console().print(f"Deleted {counted(len(wanted), 'conversation')}.")


def prune(
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="As in 12h, 30d, 8w, 1y.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Until the data fits, as in 10GB."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Whole conversations, not only their full tensors.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would go and what it frees.")
    ] = False,
    yes: Yes = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Throw away what is old or too much, the oldest first: full tensors, or all with --all.

    Without --all every row stays: tokens, candidates, attention and lens. A reply
    that is being written is spared. The disk has the room back after: oki-trace vacuum

    Example: oki-trace prune --older-than 30d --dry-run

    Example: oki-trace prune --max-size 10GB
    """
    from oki_trace.store.maintenance import prune as pruning
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    age = None if older_than is None else quantities.age(older_than)
    most = None if max_size is None else quantities.size(max_size)
    if age is None and most is None:
        raise UsageError("Nothing says what to prune. Give --older-than, --max-size, or both.")
    with _existing(db) as where:
        with TraceReader(where) as reader:
            plan = pruning.plan(reader, older_than=age, max_bytes=most, tensors_only=not everything)
        if not json:
            _tell(plan, most)
        if not dry_run and plan.items:
            if not yes:
                _ask(f"Free {size(plan.frees_bytes)} for good?")
            with (
                TraceWriter(where, checkpoint=False, making_room=True) as writer,
                bar("pruning") as progress,
            ):
                plan = pruning.prune(writer, plan, progress)
    if json:
        print_json(_plan_json(plan, dry_run))
    elif not dry_run and plan.items:
        spared = f" {plan.spared} being written or changed meanwhile." if plan.spared else ""
        console().print(
            f"Freed {size(plan.frees_bytes)} of {counted(len(plan.items), _what(plan))}.{spared} "
            "The disk has it back after: oki-trace vacuum"
        )


def vacuum(db: options.Db = None, json: options.Json = False) -> None:
    """Give back to the disk what was deleted, by building the store anew.

    Needs as much free disk as the data takes, in the store's folder and for
    temporary files. Refused while a reply is being generated.

    Example: oki-trace vacuum
    """
    from oki_trace.store.maintenance.vacuum import vacuum as build_anew

    with _existing(db) as where:
        if sys.stdout.isatty() and not json:
            with console().status("Building the store anew"):
                done = build_anew(where)
        else:
            done = build_anew(where)
    if json:
        print_json(done._asdict())
        return
    console().print(
        f"{size(done.before)} before, {size(done.after)} now: "
        f"{size(max(0, done.before - done.after))} given back."
    )


@contextmanager
def _existing(db: str | None) -> Iterator[str]:
    """The store, which none of these commands makes. Raises StoreError when there is none."""
    from oki_trace.store.reading.reader import TraceReader

    where = options.store_of(db)
    TraceReader(where).close()
    yield where


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("There is nobody to ask. Say --yes if this is meant.")
    typer.confirm(question, abort=True)


def _tell(plan: PrunePlan, most: int | None) -> None:
    out = console()
    if not plan.items:
        out.print("Nothing to prune.")
    else:
        rows = table("conversation", "reply", "when", "title", "frees", right=("frees",))
        for item in plan.items[:LISTED]:
            rows.add_row(
                str(item.conversation_id),
                "all" if item.message_id is None else str(item.message_id),
                f"{item.when.astimezone():%Y-%m-%d %H:%M}",
                Text(inert(item.title, keep="")),
                size(item.bytes),
            )
        out.print(rows)
        if len(plan.items) > LISTED:
            out.print(f"and {len(plan.items) - LISTED:,} more")
        out.print(
            f"{counted(len(plan.items), _what(plan))} would free {size(plan.frees_bytes)}, "
            f"{size(plan.left_bytes)} of data would stay."
        )
    if plan.spared:
        out.print(
            f"{counted(plan.spared, _what(plan))} spared: being written right now, or damaged."
        )
    if most is not None and plan.left_bytes > most and plan.tensors_only:
        out.print("The rows alone take more than that: --all deletes whole conversations.")


def _plan_json(plan: PrunePlan, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "tensors_only": plan.tensors_only,
        "frees_bytes": plan.frees_bytes,
        "left_bytes": plan.left_bytes,
        "spared": plan.spared,
        "items": [
            {
                "conversation": item.conversation_id,
                "message": item.message_id,
                "title": item.title,
                "when": item.when.isoformat(),
                "bytes": item.bytes,
            }
            for item in plan.items
        ],
    }


def _what(plan: PrunePlan) -> str:
    return "reply" if plan.tensors_only else "conversation"
