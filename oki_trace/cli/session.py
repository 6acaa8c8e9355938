"""A session of the command line: an open store and a loaded model, for one turn or many."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from oki_trace.cli import options
from oki_trace.cli.output import console, print_error, print_json, print_text
from oki_trace.cli.watchdog import Watchdog, watchdog
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import part_objects
from oki_trace.explain import explain_generation
from oki_trace.message_tree import newest_path
from oki_trace.records import Forced, Message, ModelChoice, PartKind, Sampling, Status, TurnEnd
from oki_trace.reporting import size
from oki_trace.sanitize import inert

if TYPE_CHECKING:
    from oki_trace.llm.loading.load import LoadedModel
    from oki_trace.queueing import ReplyRequest
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter


@dataclass(frozen=True)
class Turn:
    """A stored reply, how it ended, and the exit status for it.

    Without ``reply`` and ``end``, the tools in ``waiting`` have no result yet.
    """

    conversation: int
    reply: Message | None = None
    end: TurnEnd | None = None
    exit_status: int = 0
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """An open store and a loaded model: ``turn`` holds one turn of a conversation."""

    writer: TraceWriter
    reader: TraceReader
    loaded: LoadedModel
    request: ReplyRequest  # but for its messages
    system: str | None
    dog: Watchdog

    def turn(
        self,
        content: str,
        conversation: int | None,
        *,
        quiet: bool = False,
        tool: str | None = None,
        parent_id: int | None = None,
        prefill: str | None = None,
    ) -> Turn:
        """Generate a reply to ``content``, the result of ``tool`` if one is named.

        Without ``conversation`` a new one begins. The content follows ``parent_id``, by
        default the newest message; the reply begins with ``prefill``.
        """
        from oki_trace import queueing

        if tool is not None:
            messages = [] if conversation is None else self.reader.messages(conversation)
            before = newest_path(messages)
            queueing.require_call(before, tool)
            waiting = [part.name or "" for part in queueing.unanswered_calls(before)]
            waiting.remove(tool)
            if waiting and conversation is not None:
                queueing.add_tool_result(self.writer, conversation, tool, content)
                return Turn(conversation, waiting=tuple(waiting))
        system = self.system if conversation is None else None
        new = queueing.new_messages(content, system=system, tool=tool)
        forced = None if prefill is None else Forced(text=prefill)
        request = replace(self.request, messages=new, forced=forced)
        return self._generate(
            lambda: queueing.submit(
                self.writer, request, conversation, parent_id=parent_id, claim=True
            )[1],
            quiet=quiet,
        )

    def branch(
        self,
        origin: Message,
        step: int,
        sampling: Sampling,
        forced: Forced | None,
        *,
        quiet: bool = False,
    ) -> Turn:
        """Generate a reply that departs from ``origin`` at a step, and begins with ``forced``."""
        from oki_trace import queueing

        choice, policy = self.request.choice, self.request.policy
        settings: Any = {"forced": forced, "choice": choice, "claim": True}
        return self._generate(
            lambda: queueing.submit_branch(self.writer, origin, step, sampling, policy, **settings),
            quiet=quiet,
        )

    def _generate(self, submit: Callable[[], int], *, quiet: bool) -> Turn:
        """Generate the reply that ``submit`` queues."""
        from oki_trace.generate import generate_reply

        with reply_stream() as stream:
            reply_id = submit()
            self.dog.end_reply = partial(self.writer.end_abandoned, reply_id, Status.STOPPED)
            end = generate_reply(
                self.writer,
                self.reader,
                self.reader.message(reply_id),
                self.loaded,
                should_stop=stream.should_stop,
                on_text=None if quiet else stream.show,
            )
        self.dog.end_reply = None
        self.dog.obeyed.set()
        if not quiet:
            print()
        reply = self.reader.message(reply_id)
        return Turn(reply.conversation_id, reply, end, stream.exit_status or 0)


@contextmanager
def open_session(turns: options.Turns, origin: Message | None = None) -> Iterator[Session]:
    """Check the options, open the store, load the model: by default that of ``origin``."""
    from oki_trace import queueing
    from oki_trace.llm.chat.template_arguments import refuse_unknown
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    db = options.store_of(turns.db)
    sampling, policy = turns.sampling(), turns.policy()
    template = turns.template()
    if turns.system and turns.conversation is not None:
        raise UsageError(
            "A system message can only begin a new conversation. Leave out --system or -c."
        )
    with TraceWriter(db) as writer, TraceReader(db) as reader, watchdog() as dog:
        all_messages = [] if turns.conversation is None else reader.messages(turns.conversation)
        before = newest_path(all_messages) if origin is None else [origin]
        if origin is None and before and before[-1].is_score:
            raise UsageError(
                f"Conversation {turns.conversation} is a scored text, which has no next "
                "turn. Leave out --conversation to begin a new conversation."
            )
        template = template.over(queueing.last_template(before))
        choice = turns.choice(queueing.last_choice(before))
        # Checked before the weights are read and before anything is stored.
        loaded = load_model(choice, partial(refuse_unknown, options=template))
        request = queueing.ReplyRequest((), choice, sampling, policy, template)
        yield Session(writer, reader, loaded, request, turns.system, dog)


def load_model(choice: ModelChoice, check_tokenizer: Callable[[Any], None]) -> LoadedModel:
    """Load the model, with a spinner on a terminal; warnings become lines on stderr."""
    from oki_trace.llm.loading.load import load

    with warnings.catch_warnings(record=True) as caught:
        if not sys.stdout.isatty():
            loaded = load(choice, check_tokenizer=check_tokenizer)
        else:
            with console().status("Loading the model") as status:

                def report(text: str, fraction: float | None) -> None:
                    percent = "" if fraction is None else f" {fraction:.0%}"
                    status.update(f"{inert(text)}{percent}")

                loaded = load(choice, progress=report, check_tokenizer=check_tokenizer)
    for warning in caught:
        # Deprecations in a library concern its callers, not the user.
        if not issubclass(warning.category, FutureWarning | DeprecationWarning):
            print_error(str(warning.message))
    return loaded


def summary(turn: Turn) -> dict[str, Any]:
    """A generated reply in a few JSON values."""
    reply, end = turn.reply, turn.end
    assert reply is not None and end is not None
    return {
        "conversation": reply.conversation_id,
        "message": reply.id,
        "steps": reply.tokens,
        "status": str(end.status),
        "reason": end.reason,
        "output": end.output,
        "parts": part_objects(end.parts),
    }


def print_summary(turn: Turn, reader: TraceReader, *, as_json: bool = False) -> None:
    """How a reply ended and what it took, in one line or as JSON."""
    reply, end = turn.reply, turn.end
    if reply is None or end is None:
        if as_json:
            waiting = {"conversation": turn.conversation, "waiting_for": list(turn.waiting)}
            print_json(waiting, indent=None)
        else:
            print_text(f"The reply waits for the result of {', '.join(turn.waiting)}.", "dim")
        return
    if as_json:
        print_json(summary(turn), indent=None)
        return
    rate = reply.tokens / end.seconds if end.seconds else 0.0
    parts = [
        f"{end.status} ({end.reason})",
        f"{reply.tokens} tokens",
        f"{given} prompt tokens traced" if (given := reader.given_count(reply.id)) else "",
        f"{rate:.1f} tokens/s",
        explain_generation(reply.generation) if reply.generation else "",
        size(reader.message_bytes(reply.id)),
        f"conversation {reply.conversation_id}, message {reply.id}",
    ]
    print_text(" · ".join(part for part in parts if part), "dim")


class ReplyStream:
    """Writes a reply as it grows; a signal, or a reader that has gone, ends the reply.

    ``exit_status`` is None until one of these happens.
    """

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self._kind: PartKind | None = None

    def should_stop(self) -> bool:
        return self.exit_status is not None

    def on_signal(self, number: int, frame: Any) -> None:
        """End the reply after the current token; at once on a second signal."""
        if self.should_stop():
            raise KeyboardInterrupt
        self.exit_status = 128 + number

    def show(self, text: str, kind: PartKind) -> None:
        """Write a piece of the reply. Thinking is dim on a terminal, and left out of a pipe."""
        thinking = kind == "thinking"
        if thinking and not sys.stdout.isatty():
            return
        separator = "" if self._kind in (None, kind) else "\n\n"
        self._kind = kind
        text = inert(text)
        try:
            sys.stdout.write(separator + (f"\x1b[2m{text}\x1b[22m" if thinking else text))
            sys.stdout.flush()
        except BrokenPipeError:
            self.exit_status = self.exit_status or 0


@contextmanager
def reply_stream() -> Iterator[ReplyStream]:
    """Ctrl-C and SIGTERM end the reply, and all that was decoded is kept."""
    stream = ReplyStream()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stream.on_signal) for number in numbers]
    try:
        yield stream
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
