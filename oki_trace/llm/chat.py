"""From messages to the prompt the model is given.

The tokenizer's own chat template where it has one, else the plain
``USER: … ASSISTANT:`` form. Templated text already holds its special tokens,
so it is tokenized without adding them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from oki_trace.errors import CaptureError
from oki_trace.llm.doing import Doing, now_doing
from oki_trace.llm.vocabulary import Vocabulary
from oki_trace.records import ChatMessage, Prompt, Role, Segment


def render(
    tokenizer: Any, messages: Sequence[ChatMessage], vocabulary: Vocabulary | None = None
) -> Prompt:
    """The prompt for the assistant's next message.

    Raises CaptureError when the template refuses the messages, when their text
    cannot be tokenized, or when nothing is left to give to the model.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))

    def write(said: Sequence[ChatMessage]) -> str:
        return _templated(tokenizer, said) if templated else _plain(said)

    text = write(messages)
    _refuse_unencodable(text)
    fast = bool(getattr(tokenizer, "is_fast", False))
    now_doing(Doing.TOKENIZER)
    encoded = tokenizer(
        text,
        add_special_tokens=not templated,
        return_offsets_mapping=fast,
        # Too long a prompt is refused later, in one sentence of ours.
        verbose=False,
    )
    ids = tuple(int(i) for i in encoded["input_ids"])
    if not ids:
        raise CaptureError("The prompt has no tokens. Give it some text.")
    vocabulary = vocabulary or Vocabulary(tokenizer)
    spans = _spans(text, messages, write) if fast else []
    offsets = encoded["offset_mapping"] if fast else [(0, 0)] * len(ids)
    return Prompt(
        text=text,
        token_ids=ids,
        tokens=tuple(vocabulary.text(i) for i in ids),
        segments=tuple(_segment_of(start, end, spans) for start, end in offsets),
    )


def _templated(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    turns = [{"role": str(m.role), "content": m.content} for m in messages]
    now_doing(Doing.TEMPLATE)
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and can raise anything
        has_system = any(message.role is Role.SYSTEM for message in messages)
        fix = "Leave out the system message" if has_system else "Begin a new conversation"
        raise CaptureError(
            f"The model's chat template refused the messages: {_first_line(error)}. "
            f"{fix}, or mend chat_template.jinja in the model's folder."
        ) from error
    return str(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _plain(messages: Sequence[ChatMessage]) -> str:
    turns = [f"{message.role.upper()}: {message.content}" for message in messages]
    return "\n\n".join([*turns, "ASSISTANT:"])


def _refuse_unencodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CaptureError(
            f"The prompt holds {text[error.start]!r}, which is half a character. Give it in UTF-8."
        ) from error


def _spans(
    text: str, messages: Sequence[ChatMessage], write: Callable[[Sequence[ChatMessage]], str]
) -> list[tuple[int, int, Segment]]:
    """Where in ``text`` each message stands.

    A second rendering, with a mark in place of each content, shows what comes
    between them: looked for as it is, a short message would be found inside the
    template's own words. From where a template rewrites contents beyond
    recognition, nothing is claimed.
    """
    marked = [ChatMessage(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)]
    try:
        between = re.split("\ue000([0-9]+)\ue001", write(marked))
    except CaptureError:
        return []
    if not text.startswith(between[0]):
        return []
    spans: list[tuple[int, int, Segment]] = []
    at = len(between[0])
    for number, after in zip(between[1::2], between[2::2], strict=True):
        message = messages[int(number)]
        end = _end_of(message.content, text, at, after)
        if end is None:
            break
        spans.append((at, end, message.role.value))
        at = end + len(after)
    return spans


def _end_of(content: str, text: str, at: int, after: str) -> int | None:
    """Where the content that begins at ``at`` ends: as it is, trimmed, or at the next words."""
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(form + after, at):
            return at + len(form)
    found = text.find(after, at) if after else -1
    return None if found < 0 else found


def _segment_of(start: int, end: int, spans: Sequence[tuple[int, int, Segment]]) -> Segment:
    for first, last, segment in spans:
        if start < last and end > first:
            return segment
    return "template"
