"""The options that several commands share, each with one meaning."""

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
    int, typer.Option("--max-new-tokens", min=0, help="The most tokens of one reply.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Sample; without it the reply is greedy.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample among the k most likely.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed, the same tokens.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 repeats less.")
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
        help="Without the optional fast paths: the same numbers, slower.",
    ),
]
Tensors = Annotated[
    str, typer.Option("--tensors", help=f"Full tensors kept: {', '.join(get_args(TensorMode))}.")
]
ConversationId = Annotated[
    int | None,
    typer.Option("--conversation", "-c", help="Go on with this conversation, and its model."),
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="KEY=VALUE",
        help="For the chat template, such as enable_thinking=false. Kept for the next turns.",
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
    typer.Option("--output", "-o", show_default="standard output", help="File to write."),
]

DEFAULT_TOKENS = 256
# What SQLite keeps beside the store's name.
_STORE_FILES = ("", "-wal", "-shm")


def store_of(db: str | None) -> str:
    """The store a command works on."""
    return db or Settings.from_environment().db


def not_the_store(path: Path, db: str) -> Path:
    """``path``, unless it is a file of the store: to read or replace that would damage it.

    Raises UsageError then.
    """
    from oki_trace.store.schema import identity

    file = identity.file_of(identity.address(db))
    files = [] if file is None else [file.with_name(file.name + end) for end in _STORE_FILES]
    if any(one.exists() and path.exists() and path.samefile(one) for one in files):
        raise UsageError(f"{path} is the store itself: give another path.")
    return path


def shown(db: str) -> str:
    """The store's name for the terminal: without its password, and inert."""
    from oki_trace.cli.output import inert
    from oki_trace.store.schema import identity

    url = identity.address(db)
    return inert(db if identity.file_of(url) else identity.shown(url), keep="")


def choice_of(model: str | None, four_bit: bool, dtype: str, device: str) -> ModelChoice:
    """Which model a command loads, and how."""
    return ModelChoice(model or Settings.from_environment().model_id, four_bit, dtype, device)


def policy_of(tensors: str) -> CapturePolicy:
    """What a command keeps of each step. Raises UsageError for an unknown mode."""
    return CapturePolicy(tensors=tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Turns:
    """What ``run`` and ``chat`` have in common: the model, the conversation, the sampling."""

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
        """Which model; without ``--model`` the conversation's ``last``, loaded as it was then."""
        if self.model is not None or last is None:
            return choice_of(self.model, self.four_bit, self.dtype, self.device)
        return ModelChoice(
            last.model_id,
            use_4bit=self.four_bit or last.use_4bit,
            dtype=last.dtype if self.dtype == "auto" else self.dtype,
            device=last.device if self.device == "auto" else self.device,
        )

    def template(self) -> TemplateOptions:
        """Raises UsageError for what cannot be read."""
        from oki_trace.template_options import options_from, read_tools

        schemas = read_tools(self.tools) if self.tools is not None else ()
        return options_from(self.template_arg or (), schemas)

    def sampling(self) -> Sampling:
        """Raises UsageError for values out of range."""
        return Sampling(
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            self.repetition_penalty,
            self.seed,
        )


def with_turns(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its parameter ``turns`` given as options, a field of ``Turns`` each."""
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
    def wrapped(**given: Any) -> None:
        turns = Turns(**{name: given.pop(name) for name in grouped})
        command(turns=turns, **given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        expanded = grouped.values() if name == "turns" else [parameter]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in expanded]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapped
