"""From messages to the prompt the model is given.

The tokenizer's own chat template where it has one, else the plain
``USER: … ASSISTANT:`` form. Templated text already holds its special tokens,
so it is tokenized without adding them again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.chat.markers import format_of, template_text
from oki_trace.llm.chat.template_arguments import refuse_unknown
from oki_trace.llm.chat.turns import MARK, Form, Said, Turn, forms, marked, turns
from oki_trace.llm.loading.activity import Activity, report_activity
from oki_trace.llm.transformers_internals import render_jinja_template
from oki_trace.records import ChatMessage, Prompt, Role, Segment, TemplateOptions

Span = tuple[int, int, Segment]


class _Written(NamedTuple):
    """The prompt's text, and where in it each message stands."""

    text: str
    spans: list[Span]


def render(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    vocabulary: Vocabulary | None = None,
    options: TemplateOptions | None = None,
) -> Prompt:
    """The prompt for the assistant's next message, or for the rest of the one that comes last.

    ``options`` are for the chat template. Raises CaptureError when the template
    refuses the messages or leaves out the text of one, when it takes no such options,
    when the text cannot be tokenized, or when nothing is left to give to the model.
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


def _encode(
    tokenizer: Any, text: str, *, templated: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of ``text`` and where each stands in it: (0, 0) where that cannot be told."""
    fast = bool(getattr(tokenizer, "is_fast", False))

    def encoded(special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        # Too long a prompt is refused later, in one sentence of ours.
        made = tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False
        )
        ids = [int(i) for i in made["input_ids"]]
        return ids, list(made["offset_mapping"]) if fast else [(0, 0)] * len(ids)

    report_activity(Activity.TOKENIZER)
    bare, offsets = encoded(False)
    if templated:
        return bare, offsets
    # What begins a text is added, what ends one is not: the model is to go on with it.
    whole, whole_offsets = encoded(True)
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            bos = tokenizer.bos_token_id
            # Of a text that has its beginning already, as it was typed, one is enough.
            twice = int(bos is not None and bare[:1] == [bos] and whole[:begin] == [bos])
            return whole[twice : begin + len(bare)], whole_offsets[twice : begin + len(bare)]
    return whole, whole_offsets


# --------------------------------------------------------------------- with a template


def _templated(
    tokenizer: Any, messages: Sequence[ChatMessage], options: TemplateOptions
) -> _Written:
    """Written in the first form in which all that was said appears."""
    refusal: CaptureError | None = None
    omission: CaptureError | None = None
    with_marks, behind = marked(messages)
    for form in forms(messages):
        try:
            text = _applied(tokenizer, messages, options, form)
        except CaptureError as error:
            refusal = refusal or error
            continue
        try:
            pieces = MARK.split(_applied(tokenizer, with_marks, options, form))
        except CaptureError:
            pieces = []
        missing = _missing(text, pieces, behind)
        if missing is None or not text:
            return _Written(text, _spans(text, pieces, behind))
        omission = omission or _omitted(messages[missing.message], missing)
    # A form that is understood in part says more than one that is not understood.
    raise omission or refusal or CaptureError("There are no messages. Give at least one.")


def _applied(
    tokenizer: Any, messages: Sequence[ChatMessage], options: TemplateOptions, form: Form
) -> str:
    report_activity(Activity.TEMPLATE)
    goes_on = bool(messages) and messages[-1].role is Role.ASSISTANT
    around = next(((o, c or "") for o, c in format_of(tokenizer).tool_calls), ("", ""))
    written = turns(messages, template_text(tokenizer), form, around)
    given: dict[str, Any] = {
        "tools": [dict(tool) for tool in options.tools] or None,
        "add_generation_prompt": not goes_on,
        "continue_final_message": goes_on,
        **options.arguments,
    }
    try:
        if form.empty_as_none:
            text = _with_none(tokenizer, written, given)
        else:
            text = tokenizer.apply_chat_template(written, tokenize=False, **given)
    except Exception as error:  # a template is a program, and can raise anything
        has_system = any(message.role is Role.SYSTEM for message in messages)
        fix = "Leave out the system message" if has_system else "Begin a new conversation"
        raise CaptureError(
            f"The model's chat template refused the messages: {_first_line(error)}. "
            f"{fix}, or mend chat_template.jinja in the model's folder."
        ) from error
    return str(text)


