"""The request for a reply: the messages so far, the model, the sampling, what to capture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from numbers import Integral
from typing import Any, Literal, get_args

from oki_trace.errors import UsageError

TensorMode = Literal["exact", "half", "compact", "none"]
PromptTrace = Literal["light", "full"]
# The name of the Logit Lens, which needs no installation.
LOGIT = "logit"
# Layers of the Logit Lens: all, none, every:4, or numbers and ranges such as 0,8,16-29.
_LENS_LAYERS = re.compile(r"all|none|every:[1-9]\d{0,3}|\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_LENS_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# The ``parent_id`` of a message that follows none; ids begin at 1.
NO_PARENT = 0

PartKind = Literal["thinking", "answer", "tool_call"]

# Parameters of apply_chat_template() itself, and names that it sets.
_NOT_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("self", "kwargs"),
    }
)


class Role(StrEnum):
    """The author of a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Status(StrEnum):
    """The state of a message. Messages other than replies are always complete."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_live(self) -> bool:
        """Whether more steps may follow."""
        return self in (Status.QUEUED, Status.RUNNING)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(f"{sentence}.")


def is_lens_name(name: object) -> bool:
    """Whether a lens can have this name: an installed one, or the Logit Lens."""
    return isinstance(name, str) and _LENS_NAME.fullmatch(name) is not None


def require_lens_name(name: object) -> None:
    """Raise UsageError unless an installed lens can have this name."""
    _require(
        is_lens_name(name) and name != LOGIT,
        "a lens is named by up to 63 lower-case letters, digits, dots, hyphens and underscores, "
        f"begins with a letter or digit, and is not called {LOGIT}",
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, in the terms of transformers' ``generate()``.

    A ``temperature`` of None or 0 is greedy. The others, when None, are those of the
    model's generation config.
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
    """The data that is stored for every step.

    ``topk_logits``, ``topk_evidence`` and ``topk_lens`` are the numbers of candidates, of
    attended positions per layer, and of tokens per lens layer. ``tensors``: "exact"
    stores the full tensors in the model's dtype, "half" as 16-bit floats, "compact" with
    a bounded error in about a fifth of the space of 32-bit floats, "none" not at all.
    ``trace_prompt``: the tokens of the prompt become steps too, "light" with the best token
    of each lens layer and no full tensors, "full" like the reply's; None: they do not.
    ``no_lens``: the Logit Lens is not computed. ``lenses``: the installed lenses that read
    every step besides it. ``lens_layers``: the layers at which the Logit Lens reads given
    tokens, as ``all``, ``none``, ``every:4`` or ``0,8,16-29``; the last layer always too.
    None: all, but none under ``light`` if the prompt is so long that its lens would delay the
    reply.
    """

    topk_logits: int = 10
    topk_evidence: int = 10
    topk_lens: int = 5
    tensors: TensorMode = "half"
    trace_prompt: PromptTrace | None = None
    no_lens: bool = False
    lenses: tuple[str, ...] = ()
    lens_layers: str | None = None

    def __post_init__(self) -> None:
        for name in ("topk_logits", "topk_evidence", "topk_lens"):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and 1 <= int(value) <= 1000
            _require(whole, f"{name} must be a whole number from 1 to 1000")
        modes = get_args(TensorMode)
        _require(self.tensors in modes, f"tensors must be one of {', '.join(modes)}")
        levels = (None, *get_args(PromptTrace))
        _require(self.trace_prompt in levels, "trace_prompt must be light, full or None")
        for name in self.lenses:
            require_lens_name(name)
        _require(len(set(self.lenses)) == len(self.lenses), "lenses must not name one twice")
        _require(not (self.no_lens and self.lenses), "no_lens excludes lenses")
        spec: Any = self.lens_layers
        _require(
            spec is None or (isinstance(spec, str) and _LENS_LAYERS.fullmatch(spec) is not None),
            "lens_layers must be all, none, every:N or layers such as 0,8,16-29",
        )

    @property
    def for_prompt(self) -> CapturePolicy:
        """The data that is stored for the steps of the prompt."""
        policy = self
        if self.trace_prompt != "full":
            policy = replace(policy, topk_lens=1, tensors="none")
        if self.lens_layers == "none":
            policy = replace(policy, no_lens=True, lenses=())
        return policy

    @property
    def for_reply(self) -> CapturePolicy:
        """The data that is stored for generated steps."""
        return replace(self, lens_layers=None)

    def layers_read(self, layers: int) -> tuple[int, ...]:
        """The layers at which the Logit Lens reads a model with so many, in ascending order.

        Raises UsageError for one that the model does not have.
        """
        spec = self.lens_layers
        if spec is None or spec == "all":
            return tuple(range(layers + 1))
        if spec.startswith("every:"):
            every = int(spec.removeprefix("every:"))
            return tuple(sorted({*range(0, layers, every), layers}))
        chosen = {layers}
        for part in () if spec == "none" else spec.split(","):
            first, _, last = part.partition("-")
            chosen.update(range(int(first), int(last or first) + 1))
        if max(chosen) > layers:
            raise UsageError(
                f"The lens layers {spec} do not fit this model, whose layers are 0 to {layers}."
            )
        return tuple(sorted(chosen))


@dataclass(frozen=True, slots=True)
class Forced:
    """The tokens that the user chose for the first steps of a reply.

    ``token_ids``, or a ``text`` that the model's tokenizer splits into tokens.
    """

    token_ids: tuple[int, ...] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        one = bool(self.token_ids) != bool(self.text)
        _require(one, "Forced tokens are given by their ids or as a text, not both")
        _require(all(i >= 0 for i in self.token_ids), "a token id must be 0 or more")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to load, and how."""

    model_id: str
    use_4bit: bool = False
    dtype: str = "auto"
    device: str = "auto"


MAX_NESTING = 50


def is_too_deep(value: Any) -> bool:
    """Whether lists and mappings are nested deeper than MAX_NESTING levels."""
    level = [value]
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, list | tuple):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a reply: its steps from ``start`` up to ``end``, including its markers.

    ``text`` excludes the markers. A tool call has the ``name`` of the tool and, where they
    are valid JSON, its ``arguments``; its ``text`` is the call as the model wrote it.
    """

    kind: PartKind
    text: str
    start: int = 0
    end: int = 0
    name: str | None = None
    arguments: Any = None


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """The input of a chat template besides the messages.

    ``arguments`` by name, such as ``enable_thinking``; ``tools`` are JSON schemas of
    functions, in the form that ``apply_chat_template`` accepts.
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
            unchecked: Any = tool
            function = unchecked.get("function") if isinstance(unchecked, Mapping) else None
            _require(
                isinstance(function, Mapping) and isinstance(function.get("name"), str),
                'Each tool must be {"type": "function", "function": {"name": …, "description": …, '
                '"parameters": …}}',
            )

    def __bool__(self) -> bool:
        return bool(self.arguments or self.tools)

    def over(self, earlier: TemplateOptions | None) -> TemplateOptions:
        """These options added to those of an earlier reply; null removes an earlier argument."""
        before = earlier or TemplateOptions()
        arguments = {**before.arguments, **self.arguments}
        return TemplateOptions(
            {name: value for name, value in arguments.items() if value is not None},
            self.tools or before.tools,
        )


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, as the input of a chat template.

    The ``content`` of an assistant message is only its answer; ``parts`` are all of it,
    where they are known. ``tool_name``: the tool whose result a tool message holds.
    """

    role: Role
    content: str
    parts: tuple[Part, ...] = ()
    tool_name: str | None = None
