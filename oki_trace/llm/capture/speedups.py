"""Decides which optional fast paths a model uses, and says why the others are off.

The only module that imports ``llm/fast``. ``OKI_TRACE_FAST=0`` switches all of
them off; tracing then takes longer and gives the same tokens and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure
from oki_trace.llm.decoding.forward_pass import DecodeGraph
from oki_trace.settings import Settings

if TYPE_CHECKING:
    from oki_trace.llm.fast.draft_lens import DraftLens
    from oki_trace.llm.fast.prefix_cache import PrefixCache

KV_CACHE = "preallocated KV cache"
STEP_GRAPH = "step graph"
PREPACKED = "prepacked weights"
DRAFT_LENS = "draft lens"
PREFIX_REUSE = "prefix reuse"


@dataclass(frozen=True)
class Speedups:
    """The fast paths of one model; ``off`` says why each is off, None where it is on."""

    off: dict[str, str | None]
    step_graph: DecodeGraph | None = None
    draft_lens: DraftLens | None = None
    prefix: PrefixCache | None = None
    are_off: bool = False

    def preallocate(self, cache: Any, new_tokens: int) -> None:
        """Let a cache grow in place by up to so many tokens."""
        preallocate(cache, new_tokens)

    def shared_prefix(self, prompt_ids: Sequence[int]) -> tuple[int, str | None]:
        """How many tokens of a prompt are in the cache of the last reply; see ``shared``."""
        return (0, None) if self.prefix is None else self.prefix.shared(prompt_ids)

    def take_prefix(self, tokens: int) -> Any:
        """The cache of the first ``tokens`` tokens of the last reply, no longer kept; 0: None."""
        return None if self.prefix is None else self.prefix.take(tokens)

    def keep_prefix(self, token_ids: Sequence[int], cache: Any) -> None:
        """Keep the cache of these tokens for the next reply."""
        if self.prefix is not None:
            self.prefix.keep(token_ids, cache)


def speedups(
    model: Any,
    structure: ModelStructure,
    hooks: ModelHooks,
    lens: LogitLens | None,
    draft_inputs: Sequence[Tensor],
) -> Speedups:
    """Set up the fast paths of a model, compared with the model itself.

    ``draft_inputs`` are hidden states (width,) of its inner layers, on which a draft of
    ``lens`` is compared; ``lens`` is None where it cannot be drafted.
    """
    reason = _reason_off()
    if reason is not None:
        names = (KV_CACHE, STEP_GRAPH, PREPACKED, DRAFT_LENS, PREFIX_REUSE)
        return Speedups(dict.fromkeys(names, reason), are_off=True)
    from oki_trace.llm.fast import draft_lens, prefix_cache, torchscript

    graph = draft = no_graph = no_draft = None
    try:
        graph = torchscript.trace_step(model, structure, hooks)
    except torchscript.NotTraceable as error:
        no_graph = str(error).splitlines()[0][:200]
    try:
        if lens is None:
            raise draft_lens.NoDraft("the lens runs the whole model, or there is none")
        draft = draft_lens.draft_lens(lens, structure, draft_inputs)
    except draft_lens.NoDraft as error:
        no_draft = str(error)
    off = {
        KV_CACHE: None,
        STEP_GRAPH: no_graph,
        PREPACKED: graph.not_prepacked if graph else "needs a step graph",
        DRAFT_LENS: no_draft,
        PREFIX_REUSE: None,
    }
    return Speedups(off, graph, draft, prefix_cache.PrefixCache())


def preallocate(cache: Any, new_tokens: int) -> None:
    """Let a cache grow in place by up to so many tokens, unless fast paths are off."""
    if not are_off():
        from oki_trace.llm.fast import kv_cache

        kv_cache.preallocate(cache, new_tokens)


def are_off() -> bool:
    """Whether this process uses no fast paths."""
    return _reason_off() is not None


def _reason_off() -> str | None:
    """Why this process uses no fast paths; None if it uses them."""
    if not Settings.from_environment().fast:
        return "switched off by OKI_TRACE_FAST"
    try:
        import oki_trace.llm.fast  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "oki_trace.llm.fast":
            raise
        return "the package oki_trace.llm.fast is missing"
    return None
