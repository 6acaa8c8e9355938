"""The attention of the newest position, at the price of the fused kernel.

Asking transformers for ``output_attentions`` forces eager attention, which holds
layers × heads × T × T weights; a trace needs only the row of the newest position.
There are three taps for it. ``checks.py`` compares them with the model's own eager
attention, once per load, and takes the first that agrees:

- ``KernelTap`` registers an attention function under the model's own key, which calls
  the stock function and computes that row from the same arguments, or keeps the
  arguments where they stay in memory anyway.
- ``HookedTap`` is for a model that runs eager attention anyway: hooks read the row.
- ``OutputAttentionsTap`` works with any model that can return its attentions: all but
  the last token of the prompt run through the fused kernel, and each later step runs
  with ``output_attentions``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from oki_trace.llm.capture.buffers import BufferPool, is_persistent
from oki_trace.llm.decoding.forward_pass import AttentionCapture, LastQuery
from oki_trace.llm.transformers_internals import (
    ALL_ATTENTION_FUNCTIONS,
    attention_configs,
    eager_attention,
)

log = logging.getLogger(__name__)

AttentionRows = dict[int, Tensor]
"""(heads, keys) in float32 by layer, the keys in order of position, the newest last."""


def attention_rows(capture: AttentionCapture) -> AttentionRows:
    """The captured rows, each computed where only its inputs were kept."""
    return {layer: _row(captured) for layer, captured in capture.items()}


def _row(captured: Tensor | LastQuery) -> Tensor:
    return captured.row() if isinstance(captured, LastQuery) else captured


class AttentionTap(Protocol):
    """A way to read the attention weights of the last query, one forward pass at a time."""

    splits_prompt: bool
    """Whether the prompt's last token must run through the model by itself."""

    def attach(self) -> AbstractContextManager[None]:
        """Capture while this context lasts."""

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        """Around a forward pass whose rows are needed; yields extra arguments for the model."""

    def take(self, outputs: Any) -> AttentionCapture:
        """The attention of the pass that returned ``outputs``; empties the tap."""


class _ModuleTap:
    """Collects rows from attention modules while the model runs."""

    splits_prompt = False

    def __init__(self, layer_of: Mapping[nn.Module, int]) -> None:
        """``layer_of``: the modules to read, with the layer that each belongs to."""
        self._layer_of = dict(layer_of)
        self._captured: dict[nn.Module, Tensor | LastQuery] = {}

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        return nullcontext({})

    def take(self, outputs: Any) -> AttentionCapture:
        captured, self._captured = self._captured, {}
        by_layer: dict[int, list[Tensor | LastQuery]] = {}
        for module, row in captured.items():
            by_layer.setdefault(self._layer_of[module], []).append(row)
        # Where a layer attends more than once, the heads of all its modules follow each other.
        return {
            layer: rows[0] if len(rows) == 1 else torch.cat([_row(row) for row in rows])
            for layer, rows in sorted(by_layer.items())
        }

    def select_modules(self, keys: int) -> None:
        """From now on, read only the modules whose last row had ``keys`` keys.

        The others returned no weights (a hook on each costs time), something else of
        that shape, or the weights of a module inside them.
        """
        with_keys = {m for m, row in self._captured.items() if _row(row).shape[1] == keys}
        innermost = {m for m in with_keys if with_keys.isdisjoint(set(m.modules()) - {m})}
        self._captured = {m: row for m, row in self._captured.items() if m in innermost}
        self._layer_of = {m: self._layer_of[m] for m in self._captured}


_taps: dict[nn.Module, KernelTap] = {}


class KernelTap(_ModuleTap):
    """Computes the row from the arguments of the fused kernel."""

    def __init__(self, layer_of: Mapping[nn.Module, int], implementation: str) -> None:
        super().__init__(layer_of)
        self._implementation = implementation
        self._pool = BufferPool(0)

    @contextmanager
    def attach(self) -> Iterator[None]:
        _wrap_kernel(self._implementation)
        self._pool = BufferPool(len(self._layer_of))
        _taps.update(dict.fromkeys(self._layer_of, self))
        try:
            yield
        finally:
            for module in self._layer_of:
                _taps.pop(module, None)
            # A pass that failed may have left rows, which would keep the whole cache alive.
            self._captured, self._pool = {}, BufferPool(0)

    def keep(self, module: nn.Module, query: Tensor, key: Tensor, last: LastQuery) -> None:
        """Keep the row ``last`` of a kernel call with ``query`` and ``key``."""
        if module in self._layer_of:
            inputs_persist = query.shape[2] == 1 and is_persistent(key)
            self._captured[module] = last if inputs_persist else self._pool.copy(last.row())


