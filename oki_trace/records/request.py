"""What is asked of a model: the words said so far, the model, the sampling, what to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral
from typing import Any, Literal, get_args

from oki_trace.errors import UsageError

TensorMode = Literal["exact", "half", "compact", "none"]
PartKind = Literal["thinking", "answer", "tool_call"]


# What apply_chat_template() takes for itself, or has from elsewhere.
_NOT_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("self", "kwargs"),
    }
)


class Role(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Status(StrEnum):
    """Where a message is in its life. User and system messages are born complete."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_live(self) -> bool:
        """Whether more steps may still come."""
        return self in (Status.QUEUED, Status.RUNNING)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(f"{sentence}.")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is picked, in the terms of transformers' ``generate()``.

    ``temperature`` of None or 0 is greedy. The others, when None, are left to
    the model's own generation config.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, Integral), f"{name} must be a whole number")
        _require(self.max_new_tokens >= 0, "max_new_tokens must be 0 or more")
        _require(
            self.temperature is None or 0 <= self.temperature < 100, "temperature must be 0 to 100"
        )
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1")
        _require(self.top_k is None or self.top_k >= 0, "top_k must be 0 (off) or more")
        _require(
            self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
            "repetition_penalty must be a number above 0 (1 is off)",
        )
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed must be 0 to 2^63 - 1")

    @property
    def is_greedy(self) -> bool:
        return not self.temperature


@dataclass(frozen=True, slots=True)
class CapturePolicy:
    """What is kept of every step.

    ``topk_*`` are numbers of entries: of the next-token distribution, of
    attended positions a layer, of tokens a lens layer. ``tensors``: "exact"
    keeps the full tensors in the model's own dtype, "half" as 16-bit floats,
    "compact" within stated bounds in about a fifth of the room of 32-bit
    floats, "none" keeps the rows alone.
    """

    topk_logits: int = 10
    topk_evidence: int = 10
    topk_lens: int = 5
    tensors: TensorMode = "half"

    def __post_init__(self) -> None:
        for name in ("topk_logits", "topk_evidence", "topk_lens"):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and 1 <= int(value) <= 1000
            _require(whole, f"{name} must be a whole number from 1 to 1000")
        modes = get_args(TensorMode)
        _require(self.tensors in modes, f"tensors must be one of {', '.join(modes)}")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, and how it is to be loaded."""

    model_id: str
    use_4bit: bool = False
    dtype: str = "auto"
    device: str = "auto"


MAX_NESTING = 50


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other deeper than any program here goes along."""
    level = [value]
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                inner.extend(one.values())
            elif isinstance(one, list | tuple):
                inner.extend(one)
        if not inner:
            return False
        level = inner
    return True


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a reply: its steps from ``start`` up to ``end``, the markers around it included.

    ``text`` is without the markers. A tool call has the tool's ``name`` and, where they
    can be read as JSON, its ``arguments``; ``text`` is then the call as it was written.
    """

    kind: PartKind
    text: str
    start: int = 0
    end: int = 0
    name: str | None = None
    arguments: Any = None


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What a chat template is given beside the messages.

    ``arguments`` by name, such as ``enable_thinking``; ``tools`` are JSON schemas of
    functions, as ``apply_chat_template`` takes them.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in self.arguments:
            _require(
                name.isidentifier() and name not in _NOT_ARGUMENTS,
                f"{name} is no argument of a chat template; those are names such as "
                "enable_thinking",
            )
        _require(
            not is_too_deep([self.arguments, *self.tools]),
            f"template arguments and tools must not be nested deeper than {MAX_NESTING} levels",
        )
        for tool in self.tools:
            made: Any = tool
            function = made.get("function") if isinstance(made, Mapping) else None
            named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
            _require(
                named,
                'Each tool must be {"type": "function", "function": {"name": …, "description": …, '
                '"parameters": …}}',
            )

    def __bool__(self) -> bool:
        return bool(self.arguments or self.tools)

    def over(self, earlier: TemplateOptions | None) -> TemplateOptions:
        """These over those of an earlier reply. A null takes an earlier argument back."""
        before = earlier or TemplateOptions()
        arguments = {**before.arguments, **self.arguments}
        return TemplateOptions(
            {name: value for name, value in arguments.items() if value is not None},
            self.tools or before.tools,
        )


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, as a chat template takes it.

    ``content`` of an assistant message is its answer alone; ``parts`` hold all of it,
    where that is known. ``tool_name``: the tool whose answer a tool message is.
    """

    role: Role
    content: str
    parts: tuple[Part, ...] = ()
    tool_name: str | None = None
