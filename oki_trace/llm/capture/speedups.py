"""Which of the optional fast paths one model uses, and why not.

The only module that imports ``llm/fast``. ``OKI_TRACE_FAST=0`` switches all of
them off; tracing then takes longer and gives the same tokens and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LensProjection, LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure
from oki_trace.llm.decoding.forward_pass import DecodeGraph
from oki_trace.settings import Settings

KV_CACHE = "preallocated KV cache"
STEP_GRAPH = "step graph"
PREPACKED = "prepacked weights"
DRAFT_LENS = "draft lens"


class DraftOfLens(Protocol):
    """A cheaper projection than the lens's own; ``error`` is the |Δprob| measured at load."""

    @property
    def error(self) -> float: ...

    @property
    def max_top_k(self) -> int:
        """The most tokens per layer that are exact."""

    def projection(self) -> LensProjection:
        """The projection for one reply."""


@dataclass(frozen=True)
class Speedups:
    """The fast paths of one model; ``off`` has for each the reason why it is off, None if on."""

    off: dict[str, str | None]
    step_graph: DecodeGraph | None = None
    draft_lens: DraftOfLens | None = None
    are_off: bool = False

    def preallocate(self, cache: Any, new_tokens: int) -> None:
        """Let a cache grow in place by up to so many tokens."""
        preallocate(cache, new_tokens)


def speedups(
    model: Any,
    structure: ModelStructure,
    hooks: ModelHooks,
    lens: LogitLens | None,
    hidden: Sequence[Tensor],
) -> Speedups:
    """Set up the fast paths of a model, compared with the model itself.

    ``hidden`` are streams (width,) of its inner layers, for the draft of ``lens``
    (None: a lens that is not drafted).
    """
    off = _off()
    if off is not None:
        names = (KV_CACHE, STEP_GRAPH, PREPACKED, DRAFT_LENS)
        return Speedups(dict.fromkeys(names, off), are_off=True)
    from oki_trace.llm.fast import draft_lens, torchscript

    graph = draft = None
    try:
        graph = torchscript.trace_step(model, structure, hooks)
        no_graph, not_prepacked = None, graph.not_prepacked
    except torchscript.NotTraceable as reason:
        no_graph, not_prepacked = str(reason), "needs a step graph"
    try:
        if lens is None:
            raise draft_lens.NoDraft("the lens runs the whole model, or there is none")
        draft, no_draft = draft_lens.draft_lens(lens, structure, hidden), None
    except draft_lens.NoDraft as reason:
        no_draft = str(reason)
    return Speedups(
        {
            KV_CACHE: None,
            STEP_GRAPH: _one_line(no_graph),
            PREPACKED: not_prepacked,
            DRAFT_LENS: no_draft,
        },
        graph,
        draft,
    )


def preallocate(cache: Any, new_tokens: int) -> None:
    """Let a cache grow in place by up to so many tokens, unless fast paths are off."""
    if _off() is None:
        from oki_trace.llm.fast import kv_cache

        kv_cache.preallocate(cache, new_tokens)


def are_off() -> bool:
    """Whether this process uses no fast paths."""
    return _off() is not None


def _off() -> str | None:
    """Why there are no fast paths in this process; None where there are."""
    if not Settings.from_environment().fast:
        return "switched off by OKI_TRACE_FAST"
    try:
        import oki_trace.llm.fast  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "oki_trace.llm.fast":
            raise
        return "the package oki_trace.llm.fast is missing"
    return None


def _one_line(reason: str | None) -> str | None:
    return None if reason is None else reason.splitlines()[0][:200]
