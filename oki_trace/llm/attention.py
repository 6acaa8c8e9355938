"""The attention of the newest position, at the price of the fused kernel.

Asking transformers for ``output_attentions`` forces eager attention, which
holds layers × heads × T × T weights. Only the newest position's row is
evidence, so an attention function is registered under the model's own key: it
calls the stock function and, for a module that is being watched, works out
that one row beside it. A model that runs eager attention anyway has its
weights read by a hook, and only the row is kept.

Which of the two is right for a model, and whether its weights are the eager
ones, is decided by comparing numbers once per load (``instrument.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rows = dict[int, Tensor]

_watched: dict[nn.Module, AttentionTap] = {}


class AttentionTap:
    """Collects, for one forward pass, the last query's weights of every layer.

    ``rows`` maps a layer's number to (heads, keys) in fp32. Keys are in the
    order of positions and end at the newest one.
    """

    def __init__(self, layer_of: Mapping[nn.Module, int], implementation: str) -> None:
        self._layer_of = dict(layer_of)
        self._seen: set[nn.Module] = set()
        self.implementation = implementation
        self.rows: Rows = {}

    def take(self) -> Rows:
        """The rows of the forward pass just done, by layer; the tap is empty afterwards."""
        rows, self.rows = self.rows, {}
        return dict(sorted(rows.items()))

    def keep(self, module: nn.Module, row: Tensor) -> None:
        """Called by the attention function or the hook with (heads, keys)."""
        layer = self._layer_of.get(module)
        if layer is not None:
            self._seen.add(module)
            self.rows[layer] = row.float()

    def forget_idle_modules(self) -> None:
        """Watch only the modules that gave weights so far: a hook on every module costs time."""
        self._layer_of = {m: layer for m, layer in self._layer_of.items() if m in self._seen}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model's attention while this context lasts."""
        if self.implementation == "eager":
            handles = [m.register_forward_hook(self._read_output) for m in self._layer_of]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            return
        _wrap(self.implementation)
        _watched.update(dict.fromkeys(self._layer_of, self))
        try:
            yield
        finally:
            for module in self._layer_of:
                _watched.pop(module, None)

    def _read_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the weights an attention module returns beside its output: (1, heads, T, keys)."""
        if isinstance(output, tuple) and not isinstance(module, nn.ModuleList):
            for value in output[1:]:
                if isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == 1:
                    self.keep(module, value[0, :, -1])
                    return


def _wrap(implementation: str) -> None:
    """Register the watching function under the stock function's own key, once."""
    stock = ALL_ATTENTION_FUNCTIONS[implementation]
    if not getattr(stock, "watches_attention", False):
        AttentionInterface.register(implementation, _watching(stock))


def _watching(stock: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tap = _watched.get(module)
        if tap is not None:
            scaling = kwargs.get("scaling")
            tap.keep(module, last_row(query, key, attention_mask, scaling))
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    attention.watches_attention = True  # type: ignore[attr-defined]
    return attention


@torch.no_grad()
def last_row(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """softmax(q Kᵀ · scaling + mask) for the last query: (heads, keys) in fp32.

    ``query`` (1, heads, T, d), ``key`` (1, kv heads, keys, d); each key head
    serves a run of consecutive query heads. ``mask`` is boolean or additive,
    (1, 1 or heads, T, keys).
    """
    groups, keys, width = key.shape[1], key.shape[2], key.shape[3]
    rows = query[0, :, -1].reshape(groups, -1, width)
    scores = torch.matmul(rows, key[0].transpose(1, 2)).float()
    scores *= width**-0.5 if scaling is None else scaling
    scores = scores.reshape(-1, keys)
    if mask is not None:
        row = mask[0, :, -1, :keys]
        scores = (
            scores.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else scores + row
        )
    return scores.softmax(-1)
