"""The options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from oki_trace.errors import UsageError
from oki_trace.records import (
    CapturePolicy,
    ModelChoice,
    Sampling,
    TemplateOptions,
    TensorMode,
)
from oki_trace.settings import Settings

Db = Annotated[
    str | None,
    typer.Option("--db", metavar="PATH_OR_URL", show_default="$OKI_TRACE_DB", help="The store."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        show_default="$OKI_TRACE_MODEL",
        help="Hugging Face id, folder, .gguf file, or smollm2.",
    ),
]
FourBit = Annotated[bool, typer.Option("--4bit", help="Load the weights in 4-bit.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
System = Annotated[str | None, typer.Option("--system", help="The system message.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=0, help="The most tokens in a reply.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="Sample; without it, decoding is greedy."),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Nucleus sampling: the probability to keep.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from the k most likely tokens.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same tokens.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1, repetition is less likely.")
]


def _switch_fast_paths_off(value: bool) -> bool:
    if value:
        os.environ["OKI_TRACE_FAST"] = "0"
    return value


NoFast = Annotated[
    bool,
    typer.Option(
        "--no-fast",
        callback=_switch_fast_paths_off,
        help="Turn the optional fast paths off: the same numbers, slower.",
    ),
]
Tensors = Annotated[
    str,
    typer.Option("--tensors", help=f"Storage of full tensors: {', '.join(get_args(TensorMode))}."),
]
ConversationId = Annotated[
    int | None,
    typer.Option("--conversation", "-c", help="Continue this conversation, with its model."),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="KEY=VALUE",
        help="For the chat template, such as enable_thinking=false; also for later turns.",
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(
        "--tools", metavar="FILE", help="Tool schemas in JSON; calls are shown, never executed."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default="standard output", help="The file to write."),
]

DEFAULT_TOKENS = 256
# Suffixes of the files of an SQLite store.
_STORE_FILES = ("", "-wal", "-shm")


def store_of(db: str | None) -> str:
    """The store a command works on."""
    return db or Settings.from_environment().db


def not_the_store(path: Path, db: str) -> Path:
    """Return ``path``. Raises UsageError if it is a file of the store, which it would damage."""
    from oki_trace.store.schema import identity

    file = identity.file_of(identity.address(db))
    files = [] if file is None else [file.with_name(file.name + end) for end in _STORE_FILES]
    if any(one.exists() and path.exists() and path.samefile(one) for one in files):
        raise UsageError(f"{path} is the store itself. Give another path.")
    return path


def shown(db: str) -> str:
    """The store's name for the terminal, without a password."""
    from oki_trace.sanitize import inert
    from oki_trace.store.schema import identity

    url = identity.address(db)
    return inert(db if identity.file_of(url) else identity.shown(url), keep="")


def choice_of(model: str | None, four_bit: bool, dtype: str, device: str) -> ModelChoice:
    """The model that a command loads, and how."""
    return ModelChoice(model or Settings.from_environment().model_id, four_bit, dtype, device)


def policy_of(tensors: str) -> CapturePolicy:
    """What a command stores of each step. Raises UsageError for an unknown mode."""
    return CapturePolicy(tensors=tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Turns:
    """The options of ``run`` and ``chat``: the model, the conversation, the sampling."""

    model: Model = None
    conversation: ConversationId = None
    system: System = None
    max_new_tokens: MaxNewTokens = DEFAULT_TOKENS
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    four_bit: FourBit = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    tensors: Tensors = "half"
    template_arg: TemplateArg = None
    tools: Tools = None
    no_fast: NoFast = False
    db: Db = None

    def choice(self, last: ModelChoice | None) -> ModelChoice:
        """The model; without ``--model`` the conversation's ``last``, loaded as it was then."""
        if self.model is not None or last is None:
            return choice_of(self.model, self.four_bit, self.dtype, self.device)
        return ModelChoice(
            last.model_id,
            use_4bit=self.four_bit or last.use_4bit,
            dtype=last.dtype if self.dtype == "auto" else self.dtype,
            device=last.device if self.device == "auto" else self.device,
        )

    def template(self) -> TemplateOptions:
        """The options for the chat template. Raises UsageError for invalid ones."""
        from oki_trace.template_options import options_from, read_tools

        schemas = read_tools(self.tools) if self.tools is not None else ()
        return options_from(self.template_arg or (), schemas)

    def sampling(self) -> Sampling:
        """The sampling settings. Raises UsageError for values out of range."""
        return Sampling(
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            self.repetition_penalty,
            self.seed,
        )


def with_turns(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``turns`` of a command by one option per field of ``Turns``."""
    own = inspect.signature(command, eval_str=True).parameters
    hints = get_type_hints(Turns, include_extras=True)
    grouped = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(Turns)
    }

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        turns = Turns(**{name: values.pop(name) for name in grouped})
        command(turns=turns, **values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        expanded = grouped.values() if name == "turns" else [parameter]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in expanded]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapped
