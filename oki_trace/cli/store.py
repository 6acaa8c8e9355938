"""``migrate``, ``info`` and ``verify``: create, describe and check a store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oki_trace.cli import options
from oki_trace.cli.output import cell, console, print_json, print_text, progress_bar, table
from oki_trace.cli.watchdog import watchdog
from oki_trace.reporting import counted, size

if TYPE_CHECKING:
    from oki_trace.recompute import Recomputed
    from oki_trace.store.reading.reader import TraceReader


def migrate(db: options.Db = None, json: options.Json = False) -> None:
    """Create the store, or back it up and upgrade it to this version's schema.

    Example: oki-trace migrate --db data/oki_trace.db
    """
    from oki_trace.store.schema import migrate as schema

    store = options.store_of(db)
    before = schema.current(store)
    schema.ensure(store)
    after = schema.current(store)
    name = options.shown(store)
    if json:
        print_json({"store": name, "before": before, "schema": after})
        return
    result = "is up to date" if before == after else "created" if before is None else "upgraded"
    print_text(f"{name} {result} (schema {after}).")


def info(db: options.Db = None, json: options.Json = False) -> None:
    """Show the location, the contents and the size of the store.

    Example: oki-trace info --json
    """
    from oki_trace import __version__
    from oki_trace.settings import Settings
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        store = reader.info()
    if json:
        per_token = {
            name: getattr(store, name)
            for name in ("bytes_per_token", "row_bytes_per_token", "tensor_bytes_per_token")
        }
        print_json({**asdict(store), **per_token, "version": __version__})
        return
    with_tensors = f"{store.tensor_steps:,} of {store.steps:,} steps have them"
    rows = table("", "", header=False)
    for name, value in (
        ("store", store.url),
        ("schema", store.schema),
        ("size on disk", size(store.bytes)),
        ("  full tensors", size(store.tensor_bytes)),
        ("  rows", size(store.row_bytes)),
        ("  write-ahead log", size(store.log_bytes)),
        ("  free space", size(store.free_bytes)),
        ("rows per token", size(store.row_bytes_per_token)),
        ("tensors per token", f"{size(store.tensor_bytes_per_token)} ({with_tensors})"),
        ("conversations", f"{store.conversations:,}"),
        ("messages", f"{store.messages:,}"),
        ("steps", f"{store.steps:,}"),
        ("default model", Settings.from_environment().model_id),
        ("oki-trace", __version__),
    ):
        rows.add_row(cell(name, "dim"), cell(value))
    console().print(rows)


def verify(
    conversation: Annotated[
        int | None,
        typer.Argument(
            help="A conversation's number, from oki-trace list.", show_default="the whole store"
        ),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Also run each model again on the stored tokens.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Check all checksums, and whether the stored numbers agree with each other.

    Prints one line per problem; the exit status is 1 if there is any. The store is not changed.

    A model that cannot be loaded is reported but does not count as a problem.

    Example: oki-trace verify 1 --recompute

    Example: oki-trace verify
    """
    from oki_trace.store.maintenance.verify import Verification
    from oki_trace.store.reading.reader import TraceReader

    findings: list[dict[str, Any]] = []
    with TraceReader(options.store_of(db)) as reader:
        with progress_bar("verifying") as progress:
            check = Verification(reader, conversation, progress)
            for finding in check:
                findings.append(asdict(finding))
                if not json:
                    print_text(str(finding))
        recomputed = _recompute(reader, conversation, json) if recompute else []
    checked = {"messages": check.messages, "steps": check.steps, "tensors": check.tensors}
    faults = len(findings) + sum(not one.agrees for one in recomputed)
    if json:
        more = {"recomputed": [asdict(one) for one in recomputed]} if recompute else {}
        checked["without_digest"] = check.without_digest
        print_json({"findings": findings, "checked": checked, **more})
    else:
        counts = ", ".join(counted(number, name[:-1]) for name, number in checked.items())
        verdict = f"{counted(faults, 'problem')} found." if faults else "No problems found."
        print_text(f"Checked {counts}. {verdict}")
        if check.without_digest:
            print_text(
                f"{counted(check.without_digest, 'message')} recorded before there were digests: "
                "their text and settings cannot be checked."
            )
    if faults:
        raise typer.Exit(1)


def _recompute(reader: TraceReader, conversation: int | None, quiet: bool) -> list[Recomputed]:
    from oki_trace.recompute import recompute

    done = []
    with watchdog(), progress_bar("recomputing") as progress:
        for one in recompute(reader, conversation, progress):
            done.append(one)
            if not quiet:
                print_text(_line(one))
    return done


def _line(one: Recomputed) -> str:
    message = f"conversation {one.conversation_id}, message {one.message_id}"
    if one.reason is not None:
        return f"{message}: not recomputed with {one.model_id}: {one.reason}"
    parts = [
        f"largest |Δlogprob| {one.logprob_difference:.1e}",
        f"|Δentropy| {one.entropy_difference:.1e}",
        f"lens |Δprob| {one.lens_difference:.1e}",
        counted(one.top1_differences or 0, "different top token"),
    ]
    if one.not_numbers:
        parts.append(f"{counted(one.not_numbers, 'value')} not a number")
    if not one.numbers_agree:
        parts.append("more than rounding explains")
    if one.text_differences:
        parts.append(f"{counted(one.text_differences, 'text')} different from its token ids")
    steps = counted(one.steps, "token")
    return f"{message}: {steps} recomputed with {one.model_id}: {', '.join(parts)}"
