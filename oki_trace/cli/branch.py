"""``branch``: continue a stored reply from any of its steps, with another token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import console, print_json, print_text, token
from oki_trace.cli.session import Session, Turn, open_session, print_summary, summary
from oki_trace.errors import UsageError
from oki_trace.queueing import fork_candidates, require_fork
from oki_trace.records import Forced, Message, Sampling

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

MOST_BRANCHES = 20


@dataclass(frozen=True)
class _Start:
    """The first token of a branch, and the probability that the model gave it."""

    forced: Forced | None
    token: str = ""
    prob: float | None = None


def branch(
    message: Annotated[int, typer.Argument(help="The reply, by the number of its message.")],
    step: Annotated[int, typer.Argument(min=0, help="The step at which the branch departs.")] = 0,
    text: Annotated[
        str | None,
        typer.Option(
            "--token", metavar="TEXT", help="The text to continue with; it may be several tokens."
        ),
    ] = None,
    token_id: Annotated[
        int | None, typer.Option(min=0, help="The token to continue with, by its id.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Continue with the candidate of this rank; 1 is the most likely."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_BRANCHES, help="Create a branch for each of the N best candidates."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="Maximum number of new tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 decodes greedily.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling: the total probability to keep.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Values above 1 discourage repetition.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    model: options.Model = None,
    four_bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    tensors: options.Tensors = "half",
    trace_prompt: options.TracePrompt = "none",
    no_fast: options.NoFast = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Continue a stored reply from one of its steps, in a branch beside it.

    The branch keeps the tokens before STEP and continues with the token that you choose, or,
    without one, lets the model choose again at that step: step 0 regenerates the reply. The
    model and the sampling settings that you do not give are those of the reply; full tensors
    and the trace of the prompt have the defaults below.

    Example: oki-trace branch 2 5 --rank 2

    Example: oki-trace branch 2 5 --token " Lyon" --max-new-tokens 40

    Example: oki-trace branch 2 --temperature 0.8 --seed 7

    Example: oki-trace branch 2 5 --top 5 --max-new-tokens 20
    """
    from oki_trace.store.reading.reader import TraceReader

    if sum(value is not None for value in (text, token_id, rank, top)) > 1:
        raise UsageError("Give one of --token, --token-id, --rank and --top.")
    store = options.store_of(db)
    with TraceReader(store) as reader:
        origin = reader.message(message)
        require_fork(origin, step)
        starts = _starts(reader, origin, step, text, token_id, rank, top)
    changed = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
    sampling = replace(origin.sampling or Sampling(), **given)
    loading: Any = {"four_bit": four_bit, "dtype": dtype, "device": device, "no_fast": no_fast}
    turns = options.Turns(
        model=model, tensors=tensors, trace_prompt=trace_prompt, db=store, **loading
    )
    with open_session(turns, origin) as session:
        if text is not None and not json:
            _show_tokens(session, text)
        done = _run_all(session, origin, step, sampling, starts, quiet=json)
        if json:
            branches = [summary(turn) for turn in done]
            print_json(branches if top is not None else branches[0], indent=None)
    raise typer.Exit(done[-1].exit_status)


def _run_all(
    session: Session,
    origin: Message,
    step: int,
    sampling: Sampling,
    starts: Sequence[_Start],
    *,
    quiet: bool,
) -> list[Turn]:
    """The branches one after another, up to the first that is ended by a signal."""
    done: list[Turn] = []
    for number, start in enumerate(starts, start=1):
        if len(starts) > 1 and not quiet:
            line = token(start.token)
            line.append(f"  {start.prob:.1%}" if start.prob is not None else "", style="dim")
            print_text()
            console().print(f"{number}. ", line, sep="", end="\n")
        turn = session.branch(origin, step, sampling, start.forced, quiet=quiet)
        done.append(turn)
        if not quiet:
            print_summary(turn, session.reader)
        if turn.exit_status:
            break
    return done


def _starts(
    reader: TraceReader,
    origin: Message,
    step: int,
    text: str | None,
    token_id: int | None,
    rank: int | None,
    top: int | None,
) -> list[_Start]:
    if text is not None:
        if not text:
            raise UsageError("The text is empty. Give the text to go on with.")
        return [_Start(Forced(text=text))]
    if token_id is not None:
        return [_Start(Forced((token_id,)))]
    if rank is None and top is None:
        return [_Start(None)]
    ranks = range(1, (top or 0) + 1) if rank is None else range(rank, rank + 1)
    candidates = fork_candidates(reader, origin, step, ranks)
    return [_Start(Forced((one.token_id,)), one.token, one.prob) for one in candidates]


def _show_tokens(session: Session, text: str) -> None:
    """The tokens of a typed text, before they are used."""
    from oki_trace.llm.capture.vocabulary import Vocabulary
    from oki_trace.llm.chat.typed_text import typed_ids

    tokenizer = session.loaded.tokenizer
    texts = map(Vocabulary(tokenizer).text, typed_ids(tokenizer, text))
    console().print("Goes on with: ", Text("  ").join(map(token, texts)), sep="")
