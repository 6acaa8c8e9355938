"""The options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from oki_trace.errors import UsageError
from oki_trace.records import (
    CapturePolicy,
    ModelChoice,
    PromptTrace,
    Sampling,
    TemplateOptions,
    TensorMode,
)
from oki_trace.settings import Settings


def _switch_fast_paths_off(value: bool) -> bool:
    if value:
        os.environ["OKI_TRACE_FAST"] = "0"
    return value


Db = Annotated[
    str | None,
    typer.Option(metavar="PATH_OR_URL", show_default="$OKI_TRACE_DB", help="The store."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Number = Annotated[int, typer.Argument(help="A conversation's number, from oki-trace list.")]
MessageId = Annotated[int | None, typer.Option("--message", help="Only this message.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default="standard output", help="The file to write."),
]
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
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Tensors = Annotated[
    str, typer.Option(help=f"How full tensors are stored: {', '.join(get_args(TensorMode))}.")
]
NoFast = Annotated[
    bool,
    typer.Option(
        "--no-fast",
        callback=_switch_fast_paths_off,
        help="Turn off the optional fast paths. Results are the same, but take longer.",
    ),
]
TracePrompt = Annotated[
    str,
    typer.Option(
        help="How the prompt's tokens are traced: light (no full tensors, one lens token per "
        "layer), full or none."
    ),
]
LensLayers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        show_default="all, or none of a long prompt",
        help="Layers at which the Logit Lens reads given tokens: all, none, every:4, or a list "
        "such as 0,8,16-29. Fewer take less time; the last one is always there.",
    ),
]
Lenses = Annotated[
    list[str] | None,
    typer.Option(
        "--lens",
        metavar="NAME",
        help="Also read every step with this installed lens. May be given several times.",
    ),
]
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
    """The store's name without a password."""
    from oki_trace.store.schema import identity

    url = identity.address(db)
    return db if identity.file_of(url) else identity.shown(url)


def choice_of(model: str | None, four_bit: bool, dtype: str, device: str) -> ModelChoice:
    """The model that a command loads, and how."""
    return ModelChoice(model or Settings.from_environment().model_id, four_bit, dtype, device)


def policy_of(
    tensors: str,
    trace_prompt: str = "none",
    lens_layers: str | None = None,
    lenses: Sequence[str] | None = None,
) -> CapturePolicy:
    """The data that a command stores for each step.

    Raises UsageError for an unknown mode, and for a lens that is not installed.
    """
    if trace_prompt not in (levels := ("none", *get_args(PromptTrace))):
        raise UsageError(f"--trace-prompt must be one of {', '.join(levels)}.")
    level: Any = None if trace_prompt == "none" else trace_prompt
    mode: Any = tensors
    names: tuple[str, ...] = ()
    if lenses:
        from oki_trace.llm.lenses.library import require_installed

        names = require_installed(lenses)
    return CapturePolicy(tensors=mode, trace_prompt=level, lens_layers=lens_layers, lenses=names)


@dataclass(frozen=True)
class Turns:
    """The options of ``run`` and ``chat``: the model, the conversation, the sampling."""

    model: Model = None
    conversation: Annotated[
        int | None,
        typer.Option("--conversation", "-c", help="Continue this conversation with its model."),
    ] = None
    system: Annotated[str | None, typer.Option(help="The system message.")] = None
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Maximum number of new tokens.")] = 256
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature. Without it, decoding is greedy.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling: the total probability to keep.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Values above 1 discourage repetition.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling; the same seed gives the same tokens.")
    ] = None
    four_bit: FourBit = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    tensors: Tensors = "half"
    trace_prompt: TracePrompt = "light"
    lens_layers: LensLayers = None
    lens: Lenses = None
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A chat template argument, such as enable_thinking=false. Later turns keep it.",
        ),
    ] = None
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tool schemas in JSON. Calls are shown, never executed."),
    ] = None
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

    def policy(self) -> CapturePolicy:
        """The data that is stored for each step; see ``policy_of``."""
        return policy_of(self.tensors, self.trace_prompt, self.lens_layers, self.lens)

    def sampling(self) -> Sampling:
        """The sampling settings. Raises UsageError for values out of range."""
        limits = (self.temperature, self.top_p, self.top_k, self.repetition_penalty)
        return Sampling(self.max_new_tokens, *limits, self.seed)


def with_turns(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``turns`` of a command by one option per field of ``Turns``."""
    fields = inspect.signature(Turns, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters += fields.values() if name == "turns" else [parameter]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        command(turns=Turns(**{name: values.pop(name) for name in fields}), **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature([p.replace(kind=keyword) for p in parameters])
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return wrapped
