"""How a model's replies are marked up, as its chat template tells.

A tokenizer that declares how its replies are parsed is taken at its word
(``response_template``, in transformers' ``parse_response``). Else the markers that
are in common use are looked for in the template's own text: a model is trained on
what its template writes, and a marker that is not in it is plain text to the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
# Around one call or several. Without an end, the calls go on to the end of the reply.
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
# Around an answer; no part of its text.
_ANSWER: tuple[Pair, ...] = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
_HARMONY = ("<|channel|>", "<|message|>")


@dataclass(frozen=True)
class ReplyFormat:
    """What to look for in a reply.

    ``parser`` is a tokenizer with a ``response_template``; ``harmony``: channels.
    ``thinking`` and ``answer`` are pairs of opening and closing markers, ``tool_calls``
    too, where the closing one may be None. ``bare_calls``: a reply that is nothing but
    a JSON object with a name and parameters is a call.
    """

    parser: Any = None
    harmony: bool = False
    thinking: tuple[Pair, ...] = ()
    answer: tuple[Pair, ...] = ()
    tool_calls: tuple[tuple[str, str | None], ...] = ()
    bare_calls: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a reply is its answer and nothing else."""
        return self == ReplyFormat()

    def begins_thinking(self, prompt: str) -> bool:
        """Whether the prompt ends inside thinking: some templates open it for the model."""
        end = prompt.rstrip()
        return any(end.endswith(opening) for opening, _ in self.thinking)


def template_text(tokenizer: Any) -> str:
    """The chat template; all of them, where a tokenizer has several by name. Empty: none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(str(text) for text in template.values())
    return str(template or "")


def format_of(tokenizer: Any) -> ReplyFormat:
    """How this tokenizer's model marks up its replies."""
    text = template_text(tokenizer)
    declared = getattr(tokenizer, "response_template", None)
    return ReplyFormat(
        parser=tokenizer if declared else None,
        harmony=all(marker in text for marker in _HARMONY),
        # One that only closes: the template cuts the thinking off, and leaves opening to the model.
        thinking=_named(_THINKING, text, by=1),
        answer=_named(_ANSWER, text, by=1),
        tool_calls=tuple(pair for pair in _TOOL_CALLS if pair[0] in text),
        bare_calls=bool(re.search(r'\{\s*\\?"name\\?":[^{}]*\\?"parameters\\?":', text)),
    )


def _named(pairs: Sequence[Pair], text: str, by: int) -> tuple[Pair, ...]:
    return tuple(pair for pair in pairs if pair[by] in text)
