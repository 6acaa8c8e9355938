"""Tracing a decode step with TorchScript.

The tracer runs the model once on real tensors and records the operations. It
takes every decision of Python as constant, so a step is traced only where that
holds at every step: one token on a cache of keys and values that only grow, no
attention mask left, and nothing decided by a tensor's value or by the number of
tokens so far. Two steps of different lengths are then compared with the model
itself, bit for bit.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations import sdpa_attention

from oki_trace.llm.capture import attention
from oki_trace.llm.capture.buffers import mark_persistent
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.model_structure import ModelStructure
from oki_trace.llm.decoding.forward_pass import ForwardPass, LastQuery, cache_in
from oki_trace.llm.fast.kv_cache import preallocate, preallocated_layers
from oki_trace.llm.fast.prepacked import PrepackedWeights, multiplying_with, prepackable
from oki_trace.llm.fast.step_graph import (
    AttendingLayer,
    StepGraph,
    is_plain,
    named_weights,
    position_after,
)

# These branch on the number of queries, which is always one.
_BRANCH_ON_QUERIES = {attention.__file__, sdpa_attention.__file__, masking_utils.__file__}

_TracerWarning: Any = torch.jit.TracerWarning  # type: ignore[attr-defined]


class NotTraceable(Exception):
    """A decode step cannot be replayed; the message says why."""


def trace_step(model: Any, structure: ModelStructure, hooks: ModelHooks) -> StepGraph:
    """The graph of one decode step. Takes as long as a dozen steps.

    Raises NotTraceable where a step is not the same operations each time, or where
    TorchScript is not supported.
    """
    if sys.version_info >= (3, 14):
        raise NotTraceable("torch does not support TorchScript on Python 3.14")
    if not is_plain(model):
        raise NotTraceable("the model has hooks, adapters or weights outside the CPU's memory")
    try:
        with torch.no_grad(), hooks.attach(pooled=False):
            return _checked(model, structure, hooks)
    except NotTraceable:
        raise
    except Exception as error:  # a model's own code can raise anything
        raise NotTraceable(f"tracing a step fails ({type(error).__name__}: {error})") from error


def _checked(model: Any, structure: ModelStructure, hooks: ModelHooks) -> StepGraph:
    """Trace a step, and compare it and the one after it with the model's own."""
    ids = structure.dummy_ids
    outputs = model(input_ids=ids[:, :-2], use_cache=True, return_dict=True)
    hooks.take_hidden_states()
    hooks.take_attention(outputs)
    named: tuple[str, Any] = cache_in(outputs) or ("", None)
    name, cache = named
    preallocate(cache, 2)
    if not preallocated_layers(cache):
        raise NotTraceable("its cache holds more than growing keys and values")
    graph = _step_graph(model, hooks, ids[:, -2:-1], name, cache)
    for token in ids[:, -2:].split(1, 1):
        inputs = {"input_ids": token, name: cache, "use_cache": True}
        if graph.takes_positions:
            inputs["position_ids"] = torch.tensor([[cache.get_seq_length()]])
        run = graph.begin(inputs, 0)
        if run is None or not run.matches_model(token, partial(_own, model, hooks, inputs))[0]:
            raise NotTraceable("a traced step gives different numbers")
    return graph


def _own(model: Any, hooks: ModelHooks, inputs: Mapping[str, Any]) -> ForwardPass:
    outputs = model(**inputs, return_dict=True)
    logits = outputs.logits[0, -1]
    return ForwardPass(logits, hooks.take_hidden_states(), hooks.take_attention(outputs))


def _step_graph(
    model: Any, hooks: ModelHooks, token: Tensor, cache_name: str, cache: DynamicCache
) -> StepGraph:
    length = cache.get_seq_length()
    buffers = [buffer for layer in preallocated_layers(cache) for buffer in layer.buffers(1)]
    weights = {name: tensor.detach() for name, tensor in named_weights(model)}
    packing = prepackable(model)
    packed = {id(matrix) for matrix in packing.weights}
    products = [name for name, tensor in named_weights(model) if id(tensor) in packed]
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    passes: list[ForwardPass] = []

    def step(
        token: Tensor, position: Tensor, before: Tensor, buffers: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        step_cache = DynamicCache()
        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        step_cache.layers = [_TracedLayer(*pair, before, _Length(length)) for pair in pairs]
        inputs = {"input_ids": token, cache_name: step_cache, "use_cache": True}
        if takes_positions:
            inputs["position_ids"] = position
        values, factors = values[: len(weights)], values[len(weights) :]
        by_name = dict(zip(weights, values, strict=True))
        factor_of = {id(by_name[n]): factor for n, factor in zip(products, factors, strict=True)}
        with _weights_replaced(model, by_name), multiplying_with(model, factor_of):
            own = _own(model, hooks, inputs)
        passes.append(own)
        return (own.logits, *own.hidden_states, *(q.query for q in _queries(own)))

    values = [*weights.values(), *(weights[name] for name in products)]
    function = _traced(step, (token, *position_after(length), buffers, values))
    (traced,) = passes
    return StepGraph(
        function=function,
        reference=weakref.ref(model),
        modules=tuple(model.modules())[1:],
        weights=tuple(weights),
        products=tuple(products),
        copies=PrepackedWeights(),
        not_prepacked=packing.reason,
        implementation=model.config._attn_implementation,
        takes_positions=takes_positions,
        hidden=len(traced.hidden_states),
        attending=tuple(
            AttendingLayer(layer, _cache_layer(last.key, buffers[::2], length + 1), last.scaling)
            for layer, last in zip(traced.attention, _queries(traced), strict=True)
        ),
    )


def _traced(step: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """``step`` as a graph. Raises NotTraceable where Python branched on a tensor."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _TracerWarning.ignore_lib_warnings()
        function = torch.jit.trace(step, example, check_trace=False)
    # For torch.compile alone; it would keep the model alive.
    function.__dict__.pop("_torchdynamo_inline", None)
    for warning in caught:
        is_branch = issubclass(warning.category, _TracerWarning)
        if is_branch and warning.filename not in _BRANCH_ON_QUERIES:
            raise NotTraceable(f"{warning.filename}:{warning.lineno} branches on a tensor")
    return function


def _cache_layer(key: Tensor, buffers: list[Tensor], tokens: int) -> int:
    """Which of the cache's layers holds these keys, (kv heads, keys, d), unchanged."""
    for index, buffer in enumerate(buffers):
        if _memory(key) == _memory(buffer[0].narrow(-2, 0, tokens)):
            return index
    raise NotTraceable("its attention reads other keys than those of its cache")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@contextmanager
def _weights_replaced(model: nn.Module, replacements: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``model`` compute with other tensors: the tracer takes its parameters as constants."""
    of = {id(tensor): replacements[name] for name, tensor in named_weights(model)}
    kinds = ("_parameters", "_buffers")
    before = [(module, kind, module.__dict__[kind]) for module in model.modules() for kind in kinds]
    for module, kind, tensors in before:
        module.__dict__[kind] = {key: of.get(id(t), t) for key, t in tensors.items()}
    try:
        yield
    finally:
        for module, kind, tensors in before:
            module.__dict__[kind] = tensors


def _queries(own: ForwardPass) -> list[LastQuery]:
    """The last query of each layer, where attention is queries on the cache's keys alone."""
    queries = []
    for last in own.attention.values():
        if not isinstance(last, LastQuery) or last.bias is not None or last.mask is not None:
            raise NotTraceable("its attention is more than queries on keys")
        queries.append(last)
    return queries


class _TracedLayer(DynamicLayer):
    """A cache layer whose length the tracer records as that of a tensor, not as a constant."""

    def __init__(self, keys: Tensor, values: Tensor, before: Tensor, length: _Length) -> None:
        super().__init__()
        self._buffers = keys, values
        self._before = before
        self._length = length
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length = self._before.shape[0]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, length, 1).copy_(states)
        keys, values = (buffer.narrow(-2, 0, length + 1) for buffer in self._buffers)
        mark_persistent(keys)
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + 1, 0


class _Length(int):
    """Raises where code branches on it: the graph would hold for this length alone."""

    def _branch(self, *others: object) -> NoReturn:
        raise NotTraceable("it branches on the number of tokens so far")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = _branch
    __hash__ = int.__hash__

    def __add__(self, other: int) -> _Length:
        return _Length(int(self) + other)