class HookedTap(_ModuleTap):
    """Reads the weights that eager attention modules return after their output."""

    @contextmanager
    def attach(self) -> Iterator[None]:
        handles = [m.register_forward_hook(self._read_output) for m in self._layer_of]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            for value in output[1:]:
                if isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == 1:
                    self._captured[module] = value[0, :, -1].float()
                    return


class OutputAttentionsTap:
    """Runs the model with ``output_attentions``, on one query at a time.

    ``layers`` maps the index in the model's ``attentions`` to the layer's number. The
    prompt cannot be split for a model without a cache: every pass then holds all weights.
    """

    def __init__(self, model: Any, layers: Mapping[int, int], *, has_cache: bool) -> None:
        self._configs = attention_configs(model)
        self._layers = layers
        self.splits_prompt = has_cache

    def attach(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def forward_arguments(self) -> Iterator[dict[str, Any]]:
        with eager_attention(self._configs):
            yield {"output_attentions": True}

    def take(self, outputs: Any) -> AttentionCapture:
        rows = last_rows(outputs)
        by_layer = ((layer, rows[index]) for index, layer in self._layers.items())
        return {layer: row for layer, row in by_layer if row is not None}


def last_rows(outputs: Any, queries: int | None = None) -> list[Tensor | None]:
    """The last query's weights, (heads, keys) in float32, by index in ``outputs.attentions``.

    None where the tensor is no attention weights, or not those of ``queries`` queries:
    linear attention may return its state.
    """
    return [
        weights[0, :, -1].float()
        if weights.ndim == 4 and queries in (None, weights.shape[2])
        else None
        for weights in getattr(outputs, "attentions", None) or ()
        if isinstance(weights, Tensor)
    ]


def _wrap_kernel(implementation: str) -> None:
    """Register the capturing function under the stock function's own key, once.

    With the same key, the masks and every branch that depends on the name stay the same.
    """
    stock = ALL_ATTENTION_FUNCTIONS[implementation]
    if not getattr(stock, "captures_attention", False):
        top_left = implementation == "sdpa"
        AttentionInterface.register(implementation, _capturing_kernel(stock, top_left=top_left))


def _capturing_kernel(stock: Callable[..., Any], *, top_left: bool) -> Callable[..., Any]:
    """``top_left``: without a mask, query i attends to the keys up to i, however many there are."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tap = _taps.get(module)
        if tap is not None:
            try:
                keys = key
                if top_left and attention_mask is None and query.shape[2] > 1:
                    # A cache of fixed length has slots for later tokens.
                    keys = key[:, :, : query.shape[2]]
                last = last_query(
                    query,
                    keys,
                    attention_mask,
                    kwargs.get("scaling"),
                    kwargs.get("position_bias"),
                    kwargs.get("sliding_window"),
                )
                tap.keep(module, query, keys, last)
            except Exception as error:  # a kernel's arguments can be anything; the turn goes on
                log.debug("no attention of %s: %s", type(module).__name__, error)
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    attention.captures_attention = True  # type: ignore[attr-defined]
    return attention


def last_query(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    bias: Tensor | None = None,
    window: int | None = None,
) -> LastQuery:
    """The inputs of the last query's row, from an attention function's arguments.

    ``query`` (1, heads, T, d), ``key`` (1, kv heads, keys, d), ``mask`` and ``bias``
    (1, 1 or heads, T, keys). For kernels with the contract of flash attention, ``mask``
    is None or covers the keys alone, (1, keys), and only the last ``window`` keys are
    attended to. Raises TypeError for a mask that is no tensor.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"a mask of the type {type(mask).__name__} cannot be read")
    groups, keys, width = key.shape[1], key.shape[2], key.shape[3]
    if mask is None or mask.ndim == 2:
        last_mask = None if mask is None else mask[:, -keys:].bool()
        if window is not None and window < keys:
            in_window = torch.arange(keys, device=key.device)[None] >= keys - window
            last_mask = in_window if last_mask is None else last_mask & in_window
    else:
        last_mask = mask[0, :, -1, :keys]
    return LastQuery(
        query=query[0, :, -1].reshape(groups, -1, width),
        key=key[0],
        scaling=width**-0.5 if scaling is None else scaling,
        bias=None if bias is None else bias[0, :, -1, :keys],
        mask=last_mask,
    )
