"""Running the model again on what it was given, and comparing with what is kept.

The reply is decoded as it was, with the model's own cache, but each step says the
token that was said then: what is compared is what the model thought of each, not
what it would choose now. One pass over the whole text would differ from that by
what the cache itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from oki_trace.errors import ModelError, NotFound, OkiTraceError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.pipeline import capture
from oki_trace.llm.decoding.generation import generation_of
from oki_trace.llm.decoding.model_lock import exclusive
from oki_trace.llm.loading.load import LoadedModel, load
from oki_trace.records import Lens, Message, ModelChoice, Prompt, Role, Sampling, Step
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader
from oki_trace.trace_differences import Differences

# The largest |Δlogprob| that another order of the same additions explains.
_EXPLAINED = {"float32": 1e-2, "float64": 1e-2}
_EXPLAINED_16_BIT = 0.5
_MORE = 10


@dataclass(frozen=True, slots=True)
class Recomputed:
    """How far a reply is from what its model says now.

    ``logprob_difference`` is the largest |Δlogprob| (nats) over its tokens and
    their candidates, ``entropy_difference`` the largest |Δentropy| (nats),
    ``lens_difference`` the largest |Δprob| in its lens; ``top1_differences``
    counts the steps whose most likely token is another, ``not_numbers`` the
    values that are NaN where the model gives a number. All None when the reply
    could not be recomputed, and ``reason`` says why. ``agrees`` is False when a
    difference is more than rounding explains.
    """

    conversation_id: int
    message_id: int
    model_id: str
    steps: int
    logprob_difference: float | None
    top1_differences: int | None
    reason: str | None
    agrees: bool
    entropy_difference: float | None = None
    lens_difference: float | None = None
    not_numbers: int | None = None


def recompute(
    reader: TraceReader,
    conversation_id: int | None = None,
    progress: Progress | None = None,
    loader: Callable[[ModelChoice], LoadedModel] = load,
) -> Iterator[Recomputed]:
    """Each reply that has tokens, model by model, so that each is loaded once.

    A model that cannot be loaded any more fails its own replies alone.
    """
    replies = list(_replies(reader, conversation_id))
    by_model: dict[ModelChoice, list[Message]] = {}
    for message in replies:
        by_model.setdefault(message.choice or ModelChoice(message.model_id or ""), []).append(
            message
        )
    done = 0
    for choice, messages in by_model.items():
        loaded: LoadedModel | None = None
        reason = None
        try:
            loaded = loader(choice)
        except ModelError as error:
            reason = str(error)
        for message in messages:
            if loaded is None:
                yield _not_done(message, reason or "")
            else:
                yield _recompute(reader, message, loaded)
            done += 1
            if progress is not None:
                progress(done, len(replies))


def _replies(reader: TraceReader, conversation_id: int | None) -> Iterator[Message]:
    """The replies that have begun and said something, read a page at a time."""
    if conversation_id is not None:
        ids = [conversation_id]
    else:
        ids = sorted(c.id for c in _every_conversation(reader))
    for number in ids:
        try:
            messages = reader.messages(number)
        except NotFound:
            if conversation_id is not None:
                raise
            continue  # deleted since all were listed
        for message in messages:
            if message.role is Role.ASSISTANT and message.tokens and message.prompt_len:
                yield message


def _every_conversation(reader: TraceReader) -> Iterator[Any]:
    offset = 0
    while page := reader.conversations(limit=200, offset=offset):
        yield from page
        offset += len(page)


def _recompute(reader: TraceReader, message: Message, loaded: LoadedModel) -> Recomputed:
    prompt = reader.prompt(message.id)
    chosen = [step.token_id for step in reader.steps(message.id)]
    embeddings: Any = loaded.model.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    if min(*chosen, *prompt.token_ids, 0) < 0 or max(*chosen, *prompt.token_ids, 0) >= size:
        return _not_done(message, f"it has tokens that the model does not have (0 to {size - 1})")
    dtype = message.capture.dtype if message.capture else ""
    found = Differences(complete=dtype != "unknown")
    recorded = reader.iter_steps(message.id)
    waiting: dict[int, tuple[Step, Step]] = {}
    try:
        for event in _decoded_again(message, prompt, chosen, loaded):
            if isinstance(event, Lens):
                before, again = waiting.pop(event.step_index)
                found.add_lens(before, again, event)
            elif isinstance(event, Step):
                before = next(recorded)
                found.add(before, event)
                waiting[event.step_index] = (before, event)
    except (RuntimeError, ValueError, IndexError, TypeError, OkiTraceError) as error:
        return _not_done(message, f"the model cannot be run on it ({error})".splitlines()[0])
    return Recomputed(
        conversation_id=message.conversation_id,
        message_id=message.id,
        model_id=message.model_id or "",
        steps=len(chosen),
        logprob_difference=found.logprob,
        top1_differences=found.other_tops,
        reason=None,
        agrees=found.explained(_EXPLAINED.get(dtype, _EXPLAINED_16_BIT)),
        entropy_difference=found.entropy,
        lens_difference=found.lens,
        not_numbers=found.not_numbers,
    )


def _decoded_again(
    message: Message, prompt: Prompt, chosen: list[int], loaded: LoadedModel
) -> Iterator[Step | Lens]:
    """The reply decoded as it was, token by token with the model's own cache."""
    made = instrument(loaded.model, loaded.tokenizer)
    assert message.capture is not None
    kept = message.capture.policy
    # A few more, for a candidate that is now a rank further down.
    policy = replace(
        kept, topk_logits=min(kept.topk_logits + _MORE, 1000), topk_evidence=1, tensors="none"
    )
    asked = message.generation or generation_of(loaded.model, Sampling(), len(prompt))
    generation = replace(asked, max_new_tokens=len(chosen))
    with exclusive(loaded.model):
        for event in capture(made, prompt, generation, policy, lambda: False, chosen):
            if isinstance(event, Lens):
                yield event
            elif isinstance(event, tuple):
                yield event[0]


def _not_done(message: Message, reason: str) -> Recomputed:
    return Recomputed(
        conversation_id=message.conversation_id,
        message_id=message.id,
        model_id=message.model_id or "",
        steps=message.tokens,
        logprob_difference=None,
        top1_differences=None,
        reason=reason,
        agrees=True,
    )
