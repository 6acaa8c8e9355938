"""``verify``: the store's promises, proved on the store at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import bar, console, inert, print_json
from oki_trace.cli.watchdog import watchdog
from oki_trace.reporting import counted

if TYPE_CHECKING:
    from oki_trace.recompute import Recomputed
    from oki_trace.store.reading.reader import TraceReader


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(verify)


def verify(
    conversation: Annotated[
        int | None,
        typer.Argument(help="Its number, as in: oki-trace list", show_default="the whole store"),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Also run each model again on the stored tokens.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Check every tensor's checksum and that all that is kept of a step agrees.

    One line for each thing found, and exit status 1 when there is any. Nothing
    is changed. A model that is not there any more is told, and is no fault.

    Example: oki-trace verify 1 --recompute

    Example: oki-trace verify
    """
    from oki_trace.store.maintenance.verify import Verification
    from oki_trace.store.reading.reader import TraceReader

    out = console()
    found: list[dict[str, Any]] = []
    with TraceReader(options.store_of(db)) as reader:
        with bar("verifying") as progress:
            check = Verification(reader, conversation, progress)
            faults = 0
            for finding in check:
                faults += 1
                if json:
                    found.append(asdict(finding))
                else:
                    out.print(Text(inert(str(finding), keep="")), soft_wrap=True)
        again = _recompute(reader, conversation, json) if recompute else []
    looked = {"messages": check.messages, "steps": check.steps, "tensors": check.tensors}
    wrong = faults + sum(not one.agrees for one in again)
    if json:
        more = {"recomputed": [asdict(one) for one in again]} if recompute else {}
        all_checked = {**looked, "without_digest": check.without_digest}
        print_json({"findings": found, "checked": all_checked, **more})
    else:
        checked = ", ".join(counted(number, name[:-1]) for name, number in looked.items())
        verdict = f"{counted(wrong, 'fault')} found." if wrong else "No problems found."
        out.print(f"Checked {checked}. {verdict}")
        if check.without_digest:
            out.print(
                f"{counted(check.without_digest, 'message')} recorded before there were digests: "
                "what of these is kept once cannot be checked."
            )
    if wrong:
        raise typer.Exit(1)


def _recompute(reader: TraceReader, conversation: int | None, quiet: bool) -> list[Recomputed]:
    from oki_trace.recompute import recompute

    out = console()
    done = []
    with watchdog(), bar("recomputing") as progress:
        for one in recompute(reader, conversation, progress):
            done.append(one)
            if not quiet:
                out.print(Text(inert(_line(one), keep="")), soft_wrap=True)
    return done


def _line(one: Recomputed) -> str:
    where = f"conversation {one.conversation_id}, message {one.message_id}"
    if one.reason is not None:
        return f"{where}: not recomputed with {one.model_id}: {one.reason}"
    verdict = "" if one.agrees else ", more than rounding explains"
    if one.text_differences:
        verdict = f", {counted(one.text_differences, 'text')} other than the tokens'"
    if one.not_numbers:
        verdict = f", {counted(one.not_numbers, 'value')} not a number{verdict}"
    return (
        f"{where}: {counted(one.steps, 'token')} recomputed with {one.model_id}: largest "
        f"|Δlogprob| {one.logprob_difference:.1e}, "
        f"|Δentropy| {one.entropy_difference:.1e}, lens |Δprob| {one.lens_difference:.1e}, "
        f"{counted(one.top1_differences or 0, 'other top token')}{verdict}"
    )
