"""Traces a decode step with TorchScript.

The tracer runs the model once on real tensors and records the operations. It
takes every decision of Python as constant, so a step is traced only if that
holds at every step: one token on a cache of keys and values that only grow, no
attention mask left, and nothing decided by a tensor's value or by the number of
tokens so far. Two steps of different lengths are then compared with the model
itself, bit for bit.

PyTorch has deprecated TorchScript, and does not support it on Python 3.14.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache

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
from oki_trace.llm.torch_internals import no_torchscript, tensors_replaced, traced
from oki_trace.llm.transformers_internals import (
    ATTENTION_SOURCES,
    DynamicLayer,
    attention_implementation,
)

# These branch on the number of queries, which is always one.
_BRANCH_ON_QUERIES = {attention.__file__, *ATTENTION_SOURCES}


class NotTraceable(Exception):
    """A decode step cannot be replayed; the message says why."""


def trace_step(model: Any, structure: ModelStructure, hooks: ModelHooks) -> StepGraph:
    """The graph of one decode step. Takes as long as a dozen steps.

    Raises NotTraceable if a step is not the same operations each time, or if
    TorchScript is not supported.
    """
    if unsupported := no_torchscript():
        raise NotTraceable(unsupported)
    if not is_plain(model):
        raise NotTraceable("the model has hooks, adapters or weights outside the CPU's memory")
    try:
        with torch.no_grad(), hooks.attach(pooled=False):
            return _checked_graph(model, structure, hooks)
    except NotTraceable:
        raise
    except Exception as error:  # a model's own code can raise anything
        raise NotTraceable(f"tracing a step fails ({type(error).__name__}: {error})") from error


def _checked_graph(model: Any, structure: ModelStructure, hooks: ModelHooks) -> StepGraph:
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
        own = partial(_own_pass, model, hooks, inputs)
        if run is None or not run.matches_model(token, own)[0]:
            raise NotTraceable("a traced step gives different numbers")
    return graph


def _own_pass(model: Any, hooks: ModelHooks, inputs: Mapping[str, Any]) -> ForwardPass:
    outputs = model(**inputs, return_dict=True)
    return ForwardPass(
        outputs.logits[0, -1], hooks.take_hidden_states(), hooks.take_attention(outputs)
    )


def _step_graph(
    model: Any, hooks: ModelHooks, token: Tensor, cache_name: str, cache: DynamicCache
) -> StepGraph:
    length = cache.get_seq_length()
    buffers = [buffer for layer in preallocated_layers(cache) for buffer in layer.buffers(1)]
    own_weights = dict(named_weights(model))
    packing = prepackable(model)
    packed = {id(matrix) for matrix in packing.weights}
    products = [name for name, tensor in own_weights.items() if id(tensor) in packed]
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
        # The tracer takes a model's own parameters as constants, so each is replaced.
        weights = dict(zip(own_weights, values, strict=False))
        replacements = {id(own_weights[name]): weight for name, weight in weights.items()}
        factors = zip(products, values[len(weights) :], strict=True)
        factor_of = {id(weights[name]): factor for name, factor in factors}
        with tensors_replaced(model, replacements), multiplying_with(model, factor_of):
            own = _own_pass(model, hooks, inputs)
        passes.append(own)
        return (own.logits, *own.hidden_states, *(last.query for last in _queries(own)))

    weights = [tensor.detach() for tensor in own_weights.values()]
    factors = [own_weights[name].detach() for name in products]
    example = token, *position_after(length), buffers, [*weights, *factors]
    function = _graph(step, example)
    (own,) = passes
    return StepGraph(
        function=function,
        reference=weakref.ref(model),
        modules=tuple(model.modules())[1:],
        weights=tuple(own_weights),
        products=tuple(products),
        copies=PrepackedWeights(),
        not_prepacked=packing.reason,
        implementation=attention_implementation(model.config),
        takes_positions=takes_positions,
        hidden=len(own.hidden_states),
        attending=tuple(
            AttendingLayer(layer, _cache_layer(last.key, buffers[::2], length + 1), last.scaling)
            for layer, last in zip(own.attention, _queries(own), strict=True)
        ),
    )


def _graph(step: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """``step`` as a graph. Raises NotTraceable if Python branched on a tensor."""
    graph, branches = traced(step, example)
    for branch in branches:
        if branch.filename not in _BRANCH_ON_QUERIES:
            raise NotTraceable(f"{branch.filename}:{branch.lineno} branches on a tensor")
    return graph


def _cache_layer(key: Tensor, buffers: list[Tensor], tokens: int) -> int:
    """Which of the cache's layers holds these keys, (kv heads, keys, d), unchanged."""
    for index, buffer in enumerate(buffers):
        if _memory(key) == _memory(buffer[0].narrow(-2, 0, tokens)):
            return index
    raise NotTraceable("its attention reads keys other than those of its cache")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _queries(own: ForwardPass) -> list[LastQuery]:
    """The last query of each layer, if attention is queries on the cache's keys alone."""
    queries = []
    for last in own.attention.values():
        if not isinstance(last, LastQuery) or last.bias is not None or last.mask is not None:
            raise NotTraceable("its attention has a mask or a bias, or no queries and keys")
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
    """Raises if code branches on it: the graph would hold for this length alone."""

    def _branch(self, *others: object) -> NoReturn:
        raise NotTraceable("it branches on the number of tokens so far")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = _branch
    __hash__ = int.__hash__

    def __add__(self, other: int) -> _Length:
        return _Length(int(self) + other)
