"""The options that several commands share, each with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oki_trace.records import CapturePolicy, ModelChoice, Sampling
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
Tensors = Annotated[str, typer.Option("--tensors", help="Full tensors kept: half, exact or none.")]
ConversationId = Annotated[
    int | None, typer.Option("--conversation", "-c", help="Go on with this conversation.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default="standard output", help="File to write."),
]

DEFAULT_TOKENS = 256


def store_of(db: str | None) -> str:
    """The store a command works on."""
    return db or Settings.from_environment().db


def choice_of(model: str | None, four_bit: bool, dtype: str, device: str) -> ModelChoice:
    """Which model a command loads, and how."""
    return ModelChoice(model or Settings.from_environment().model_id, four_bit, dtype, device)


def sampling_of(
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> Sampling:
    """The sampling settings of a command. Raises UsageError for values out of range."""
    return Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)


def policy_of(tensors: str) -> CapturePolicy:
    """What a command keeps of each step. Raises UsageError for an unknown mode."""
    return CapturePolicy(tensors=tensors)  # type: ignore[arg-type]