def _with_none(tokenizer: Any, written: Sequence[Turn], given: dict[str, Any]) -> str:
    """The same for a content of None, which ``apply_chat_template`` takes out of a message.

    Some templates write a call down only where the content is none.
    """
    template = tokenizer.get_chat_template(tools=given["tools"])
    named = {**tokenizer.special_tokens_map, **given}
    rendered: Any = render_jinja_template([list(written)], chat_template=template, **named)
    return str(rendered[0][0])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _missing(text: str, pieces: Sequence[str], behind: Sequence[Said]) -> Said | None:
    """The first text that has to appear in the prompt and does not."""
    seen = {int(number) for number in pieces[1::2]}
    squeezed = "".join(text.split())
    for number, said in enumerate(behind):
        # Without marks to go by, the text itself is looked for; templates trim it.
        appears = number in seen if pieces else "".join(said.text.split()) in squeezed
        if said.needed and not appears:
            return said
    return None


def _omitted(message: ChatMessage, said: Said) -> CaptureError:
    what = {
        "system": "the system message",
        "user": "a message of yours",
        "assistant": "an earlier reply",
        "tool": "the answer of a tool",
        "tool_call": f"the call of the tool {said.text}",
    }.get(said.segment, "a message")
    start = " ".join(message.content.split())[:40]
    quoted = f' ("{start}…")' if start and said.segment != "tool_call" else ""
    return CaptureError(
        f"The model's chat template leaves out {what}{quoted}, so the model would not see it. "
        "Leave it out yourself in a new conversation, or mend chat_template.jinja in the "
        "model's folder."
    )


def _spans(text: str, pieces: Sequence[str], behind: Sequence[Said]) -> list[Span]:
    """Where in ``text`` each message, thinking and tool call stands.

    ``pieces`` are of a second rendering, with a mark in place of each text: what comes
    between them is known, while a short message, looked for as it is, would be found
    inside the template's own words. From where a template rewrites contents beyond
    recognition, nothing is claimed.
    """
    if not pieces or not text.startswith(pieces[0]):
        return []
    spans: list[Span] = []
    at = len(pieces[0])
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        said = behind[int(number)]
        end = _end_of(said.text, text, at, after)
        if end is None:
            break
        last = end
        if said.segment == "tool_call":
            last = end + _arguments_end(after, said.arguments)
        spans.append((at, last, said.segment))
        at = end + len(after)
    return spans


def _end_of(content: str, text: str, at: int, after: str) -> int | None:
    """Where the content that begins at ``at`` ends: as it is, trimmed, or at the next words."""
    stripped = (content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))
    for form in (content, *stripped):
        if text.startswith(form + after, at):
            return at + len(form)
    found = text.find(after, at) if after else -1
    return None if found < 0 else found


def _arguments_end(after: str, arguments: Any) -> int:
    """Where the arguments of a call end, in what the template writes after its name."""
    end = 0
    for leaf in _leaves(arguments):
        found = after.find(leaf, end)
        if found >= 0:
            end = found + len(leaf)
    closing = re.compile(r"""["'\]}\s]*[}\]]""") if end else re.compile(r"[^{}\n<\[]*\{\s*\}")
    found_end = closing.match(after, end)
    return found_end.end() if found_end else end


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (str(k), *_leaves(v))]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _leaves(one)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


# ------------------------------------------------------------------ without a template


def _plain(messages: Sequence[ChatMessage]) -> _Written:
    text = ""
    spans: list[Span] = []
    for message in messages:
        text += ("\n\n" if text else "") + f"{message.role.upper()}:"
        said = _as_said(message)
        if said is None:
            said = message.content
            text += "" if said[:1].isspace() else " "
        spans.append((len(text), len(text) + len(said), message.role.value))
        text += said
    if not messages or messages[-1].role is not Role.ASSISTANT:
        text += "\n\nASSISTANT:"
    return _Written(text, spans)


def _as_said(message: ChatMessage) -> str | None:
    """A reply as the model wrote it, from after the colon on; None where that is not known."""
    if len(message.parts) == 1 and message.parts[0].kind == "answer" and message.parts[0].end:
        return message.parts[0].text
    return None


def _refuse_unencodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CaptureError(
            f"The prompt holds {text[error.start]!r}, which is half a character. Give it in UTF-8."
        ) from error


def _segment_of(start: int, end: int, spans: Sequence[Span]) -> Segment:
    for first, last, segment in spans:
        if start < last and end > first:
            return segment
    return "template"
