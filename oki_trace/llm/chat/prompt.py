"""Renders messages as the model's prompt.

The prompt is written by the tokenizer's own chat template, or in the plain
``USER: … ASSISTANT:`` form if it has none. A template writes its special tokens
itself, so its text is tokenized without adding them again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.markers import format_of, template_text
from oki_trace.llm.chat.template_arguments import refuse_unknown
from oki_trace.llm.chat.turns import MARK, Form, MarkedText, Turn, forms, marked, turns
from oki_trace.llm.failures import first_line
from oki_trace.llm.loading.activity import Activity, report_activity
from oki_trace.llm.transformers_internals import render_jinja_template
from oki_trace.records import ChatMessage, Prompt, Role, Segment, TemplateOptions

Span = tuple[int, int, Segment]


class _Written(NamedTuple):
    """The prompt's text, and where each message is in it."""

    text: str
    spans: list[Span]


def render(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    vocabulary: Vocabulary | None = None,
    options: TemplateOptions | None = None,
) -> Prompt:
    """The prompt for the assistant's next message, or for the rest of its last message.

    ``options`` are for the chat template. Raises CaptureError if the template
    refuses the messages, omits the text of one, or does not accept the options, and
    if the text cannot be tokenized or has no tokens.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    options = options or TemplateOptions()
    refuse_unknown(tokenizer, options)
    written = _templated(tokenizer, messages, options) if templated else _plain(messages)
    _refuse_unencodable(written.text)
    ids, offsets = _encode(tokenizer, written.text, templated=templated)
    if not ids:
        raise CaptureError("The prompt has no tokens. Give it some text.")
    vocabulary = vocabulary or Vocabulary(tokenizer)
    return Prompt(
        text=written.text,
        token_ids=tuple(ids),
        tokens=tuple(vocabulary.text(i) for i in ids),
        segments=tuple(_segment_of(start, end, written.spans) for start, end in offsets),
    )


def text_prompt(tokenizer: Any, text: str, vocabulary: Vocabulary) -> Prompt:
    """A text by itself, without a chat template, after the tokens that the tokenizer adds.

    Raises CaptureError for a lone surrogate.
    """
    _refuse_unencodable(text)
    ids, offsets = _encode(tokenizer, text, templated=False)
    added = len(ids) - len(_encode(tokenizer, text, templated=True)[0])
    return Prompt(
        text=text,
        token_ids=tuple(ids),
        tokens=tuple(vocabulary.text(i) for i in ids),
        segments=tuple("template" if at < added else "user" for at in range(len(offsets))),
    )


def _encode(
    tokenizer: Any, text: str, *, templated: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of ``text`` and the characters of each: (0, 0) if the tokenizer cannot tell."""
    fast = bool(getattr(tokenizer, "is_fast", False))

    def encoded(special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        # Not verbose: we refuse a prompt that is too long ourselves.
        encoding = tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False
        )
        ids = [int(i) for i in encoding["input_ids"]]
        return ids, list(encoding["offset_mapping"]) if fast else [(0, 0)] * len(ids)

    report_activity(Activity.TOKENIZER)
    bare, offsets = encoded(False)
    if templated:
        return bare, offsets
    # The special tokens before the text are added, those after it are not: the model goes on.
    whole, whole_offsets = encoded(True)
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            bos = tokenizer.bos_token_id
            # A text that was typed with its beginning gets no second one.
            start = int(bos is not None and bare[:1] == [bos] and whole[:begin] == [bos])
            return whole[start : begin + len(bare)], whole_offsets[start : begin + len(bare)]
    return whole, whole_offsets


# --------------------------------------------------------------------- with a template


def _templated(
    tokenizer: Any, messages: Sequence[ChatMessage], options: TemplateOptions
) -> _Written:
    """The prompt in the first form in which the text of every message appears."""
    refusal: CaptureError | None = None
    omission: CaptureError | None = None
    messages_with_marks, texts = marked(messages)
    for form in forms(messages):
        try:
            prompt = _applied(tokenizer, messages, options, form)
        except CaptureError as error:
            refusal = refusal or error
            continue
        try:
            pieces = MARK.split(_applied(tokenizer, messages_with_marks, options, form))
        except CaptureError:
            pieces = []
        missing = _missing(prompt, pieces, texts)
        if missing is None or not prompt:
            return _Written(prompt, _spans(prompt, pieces, texts))
        omission = omission or _omitted(messages[missing.message], missing)
    # An omission says more than a refusal: the template understood that form in part.
    raise omission or refusal or CaptureError("There are no messages. Give at least one.")


