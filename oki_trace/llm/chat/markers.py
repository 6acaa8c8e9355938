"""Finds the markers around thinking, answer and tool calls in the replies of a model.

A tokenizer may declare how its replies are parsed (``response_template``, in
transformers' ``parse_response``). Otherwise the common markers are looked up in the
template's own text: a model is trained on the text its template writes, and a marker
that is not in it is plain text to the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Pair = tuple[str, str]

_THINKING: tuple[Pair, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<|think|>", "<|/think|>"),
    ("◁think▷", "◁/think▷"),
    ("Here is my thought process:", "Here is my response:"),
)
# Around one or several calls; without a closing marker, up to the end of the reply.
_TOOL_CALLS: tuple[tuple[str, str | None], ...] = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<seed:tool_call>", "</seed:tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<|tool_call|>", None),
    ("[TOOL_CALLS]", None),
    ("<|python_tag|>", None),
)
# Around an answer, not part of its text.
_ANSWER: tuple[Pair, ...] = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
_HARMONY = ("<|channel|>", "<|message|>")


@dataclass(frozen=True)
class ReplyFormat:
    """The markers of a model's replies.

    ``parser`` is a tokenizer with a ``response_template``; ``harmony`` has channels.
    ``thinking`` and ``answer`` are pairs of opening and closing markers, and so are
    ``tool_calls``, where the closing one may be None. ``bare_calls``: a reply that is
    only a JSON object with a name and parameters is a call.
    """

    parser: Any = None
    harmony: bool = False
    thinking: tuple[Pair, ...] = ()
    answer: tuple[Pair, ...] = ()
    tool_calls: tuple[tuple[str, str | None], ...] = ()
    bare_calls: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a reply is only an answer."""
        return self == ReplyFormat()

    def begins_thinking(self, prompt: str) -> bool:
        """Whether the prompt ends inside thinking: some templates open it for the model."""
        return prompt.rstrip().endswith(tuple(opening for opening, _ in self.thinking))


def template_text(tokenizer: Any) -> str:
    """The chat template, or all of several; empty without any."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(str(text) for text in template.values())
    return str(template or "")


def format_of(tokenizer: Any) -> ReplyFormat:
    """The markers of the replies of this tokenizer's model."""
    text = template_text(tokenizer)
    return ReplyFormat(
        parser=tokenizer if getattr(tokenizer, "response_template", None) else None,
        harmony=all(marker in text for marker in _HARMONY),
        # By the closing marker: a template that cuts thinking off names no opening one.
        thinking=tuple(pair for pair in _THINKING if pair[1] in text),
        answer=tuple(pair for pair in _ANSWER if pair[1] in text),
        tool_calls=tuple(pair for pair in _TOOL_CALLS if pair[0] in text),
        bare_calls=bool(re.search(r'\{\s*\\?"name\\?":[^{}]*\\?"parameters\\?":', text)),
    )
