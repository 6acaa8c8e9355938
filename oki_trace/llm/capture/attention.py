"""Captures the attention of the newest position, or of every position.

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

``attach(every_query=...)`` captures a row for every query of a pass (``QueryRows``): for
given text, in chunks short enough for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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

QueryRows = dict[int, Tensor]
"""(queries, heads, keys) in float32 by layer; one head, their mean, if only that was captured."""

EveryQuery = Literal["mean", "heads"]
"""The weights that are kept of every query: their mean over heads, or every head."""


def attention_rows(capture: AttentionCapture) -> AttentionRows:
    """The captured rows; a row of which only the inputs were kept is computed here."""
    return {layer: _row(captured) for layer, captured in capture.items()}


def _row(captured: Tensor | LastQuery) -> Tensor:
    return captured.row() if isinstance(captured, LastQuery) else captured


class AttentionTap(Protocol):
    """A way to read the attention weights of the last query, one forward pass at a time."""

    splits_prompt: bool
    """Whether the prompt's last token must run through the model by itself."""

    def attach(self, every_query: EveryQuery | None = None) -> AbstractContextManager[None]:
        """Capture while this context lasts: the last query of each pass, or every query."""

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        """Around a forward pass whose rows are needed; yields extra arguments for the model."""

    def take(self, outputs: Any) -> AttentionCapture:
        """The attention of the pass that returned ``outputs``; empties the tap."""

    def take_every_query(self, outputs: Any) -> QueryRows:
        """The same for all queries of the pass."""


class _ModuleTap:
    """Collects rows from attention modules while the model runs."""

    splits_prompt = False

    def __init__(self, layer_of: Mapping[nn.Module, int]) -> None:
        """``layer_of``: the modules to read, with the layer that each belongs to."""
        self._layer_of = dict(layer_of)
        self._captured: dict[nn.Module, Tensor | LastQuery] = {}
        self._every_query: EveryQuery | None = None
        self._rows: dict[nn.Module, Tensor] = {}

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

    def take_every_query(self, outputs: Any) -> QueryRows:
        captured, self._rows = self._rows, {}
        by_layer: dict[int, list[Tensor]] = {}
        for module, rows in captured.items():
            by_layer.setdefault(self._layer_of[module], []).append(rows)
        return {
            layer: rows[0] if len(rows) == 1 else torch.cat(rows, 1)
            for layer, rows in sorted(by_layer.items())
        }

    def _keep_every_query(self, module: nn.Module, weights: Tensor) -> None:
        """Keep the weights (heads, queries, keys) of a module's pass."""
        if self._every_query == "mean":
            self._rows[module] = weights.mean(0)[:, None]
        else:
            self._rows[module] = weights.transpose(0, 1).contiguous()

    @contextmanager
    def _capturing(self, every_query: EveryQuery | None) -> Iterator[None]:
        self._every_query = every_query
        try:
            yield
        finally:
            self._every_query = None
            # A pass that failed may have left rows, which would keep the whole cache alive.
            self._captured, self._rows = {}, {}

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
    def attach(self, every_query: EveryQuery | None = None) -> Iterator[None]:
        _wrap_kernel(self._implementation)
        self._pool = BufferPool(len(self._layer_of))
        _taps.update(dict.fromkeys(self._layer_of, self))
        try:
            with self._capturing(every_query):
                yield
        finally:
            for module in self._layer_of:
                _taps.pop(module, None)
            self._pool = BufferPool(0)

    def keep(self, module: nn.Module, call: KernelCall) -> None:
        """Keep the row of the last query of a kernel call, or the rows of all its queries."""
        if module not in self._layer_of:
            return
        if self._every_query is not None:
            self._keep_every_query(module, call.weights())
            return
        inputs_persist = call.query.shape[2] == 1 and is_persistent(call.key)
        last = call.last_query()
        self._captured[module] = last if inputs_persist else self._pool.copy(last.row())


