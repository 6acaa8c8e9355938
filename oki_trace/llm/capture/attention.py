"""The attention of the newest position, at the price of the fused kernel.

Asking transformers for ``output_attentions`` forces eager attention, which
holds layers × heads × T × T weights. Only the newest position's row is
evidence. Three ways to have it, the cheapest that agrees with the model's own
eager attention is taken (``instrument.py`` compares, once per load):

- **beside**: an attention function is registered under the model's own key; it
  calls the stock function and works out that one row beside it, or keeps what
  it is worked out from, where that is held anyway.
- **hooked**: the model runs eager attention anyway; hooks read its weights and
  keep the row.
- **asked**: the prompt but for its last token goes through the fused kernel,
  every later step is asked for its attentions. Any model that can answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oki_trace.llm.capture.buffers import BufferPool, is_persistent
from oki_trace.llm.decoding.forward_pass import AttentionCapture, LastQuery

log = logging.getLogger(__name__)

Rows = dict[int, Tensor]
"""(heads, keys) in fp32 by layer, the keys in order of position, the newest last."""


def attention_rows(seen: AttentionCapture) -> Rows:
    """The rows, worked out where they are not yet."""
    return {layer: _row(found) for layer, found in seen.items()}


def _row(found: Tensor | LastQuery) -> Tensor:
    return found.row() if isinstance(found, LastQuery) else found


class AttentionTap(Protocol):
    """A way to the weights of the last query, for one forward pass at a time."""

    splits_prompt: bool
    """Whether the prompt's last token must go through the model by itself."""

    def attach(self) -> AbstractContextManager[None]:
        """Watch the model while this context lasts."""

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        """Around a forward pass whose rows are wanted; yields arguments for it."""

    def take(self, outputs: Any) -> AttentionCapture:
        """What was seen of the forward pass that gave ``outputs``."""


class _Watching:
    """Collects rows while the model runs, from the modules of ``layer_of``."""

    splits_prompt = False

    def __init__(self, layer_of: Mapping[nn.Module, int]) -> None:
        self._layer_of = dict(layer_of)
        self._seen: dict[nn.Module, Tensor | LastQuery] = {}

    @contextmanager
    def forward_arguments(self) -> Iterator[dict[str, Any]]:
        yield {}

    def take(self, outputs: Any) -> AttentionCapture:
        seen, self._seen = self._seen, {}
        of_layer: dict[int, list[Tensor | LastQuery]] = {}
        for module, found in seen.items():
            of_layer.setdefault(self._layer_of[module], []).append(found)
        # Where a layer attends more than once, its heads stand one after the other.
        return {
            layer: found[0] if len(found) == 1 else torch.cat([_row(part) for part in found])
            for layer, found in sorted(of_layer.items())
        }

    def settle(self, keys: int) -> None:
        """From now on, watch only the modules whose last weights were over ``keys`` keys.

        The others gave none (a hook on each costs time), something else of that
        form, or handed on the weights of a module within.
        """
        over_keys = {m for m, seen in self._seen.items() if _row(seen).shape[1] == keys}
        own = {m for m in over_keys if over_keys.isdisjoint(set(m.modules()) - {m})}
        self._seen = {m: seen for m, seen in self._seen.items() if m in own}
        self._layer_of = {m: self._layer_of[m] for m in self._seen}


_watched: dict[nn.Module, KernelTap] = {}


class KernelTap(_Watching):
    """Works out the row beside the fused kernel."""

    def __init__(self, layer_of: Mapping[nn.Module, int], implementation: str) -> None:
        super().__init__(layer_of)
        self._implementation = implementation
        self._pool = BufferPool(0)

    @contextmanager
    def attach(self) -> Iterator[None]:
        _wrap(self._implementation)
        self._pool = BufferPool(len(self._layer_of))
        _watched.update(dict.fromkeys(self._layer_of, self))
        try:
            yield
        finally:
            for module in self._layer_of:
                _watched.pop(module, None)
            # What a pass that failed left behind would hold on to the whole cache.
            self._seen, self._pool = {}, BufferPool(0)

    def keep(self, module: nn.Module, query: Tensor, key: Tensor, last: LastQuery) -> None:
        """Called by the attention function, with its arguments and what is wanted of them."""
        if module in self._layer_of:
            held_anyway = query.shape[2] == 1 and is_persistent(key)
            self._seen[module] = last if held_anyway else self._pool.copy(last.row())


