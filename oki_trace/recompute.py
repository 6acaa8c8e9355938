"""Runs the model again on a stored prompt and reply, and compares the numbers.

Traced tokens of the prompt are read again in chunks, as they were. The reply is decoded step
by step with the model's own cache, as it was recorded, and each step is forced to the stored
token (teacher forcing). A single pass over the whole text would differ by the rounding of
the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from oki_trace.errors import ModelError, NotFound, OkiTraceError
from oki_trace.llm.capture.instrument import instrument
from oki_trace.llm.capture.pipeline import capture
from oki_trace.llm.capture.teacher_forcing import Windows, teacher_force
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.reply_text import ReplyText
from oki_trace.llm.decoding.generation import resolve_generation
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.llm.loading.load import LoadedModel, load
from oki_trace.records import (
    CapturePolicy,
    Lens,
    Message,
    ModelChoice,
    Prompt,
    Role,
    Sampling,
    Status,
    Step,
)
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader
from oki_trace.trace_differences import Differences

# The largest |Δlogprob| that another order of the same additions explains, in nats.
_TOLERANCES = {"float32": 1e-2, "float64": 1e-2}
_TOLERANCE_16_BIT = 0.5
# Candidates beyond the stored ones, in case one has moved down a rank.
_EXTRA_CANDIDATES = 10


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The differences between a stored reply and its model's present numbers.

    ``logprob_difference`` is the largest |Δlogprob| (nats) over tokens and candidates,
    ``entropy_difference`` the largest |Δentropy| (nats), ``lens_difference`` the largest
    |Δprob| in the lens; ``top1_differences`` counts steps with another most likely token,
    ``not_numbers`` stored NaNs where the model gives a number, ``text_differences`` tokens
    (and the reply itself) whose text is not what the tokenizer makes of the token ids. All
    are None when the reply could not be recomputed; ``reason`` says why. ``numbers_agree``
    is False for a difference that rounding does not explain, ``agrees`` also for another text.
    """

    conversation_id: int
    message_id: int
    model_id: str
    steps: int
    reason: str | None = None
    agrees: bool = True
    numbers_agree: bool = True
    logprob_difference: float | None = None
    top1_differences: int | None = None
    entropy_difference: float | None = None
    lens_difference: float | None = None
    not_numbers: int | None = None
    text_differences: int | None = None


def recompute(
    reader: TraceReader,
    conversation_id: int | None = None,
    progress: Progress | None = None,
    loader: Callable[[ModelChoice], LoadedModel] = load,
) -> Iterator[Recomputed]:
    """Recompute each reply that has tokens, grouped so that each model is loaded once.

    A model that cannot be loaded affects its own replies only.
    """
    replies = list(_replies(reader, conversation_id))
    by_model: dict[ModelChoice, list[Message]] = {}
    for message in replies:
        choice = message.choice or ModelChoice(message.model_id or "")
        by_model.setdefault(choice, []).append(message)
    done = 0
    for choice, messages in by_model.items():
        try:
            loaded: LoadedModel | ModelError = loader(choice)
        except ModelError as error:
            loaded = error
        for message in messages:
            if isinstance(loaded, ModelError):
                yield replace(_result(message), reason=str(loaded))
            else:
                yield _recompute(reader, message, loaded)
            done += 1
            if progress is not None:
                progress(done, len(replies))


def _replies(reader: TraceReader, conversation_id: int | None) -> Iterator[Message]:
    """The replies that have tokens, of one conversation or all."""
    ids = [conversation_id] if conversation_id is not None else sorted(_conversation_ids(reader))
    for number in ids:
        try:
            messages = reader.messages(number)
        except NotFound:
            if conversation_id is not None:
                raise
            continue  # deleted since it was listed
        for message in messages:
            traced = message.tokens or (message.policy and message.policy.trace_prompt)
            if message.role is Role.ASSISTANT and traced and message.prompt_len:
                yield message


def _conversation_ids(reader: TraceReader) -> Iterator[int]:
    offset = 0
    while page := reader.conversations(limit=200, offset=offset):
        yield from (conversation.id for conversation in page)
        offset += len(page)


def _result(message: Message) -> Recomputed:
    ids = (message.conversation_id, message.id)
    return Recomputed(*ids, message.model_id or "", message.tokens)


