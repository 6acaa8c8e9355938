"""``rename``, ``delete``, ``prune`` and ``vacuum``: change a store."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options, quantities
from oki_trace.cli.output import cell, console, print_json, print_text, progress_bar, table
from oki_trace.errors import UsageError
from oki_trace.reporting import counted, size

if TYPE_CHECKING:
    from oki_trace.store.maintenance.prune import PrunePlan

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]

LISTED = 20


def rename(
    conversation: options.Number,
    title: Annotated[str, typer.Argument(help="The new title.")],
    db: options.Db = None,
) -> None:
    """Change the title of a conversation.

    Example: oki-trace rename 1 "The capital of France"
    """
    from oki_trace.store.writing.writer import TraceWriter

    if not title.strip():
        raise UsageError("The title is empty. Give the conversation a name.")
    with TraceWriter(_existing(db), checkpoint=False) as writer:
        writer.rename_conversation(conversation, title.strip())


def delete(
    conversations: Annotated[
        list[int] | None, typer.Argument(help="Conversation numbers, from oki-trace list.")
    ] = None,
    message: Annotated[
        int | None,
        typer.Option(help="Delete this message and those after it; other branches stay."),
    ] = None,
    yes: Yes = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Delete conversations with all their messages, steps and tensors. This cannot be undone.

    Their numbers are not reused. To reclaim the disk space, run: oki-trace vacuum

    Example: oki-trace delete 3 --yes

    Example: oki-trace delete 4 5 6

    Example: oki-trace delete --message 12
    """
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    numbers = list(dict.fromkeys(conversations or ()))
    if bool(numbers) == (message is not None):
        raise UsageError("Give the numbers of conversations, or one --message.")
    if message is not None:
        _delete_branch(message, options.store_of(db), yes=yes, as_json=json)
        return
    store = _existing(db)
    with TraceReader(store) as reader:
        found = [reader.conversation(number) for number in numbers]
    if not yes:
        for c in found:
            print_text(f"{c.id}  {c.title}  ({c.tokens:,} tokens)")
        _confirm(f"Delete {counted(len(found), 'conversation')} permanently?")
    with TraceWriter(store, checkpoint=False, making_room=True) as writer:
        for number in numbers:
            writer.delete_conversation(number)
    if json:
        print_json({"deleted": numbers})
    else:
        print_text(f"Deleted {counted(len(numbers), 'conversation')}.")


def _delete_branch(message_id: int, store: str, *, yes: bool, as_json: bool) -> None:
    from oki_trace.message_tree import subtree
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    with TraceReader(store) as reader:
        conversation = reader.message(message_id).conversation_id
        found = subtree(reader.messages(conversation), message_id)
    if not yes:
        for message in found:
            print_text(f"{message.id}  {message.role}: {message.content[:60]}")
        _confirm(f"Delete {counted(len(found), 'message')} permanently?")
    with TraceWriter(store, checkpoint=False, making_room=True) as writer:
        count = writer.delete_branch(message_id)
    if as_json:
        print_json({"deleted_messages": [message.id for message in found]})
    else:
        print_text(f"Deleted {counted(count, 'message')}.")


def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="The minimum age, such as 12h, 30d, 8w or 1y.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Prune until the data fits this size, such as 10GB."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Delete whole conversations, not only full tensors.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be deleted.")
    ] = False,
    yes: Yes = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Delete old or excess data, the oldest first: full tensors; with --all, whole conversations.

    Without --all, the tokens, candidates, attention and lens are kept.

    A reply that is being generated is skipped. To reclaim the disk space, run: oki-trace vacuum

    Example: oki-trace prune --older-than 30d --dry-run

    Example: oki-trace prune --max-size 10GB
    """
    from oki_trace.store.maintenance import prune as pruning
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    age = None if older_than is None else quantities.age(older_than)
    max_bytes = None if max_size is None else quantities.size(max_size)
    if age is None and max_bytes is None:
        raise UsageError("Pruning needs a limit. Give --older-than, --max-size, or both.")
    store = _existing(db)
    with TraceReader(store) as reader:
        plan = pruning.plan(
            reader, older_than=age, max_bytes=max_bytes, tensors_only=not everything
        )
    if not json:
        _print_plan(plan, max_bytes)
    if not dry_run and plan.items:
        if not yes:
            _confirm(f"Delete {size(plan.frees_bytes)} permanently?")
        with (
            TraceWriter(store, checkpoint=False, making_room=True) as writer,
            progress_bar("pruning") as progress,
        ):
            plan = pruning.prune(writer, plan, progress)
    if json:
        print_json(_plan_json(plan, dry_run))
    elif not dry_run and plan.items:
        spared = f" {plan.spared} skipped: changed meanwhile." if plan.spared else ""
        print_text(
            f"Pruned {_items(plan, len(plan.items))} ({size(plan.frees_bytes)}).{spared} "
            "To reclaim the disk space, run: oki-trace vacuum"
        )


def vacuum(db: options.Db = None, json: options.Json = False) -> None:
    """Rebuild the store to reclaim the disk space of deleted data.

    The store's folder and the folder for temporary files each need space for a copy of the data.

    It is refused while a reply is being generated.

    Example: oki-trace vacuum
    """
    from oki_trace.store.maintenance.vacuum import vacuum as rebuild

    store = _existing(db)
    spinner = console().status("Rebuilding the store")
    with spinner if sys.stdout.isatty() and not json else nullcontext():
        done = rebuild(store)
    if json:
        print_json(done._asdict())
        return
    print_text(
        f"Reclaimed {size(max(0, done.before - done.after))}: {size(done.before)} before, "
        f"{size(done.after)} now."
    )


def _existing(db: str | None) -> str:
    """The store, which must exist: these commands create none. Raises StoreError."""
    from oki_trace.store.reading.reader import TraceReader

    store = options.store_of(db)
    TraceReader(store).close()
    return store


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(
            "Standard input is not a terminal, so this cannot be confirmed. Add --yes."
        )
    typer.confirm(question, abort=True)


def _print_plan(plan: PrunePlan, max_bytes: int | None) -> None:
    if not plan.items:
        print_text("Nothing to prune.")
    else:
        rows = table("conversation", "reply", "when", "title", "frees", right=("frees",))
        for item in plan.items[:LISTED]:
            rows.add_row(
                str(item.conversation_id),
                "all" if item.message_id is None else str(item.message_id),
                f"{item.when.astimezone():%Y-%m-%d %H:%M}",
                cell(item.title),
                size(item.bytes),
            )
        console().print(rows)
        if len(plan.items) > LISTED:
            print_text(f"and {len(plan.items) - LISTED:,} more")
        print_text(
            f"Pruning {_items(plan, len(plan.items))} would free {size(plan.frees_bytes)} and "
            f"leave {size(plan.left_bytes)} of data."
        )
    if plan.spared:
        print_text(f"{_items(plan, plan.spared)} skipped: being generated, or damaged.")
    if max_bytes is not None and plan.left_bytes > max_bytes and plan.tensors_only:
        print_text(
            "The data is larger than --max-size even without full tensors: --all deletes whole "
            "conversations."
        )


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


def _items(plan: PrunePlan, count: int) -> str:
    return counted(count, "reply" if plan.tensors_only else "conversation")
