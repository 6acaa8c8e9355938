"""From messages to the prompt the model is given.

The tokenizer's own chat template where it has one, else the plain
``USER: … ASSISTANT:`` form. Templated text already holds its special tokens,
so it is tokenized without adding them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oki_trace.errors import CaptureError
from oki_trace.llm.vocabulary import Vocabulary
from oki_trace.records import ChatMessage, Prompt, Segment


def render(
    tokenizer: Any, messages: Sequence[ChatMessage], vocabulary: Vocabulary | None = None
) -> Prompt:
    """The prompt for the assistant's next message.

    Raises CaptureError when the template refuses the messages or nothing is
    left to give to the model.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    text = _templated(tokenizer, messages) if templated else _plain(messages)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=fast)
    ids = tuple(int(i) for i in encoded["input_ids"])
    if not ids:
        raise CaptureError("The prompt has no tokens. Give it some text.")
    vocabulary = vocabulary or Vocabulary(tokenizer)
    return Prompt(
        text=text,
        token_ids=ids,
        tokens=tuple(vocabulary.text(i) for i in ids),
        segments=_segments(text, messages, encoded["offset_mapping"] if fast else None, len(ids)),
    )


def _templated(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    import jinja2

    turns = [{"role": str(m.role), "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise CaptureError(
            f"The model's chat template refused the messages: {_first_line(error)}. "
            "Leave out the system message, or mend chat_template.jinja in the model's folder."
        ) from error
    return str(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _plain(messages: Sequence[ChatMessage]) -> str:
    turns = [f"{message.role.upper()}: {message.content}" for message in messages]
    return "\n\n".join([*turns, "ASSISTANT:"])


def _segments(
    text: str,
    messages: Sequence[ChatMessage],
    offsets: Sequence[tuple[int, int]] | None,
    length: int,
) -> tuple[Segment, ...]:
    """Which message each token is of, found by its place in the rendered text."""
    if offsets is None:
        nowhere: Segment = "template"
        return (nowhere,) * length
    spans: list[tuple[int, int, Segment]] = []
    cursor = 0
    for message in messages:
        content = message.content.strip()
        start = text.find(content, cursor) if content else -1
        if start >= 0:
            cursor = start + len(content)
            spans.append((start, cursor, message.role.value))
    return tuple(_segment_of(start, end, spans) for start, end in offsets)


def _segment_of(start: int, end: int, spans: Sequence[tuple[int, int, Segment]]) -> Segment:
    for first, last, segment in spans:
        if start < last and end > first:
            return segment
    return "template"