def _recompute(reader: TraceReader, message: Message, loaded: LoadedModel) -> Recomputed:
    prompt = reader.prompt(message.id)
    chosen = [step.token_id for step in reader.steps(message.id)]
    embeddings: Any = loaded.model.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    if min(*chosen, *prompt.token_ids, 0) < 0 or max(*chosen, *prompt.token_ids, 0) >= size:
        reason = f"it has token ids outside the model's 0 to {size - 1}"
        return replace(_result(message), reason=reason)
    dtype = message.capture.dtype if message.capture else ""
    differences = Differences(complete=dtype != "unknown")
    stored_steps = reader.iter_steps(message.id)
    text = ReplyText(loaded.tokenizer)
    tools = message.template.tools if message.template else ()
    text.replies_to(prompt, tools, message.prefix_len, Vocabulary(loaded.tokenizer))
    without_lens: dict[int, Step] = {}
    given = 0
    try:
        for stored, again in _read_again(reader, message, prompt, loaded):
            given += 1
            differences.add(stored, again)
            if again.lens is not None:
                differences.add_lens(stored, again.lens)
        for event in _decode_again(message, prompt, chosen, loaded):
            if isinstance(event, Lens):
                differences.add_lens(without_lens.pop(event.step_index), event)
            else:
                stored = without_lens[event.step_index] = next(stored_steps)
                differences.add(stored, event)
                text.push(event)
    except (RuntimeError, ValueError, IndexError, TypeError, OkiTraceError) as error:
        reason = f"the model cannot be run on it ({error})".splitlines()[0]
        return replace(_result(message), reason=reason)
    # An older trace has no parts, and an interrupted one has its text so far.
    ended = message.status in (Status.COMPLETE, Status.STOPPED)
    scored = not chosen  # its text is the one that it was given
    other_text = (
        ended
        and not scored
        and bool(message.parts)
        and text.finish() != (message.content, message.parts)
    )
    text_differences = differences.other_texts + other_text
    numbers_agree = differences.explained(_TOLERANCES.get(dtype, _TOLERANCE_16_BIT))
    return replace(
        _result(message),
        steps=given + len(chosen),
        agrees=numbers_agree and not text_differences,
        numbers_agree=numbers_agree,
        logprob_difference=differences.logprob,
        top1_differences=differences.other_tops,
        entropy_difference=differences.entropy,
        lens_difference=differences.lens,
        not_numbers=differences.not_numbers,
        text_differences=text_differences,
    )


def _decode_again(
    message: Message, prompt: Prompt, chosen: list[int], loaded: LoadedModel
) -> Iterator[Step | Lens]:
    """Decode the stored tokens step by step with the model's own cache."""
    if not chosen:
        return
    handle = instrument(loaded.model, loaded.tokenizer)
    assert message.capture is not None
    policy = _with_more_candidates(message.capture.policy)
    generation = message.generation or resolve_generation(loaded.model, Sampling(), len(prompt))
    generation = replace(generation, max_new_tokens=0)
    with lock_model(loaded.model):
        for event in capture(handle, prompt, generation, policy, lambda: False, chosen):
            if isinstance(event, Lens):
                yield event
            elif isinstance(event, tuple):
                yield event[0]


def _read_again(
    reader: TraceReader, message: Message, prompt: Prompt, loaded: LoadedModel
) -> Iterator[tuple[Step, Step]]:
    """Each stored step of a given token, and the same made again."""
    first = next((s.position for s in reader.steps(message.id, given=True)), None)
    if first is None or message.capture is None:
        return
    handle = instrument(loaded.model, loaded.tokenizer)
    policy = _with_more_candidates(message.capture.policy.for_prompt)
    windows = None if message.capture.windows is None else Windows(*message.capture.windows)
    with lock_model(loaded.model):
        again = teacher_force(handle, prompt.token_ids, policy, first=first, windows=windows)
        for stored, step in zip(reader.iter_steps(message.id, given=True), again, strict=False):
            if not isinstance(step, Step):
                return
            if (stored.position, stored.token_id) != (step.position, step.token_id):
                raise ValueError(f"position {stored.position} is not a token of its prompt")
            yield stored, step


def _with_more_candidates(policy: CapturePolicy) -> CapturePolicy:
    candidates = min(policy.topk_logits + _EXTRA_CANDIDATES, 1000)
    # The readings by installed lenses are not compared: those lenses may be gone since.
    return replace(policy, topk_logits=candidates, topk_evidence=1, tensors="none", lenses=())