class HookedTap(_ModuleTap):
    """Reads the weights that eager attention modules return after their output."""

    @contextmanager
    def attach(self, every_query: EveryQuery | None = None) -> Iterator[None]:
        handles = [m.register_forward_hook(self._read_output) for m in self._layer_of]
        try:
            with self._capturing(every_query):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            for value in output[1:]:
                if isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == 1:
                    if self._every_query is not None:
                        self._keep_every_query(module, value[0].float())
                    else:
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
        self._mean = False
        self.splits_prompt = has_cache

    @contextmanager
    def attach(self, every_query: EveryQuery | None = None) -> Iterator[None]:
        self._mean = every_query == "mean"
        yield

    @contextmanager
    def forward_arguments(self) -> Iterator[dict[str, Any]]:
        with eager_attention(self._configs):
            yield {"output_attentions": True}

    def take(self, outputs: Any) -> AttentionCapture:
        rows = last_rows(outputs)
        by_layer = ((layer, rows[index]) for index, layer in self._layers.items())
        return {layer: row for layer, row in by_layer if row is not None}

    def take_every_query(self, outputs: Any) -> QueryRows:
        weights = [w for w in outputs.attentions or () if isinstance(w, Tensor)]
        return {
            layer: (weights[index].mean(1) if self._mean else weights[index][0].transpose(0, 1))
            .float()
            .reshape(weights[index].shape[2], -1, weights[index].shape[3])
            for index, layer in self._layers.items()
        }


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
                call = KernelCall(
                    query,
                    keys,
                    attention_mask,
                    kwargs.get("scaling"),
                    kwargs.get("position_bias"),
                    kwargs.get("sliding_window"),
                )
                tap.keep(module, call)
            except Exception as error:  # a kernel's arguments can be anything; the turn goes on
                log.debug("no attention of %s: %s", type(module).__name__, error)
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    attention.captures_attention = True  # type: ignore[attr-defined]
    return attention


@dataclass(frozen=True)
class KernelCall:
    """The arguments of an attention function that decide its weights.

    ``query`` (1, heads, T, d), ``key`` (1, kv heads, keys, d), ``mask`` and ``bias``
    (1, 1 or heads, T, keys). Without such a mask, query i of T attends to the keys up to
    ``keys - T + i``: for kernels with the contract of flash attention, ``mask`` is None or
    covers the keys alone, (1, keys), and only the last ``window`` keys are attended to.
    Raises TypeError for a mask that is no tensor.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float | None
    bias: Tensor | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise TypeError(f"a mask of the type {type(self.mask).__name__} cannot be read")

    @property
    def _scaling(self) -> float:
        return self.key.shape[3] ** -0.5 if self.scaling is None else self.scaling

    def last_query(self) -> LastQuery:
        """The inputs of the last query's row."""
        groups, keys, width = self.key.shape[1], self.key.shape[2], self.key.shape[3]
        mask, window = self.mask, self.window
        if mask is None or mask.ndim == 2:
            last_mask = None if mask is None else mask[:, -keys:].bool()
            if window is not None and window < keys:
                in_window = torch.arange(keys, device=self.key.device)[None] >= keys - window
                last_mask = in_window if last_mask is None else last_mask & in_window
        else:
            last_mask = mask[0, :, -1, :keys]
        return LastQuery(
            query=self.query[0, :, -1].reshape(groups, -1, width),
            key=self.key[0],
            scaling=self._scaling,
            bias=None if self.bias is None else self.bias[0, :, -1, :keys],
            mask=last_mask,
        )

    @torch.no_grad()
    def weights(self) -> Tensor:
        """The weights of all queries, (heads, T, keys) in float32."""
        (heads, count, width), (groups, keys) = self.query.shape[1:], self.key.shape[1:3]
        queries = self.query[0].reshape(groups, -1, width)
        scores = torch.matmul(queries, self.key[0].transpose(1, 2)).view(heads, count, keys).float()
        scores *= self._scaling
        if self.bias is not None:
            scores += self.bias[0, :, :, :keys]
        mask = self._causal_mask() if self.mask is None or self.mask.ndim == 2 else self.mask[0]
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, float("-inf"))
        else:
            scores += mask
        return scores.softmax(-1)

    def _causal_mask(self) -> Tensor:
        """(T, keys): True where a query attends to a key."""
        count, keys, device = self.query.shape[2], self.key.shape[2], self.key.device
        behind = torch.arange(keys - count, keys, device=device)[:, None] - torch.arange(
            keys, device=device
        )
        allowed = behind >= 0
        if self.window is not None:
            allowed &= behind < self.window
        return allowed if self.mask is None else allowed & self.mask[:, -keys:].bool()