def _applied(
    tokenizer: Any, messages: Sequence[ChatMessage], options: TemplateOptions, form: Form
) -> str:
    report_activity(Activity.TEMPLATE)
    continues = bool(messages) and messages[-1].role is Role.ASSISTANT
    markers = next(((o, c or "") for o, c in format_of(tokenizer).tool_calls), ("", ""))
    conversation = turns(messages, template_text(tokenizer), form, markers)
    arguments: dict[str, Any] = {
        "tools": [dict(tool) for tool in options.tools] or None,
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        **options.arguments,
    }
    try:
        if form.empty_as_none:
            return _rendered_with_none(tokenizer, conversation, arguments)
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **arguments))
    except Exception as error:  # a template is a program, and can raise anything
        has_system = any(message.role is Role.SYSTEM for message in messages)
        fix = "Leave out the system message" if has_system else "Begin a new conversation"
        reason = first_line(error, 500).rstrip(".")
        raise CaptureError(
            f"The model's chat template refused the messages: {reason}. "
            f"{fix}, or fix chat_template.jinja in the model's folder."
        ) from error


def _rendered_with_none(
    tokenizer: Any, conversation: Sequence[Turn], arguments: dict[str, Any]
) -> str:
    """The same for a content of None, which ``apply_chat_template`` removes from a message.

    Some templates write a call only if the content is none.
    """
    template = tokenizer.get_chat_template(tools=arguments["tools"])
    variables = {**tokenizer.special_tokens_map, **arguments}
    rendered: Any = render_jinja_template([list(conversation)], chat_template=template, **variables)
    return str(rendered[0][0])


def _missing(prompt: str, pieces: Sequence[str], texts: Sequence[MarkedText]) -> MarkedText | None:
    """The first text that must appear in the prompt and does not."""
    numbers = {int(number) for number in pieces[1::2]}
    squeezed = "".join(prompt.split())
    for number, text in enumerate(texts):
        # Without marks, the text itself is searched for; templates trim it.
        appears = number in numbers if pieces else "".join(text.text.split()) in squeezed
        if text.required and not appears:
            return text
    return None


def _omitted(message: ChatMessage, text: MarkedText) -> CaptureError:
    what = {
        "system": "the system message",
        "user": "one of your messages",
        "assistant": "an earlier reply",
        "tool": "the result of a tool",
        "tool_call": f"the call of the tool {text.text}",
    }.get(text.segment, "a message")
    start = " ".join(message.content.split())[:40]
    quoted = f' ("{start}…")' if start and text.segment != "tool_call" else ""
    return CaptureError(
        f"The model's chat template leaves out {what}{quoted}, so the model would not see it. "
        "Leave it out yourself in a new conversation, or fix chat_template.jinja in the "
        "model's folder."
    )


def _spans(prompt: str, pieces: Sequence[str], texts: Sequence[MarkedText]) -> list[Span]:
    """Where each message, thinking and tool call is in the prompt.

    ``pieces`` are of a second rendering, with a mark in place of each text, so the
    template's words between the texts are known. A search for a short message itself
    could find it in those words. The spans end where a template rewrites a content
    beyond recognition.
    """
    if not pieces or not prompt.startswith(pieces[0]):
        return []
    spans: list[Span] = []
    at = len(pieces[0])
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        text = texts[int(number)]
        end = _end_of(text.text, prompt, at, after)
        if end is None:
            break
        inside = _arguments_end(after, text.arguments) if text.segment == "tool_call" else 0
        spans.append((at, end + inside, text.segment))
        at = end + len(after)
    return spans


def _end_of(content: str, prompt: str, at: int, after: str) -> int | None:
    """The end of a content at ``at``: as it is, trimmed, or up to the template's next words."""
    trimmed = (content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))
    for form in (content, *trimmed):
        if prompt.startswith(form + after, at):
            return at + len(form)
    end = prompt.find(after, at) if after else -1
    return None if end < 0 else end


def _arguments_end(after: str, arguments: Any) -> int:
    """Where the arguments of a call end in the text that the template writes after its name."""
    end = 0
    for leaf in _leaves(arguments):
        start = after.find(leaf, end)
        if start >= 0:
            end = start + len(leaf)
    closing = re.compile(r"""["'\]}\s]*[}\]]""") if end else re.compile(r"[^{}\n<\[]*\{\s*\}")
    brackets = closing.match(after, end)
    return brackets.end() if brackets else end


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (str(k), *_leaves(v))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


# ------------------------------------------------------------------ without a template


def _plain(messages: Sequence[ChatMessage]) -> _Written:
    text = ""
    spans: list[Span] = []
    for message in messages:
        text += ("\n\n" if text else "") + f"{message.role.upper()}:"
        content, parts = message.content, message.parts
        if len(parts) == 1 and parts[0].kind == "answer" and parts[0].end:
            content = parts[0].text  # as the model wrote it, from after the colon on
        elif not content[:1].isspace():
            text += " "
        spans.append((len(text), len(text) + len(content), message.role.value))
        text += content
    if not messages or messages[-1].role is not Role.ASSISTANT:
        text += "\n\nASSISTANT:"
    return _Written(text, spans)


def _refuse_unencodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CaptureError(
            f"The prompt contains {text[error.start]!r}, a lone surrogate. Give it in UTF-8."
        ) from error


def _segment_of(start: int, end: int, spans: Sequence[Span]) -> Segment:
    for first, last, segment in spans:
        if start < last and end > first:
            return segment
    return "template"