class HookedTap(_Watching):
    """Reads the weights that eager attention modules return beside their output."""

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
                    self._seen[module] = value[0, :, -1].float()
                    return


class OutputAttentionsTap:
    """Asks the model for its attentions, its last query alone in the forward pass.

    ``layers`` are the true numbers of the layers whose weights are wanted, by
    their place among all that answer. A model without a cache cannot have its
    prompt split: it holds all weights of every pass.
    """

    def __init__(self, model: Any, layers: Mapping[int, int], *, has_cache: bool) -> None:
        self._configs = _configs(model)
        self._layers = layers
        self.splits_prompt = has_cache

    @contextmanager
    def attach(self) -> Iterator[None]:
        yield

    @contextmanager
    def forward_arguments(self) -> Iterator[dict[str, Any]]:
        with _eager(self._configs):
            yield {"output_attentions": True}

    def take(self, outputs: Any) -> AttentionCapture:
        rows = last_rows(outputs)
        found = ((layer, rows[place]) for place, layer in self._layers.items())
        return {layer: row for layer, row in found if row is not None}


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let ``model`` run its own eager attention while this context lasts.

    The name is read from the config at every call; parts of a model may have
    configs, and names, of their own.
    """
    with _eager(_configs(model)):
        yield


@contextmanager
def _eager(configs: Sequence[Any]) -> Iterator[None]:
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config, _ in before:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values())


def last_rows(outputs: Any, queries: int | None = None) -> list[Tensor | None]:
    """The last query's weights, (heads, keys) in fp32, of each layer that answered.

    None for what is no attention weights: not of ``queries`` queries, where that
    is given. Linear attention may answer with its state.
    """
    return [
        weights[0, :, -1].float()
        if weights.ndim == 4 and queries in (None, weights.shape[2])
        else None
        for weights in getattr(outputs, "attentions", None) or ()
        if isinstance(weights, Tensor)
    ]


def _wrap(implementation: str) -> None:
    """Register the watching function under the stock function's own key, once.

    The same key keeps the masks and every branch a model takes on its name.
    """
    stock = ALL_ATTENTION_FUNCTIONS[implementation]
    if not getattr(stock, "watches_attention", False):
        top_left = implementation == "sdpa"
        AttentionInterface.register(implementation, _watching(stock, top_left=top_left))


def _watching(stock: Callable[..., Any], *, top_left: bool) -> Callable[..., Any]:
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
        tap = _watched.get(module)
        if tap is not None:
            try:
                keys = key
                if top_left and attention_mask is None and query.shape[2] > 1:
                    # A cache of fixed length has places for tokens to come.
                    keys = key[:, :, : query.shape[2]]
                last = last_query(query, keys, attention_mask, **_of_last(kwargs))
                tap.keep(module, query, keys, last)
            except Exception as error:  # a kernel's arguments can be anything; the turn goes on
                log.debug("no attention of %s: %s", type(module).__name__, error)
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    attention.watches_attention = True  # type: ignore[attr-defined]
    return attention


def _of_last(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's further arguments that change the weights of the last query."""
    return {
        "scaling": kwargs.get("scaling"),
        "bias": kwargs.get("position_bias"),
        "window": kwargs.get("sliding_window"),
    }


def last_query(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    bias: Tensor | None = None,
    window: int | None = None,
) -> LastQuery:
    """Of the last query of an attention function's arguments, each with a batch of one.

    ``query`` (1, heads, T, d), ``key`` (1, kv heads, keys, d), ``mask`` and
    ``bias`` (1, 1 or heads, T, keys). Kernels with the contract of flash attention
    take no such mask: theirs is None or one of the keys alone, (1, keys), and the
    last ``window`` keys are all that is attended to. Raises TypeError for a mask
    that is no tensor.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"a mask of the type {type(mask).__name__} cannot be read")
    groups, keys, width = key.shape[1], key.shape[2], key.shape[3]
    if mask is None or mask.ndim == 2:
        seen = None if mask is None else mask[:, -keys:].bool()
        if window is not None and window < keys:
            within = torch.arange(keys, device=key.device)[None] >= keys - window
            seen = within if seen is None else seen & within
    else:
        seen = mask[0, :, -1, :keys]
    return LastQuery(
        query=query[0, :, -1].reshape(groups, -1, width),
        key=key[0],
        scaling=width**-0.5 if scaling is None else scaling,
        bias=None if bias is None else bias[0, :, -1, :keys],
        mask=seen,
    )
