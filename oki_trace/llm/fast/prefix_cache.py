"""Keeps the KV cache of a model's last reply, for a prompt that begins with the same tokens.

The next turn of a chat, a branch and a regenerated reply share a long beginning with the
reply before. The cache is cut back to that beginning, and only the tokens after it run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import DynamicCache

from oki_trace.llm.fast.kv_cache import PreallocatedLayer
from oki_trace.llm.transformers_internals import DynamicLayer, DynamicSlidingWindowLayer

# A shorter beginning, such as the first words of a chat template, takes no time to run.
MIN_SHARED = 8


class PrefixCache:
    """The tokens of one model's last reply, and their cache. Its user holds the model's lock."""

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._cache: Any = None

    def shared(self, prompt_ids: Sequence[int]) -> tuple[int, str | None]:
        """How many tokens of a prompt need not run; if none of a shared beginning, why.

        The last token of the prompt always runs, because it predicts the first one.
        """
        pairs = zip(self._ids, prompt_ids[:-1], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length < MIN_SHARED:
            return 0, None
        if self._cache is None:
            return 0, "the model's cache is of another kind than transformers' dynamic cache"
        if length < len(self._ids) and not all(map(_can_be_cut, self._cache.layers)):
            return 0, "the model's cache has a state or a window that cannot go back"
        return length, None

    def take(self, tokens: int) -> Any:
        """The cache of the first ``tokens`` tokens, which is the caller's from now on.

        None for 0: the next reply has no use for the cache, so its memory is free at once.
        """
        cache, removed = self._cache, len(self._ids) - tokens
        self.drop()
        if not tokens:
            return None
        if removed:
            cache.crop(-removed)
        return cache

    def keep(self, token_ids: Sequence[int], cache: Any) -> None:
        """Keep the cache of these tokens in place of the one before."""
        self._ids = tuple(token_ids)
        is_usable = (
            type(cache) is DynamicCache
            and not cache.offloading
            and cache.get_seq_length() == len(self._ids)
        )
        self._cache = cache if is_usable else None

    def drop(self) -> None:
        """Forget the tokens, and free the cache."""
        self._ids, self._cache = (), None


def _can_be_cut(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) in (DynamicLayer, PreallocatedLayer)
