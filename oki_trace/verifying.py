"""Running the model again on what it was given, and comparing with what is kept.

The stored tokens are given to the model in one forward pass (teacher forcing), so
that what is compared is what it says of each, not what it would choose now.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from oki_trace.errors import ModelError, NotFound, OkiTraceError
from oki_trace.llm.load import LoadedModel, load
from oki_trace.records import Message, ModelChoice, Role
from oki_trace.store.reader import TraceReader

Progress = Callable[[int, int], None]  # replies done, of all

# The largest |Δlogprob| that another order of the same additions explains.
_EXPLAINED = {"float32": 1e-2, "float64": 1e-2}
_EXPLAINED_16_BIT = 0.5


@dataclass(frozen=True, slots=True)
class Recomputed:
    """How far a reply is from what its model says now.

    ``logprob_difference`` is the largest |Δlogprob| (nats) over its tokens,
    ``top1_differences`` counts the steps whose most likely token is another;
    both None when the reply could not be recomputed, and ``reason`` says why.
    ``agrees`` is False when the difference is more than rounding explains.
    """

    conversation_id: int
    message_id: int
    model_id: str
    steps: int
    logprob_difference: float | None
    top1_differences: int | None
    reason: str | None
    agrees: bool


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
    prompt = reader.prompt(message.id).token_ids
    steps = reader.steps(message.id)
    chosen = [step.token_id for step in steps]
    try:
        logits = _teacher_forced(loaded.model, [*prompt, *chosen[:-1]], len(chosen))
    except (RuntimeError, ValueError, IndexError, OkiTraceError) as error:
        return _not_done(message, f"the model cannot be run on it ({error})".splitlines()[0])
    logprobs = logits.float().log_softmax(-1)
    now = logprobs.gather(-1, torch.tensor(chosen)[:, None])[:, 0]
    stored = torch.tensor([step.logprob for step in steps])
    difference = float((now - stored).abs().nan_to_num(posinf=0.0).max())
    best = logprobs.argmax(-1).tolist()
    tops = [step.topk.token_ids for step in reader.iter_steps(message.id)]
    others = sum(
        1 for top, token in zip(tops, best, strict=True) if len(top) and int(top[0]) != int(token)
    )
    dtype = message.capture.dtype if message.capture else ""
    return Recomputed(
        conversation_id=message.conversation_id,
        message_id=message.id,
        model_id=message.model_id or "",
        steps=len(steps),
        logprob_difference=difference,
        top1_differences=others,
        reason=None,
        agrees=difference <= _EXPLAINED.get(dtype, _EXPLAINED_16_BIT),
    )


@torch.no_grad()
def _teacher_forced(model: Any, token_ids: list[int], last: int) -> torch.Tensor:
    """The logits at the ``last`` positions, (last, vocab), on the CPU."""
    inputs = torch.tensor([token_ids], device=model.device)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(inputs), "use_cache": False}
    # Where the model can leave out the head for the prompt, a long one takes little memory.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = last
    logits: torch.Tensor = model(input_ids=inputs, **given).logits
    return logits[0, -last:].cpu()


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
