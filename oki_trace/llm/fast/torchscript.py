"""Writing a decode step down with TorchScript's tracer.

The tracer runs the model once on real tensors and notes the operations. What
Python decides meanwhile it takes for settled, so a step is written down only
where that holds at every step: one token through a cache of keys and values
that only grow, no attention mask left, and nothing decided by a tensor's value
or by how many tokens came before. Two steps of different lengths are then held
against the model itself, bit for bit.
"""

from __future__ import annotations

import inspect
import logging
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
from oki_trace.llm.capture.anatomy import Anatomy
from oki_trace.llm.capture.attention import LastQuery
from oki_trace.llm.capture.probe import Probe
from oki_trace.llm.fast.kv_cache import cache_in, give_room, mark_as_staying
from oki_trace.llm.fast.prepacked import PrepackedWeights, matrices, products_of
from oki_trace.llm.fast.step_graph import (
    Attends,
    Pass,
    StepGraph,
    is_plain,
    named_weights,
    place_after,
    preallocated_layers,
)

log = logging.getLogger(__name__)

# These decide by the number of queries, which is always one.
_DECIDE_BY_QUERIES = {attention.__file__, sdpa_attention.__file__, masking_utils.__file__}

_TracerWarning: Any = torch.jit.TracerWarning  # type: ignore[attr-defined]


class _Unfit(Exception):
    """A step is not the same operations each time."""


def step_graph(model: Any, anatomy: Anatomy, probe: Probe) -> StepGraph | None:
    """The graph of one decode step; None where there is none that is the model's own, or no gain.

    Takes as long as a dozen steps.
    """
    if not is_plain(model):
        return None
    try:
        with torch.no_grad(), probe.attached(shelved=False):
            return _checked(model, anatomy, probe)
    except Exception as error:  # whatever a model's own code raises, it decodes as it always does
        log.debug("%s has no step graph: %s", type(model).__name__, error)
        return None


def _checked(model: Any, anatomy: Anatomy, probe: Probe) -> StepGraph:
    """Write a step down, and hold it and the one after it against the model's own."""
    ids = anatomy.probe_ids
    outputs = model(input_ids=ids[:, :-2], use_cache=True, return_dict=True)
    probe.take_hidden()
    probe.take_attention(outputs)
    named: tuple[str, Any] = cache_in(outputs) or ("", None)
    name, cache = named
    give_room(cache, 2)
    if not preallocated_layers(cache):
        raise _Unfit("its cache holds more than growing keys and values")
    graph = _written_down(model, probe, ids[:, -2:-1], name, cache)
    for token in ids[:, -2:].split(1, 1):
        inputs = {"input_ids": token, name: cache, "use_cache": True}
        if graph.takes_positions:
            inputs["position_ids"] = torch.tensor([[cache.get_seq_length()]])
        run = graph.begin(inputs, 0)
        if run is None or not run.agrees(token, partial(_own, model, probe, inputs))[0]:
            raise _Unfit("it gives other numbers")
    return graph


def _own(model: Any, probe: Probe, inputs: Mapping[str, Any]) -> Pass:
    outputs = model(**inputs, return_dict=True)
    return Pass(outputs.logits[0, -1], probe.take_hidden(), probe.take_attention(outputs))


def _written_down(
    model: Any, probe: Probe, token: Tensor, cache_name: str, cache: DynamicCache
) -> StepGraph:
    there = cache.get_seq_length()
    rooms = [room for layer in preallocated_layers(cache) for room in layer.room_for(1)]
    weights = {name: tensor.detach() for name, tensor in named_weights(model)}
    copied = {id(matrix) for matrix in matrices(model)}
    products = [name for name, tensor in named_weights(model) if id(tensor) in copied]
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    passes: list[Pass] = []

    def step(
        token: Tensor, position: Tensor, before: Tensor, rooms: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        held = DynamicCache()
        pairs = zip(rooms[::2], rooms[1::2], strict=True)
        held.layers = [_WritingLayer(*pair, before, _Length(there)) for pair in pairs]
        inputs = {"input_ids": token, cache_name: held, "use_cache": True}
        if takes_positions:
            inputs["position_ids"] = position
        values, factors = values[: len(weights)], values[len(weights) :]
        given = dict(zip(weights, values, strict=True))
        factor_of = {id(given[n]): factor for n, factor in zip(products, factors, strict=True)}
        with _weights_replaced(model, given), products_of(model, factor_of):
            found = _own(model, probe, inputs)
        passes.append(found)
        return (found.logits, *found.hidden, *(q.query for q in _queries(found)))

    values = [*weights.values(), *(weights[name] for name in products)]
    function = _traced(step, (token, *place_after(there), rooms, values))
    (found,) = passes
    return StepGraph(
        function=function,
        reference=weakref.ref(model),
        modules=tuple(model.modules())[1:],
        weights=tuple(weights),
        products=tuple(products),
        copies=PrepackedWeights(),
        implementation=model.config._attn_implementation,
        takes_positions=takes_positions,
        hidden=len(found.hidden),
        attends=tuple(
            Attends(layer, _held_in(last.key, rooms[::2], there + 1), last.scaling)
            for layer, last in zip(found.attention, _queries(found), strict=True)
        ),
    )


def _traced(step: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """``step`` as a graph. Raises where Python decided something by a tensor."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _TracerWarning.ignore_lib_warnings()
        function = torch.jit.trace(step, example, check_trace=False)
    # For torch.compile alone; it would keep the model alive.
    function.__dict__.pop("_torchdynamo_inline", None)
    for warning in said:
        told = issubclass(warning.category, _TracerWarning)
        if told and warning.filename not in _DECIDE_BY_QUERIES:
            raise _Unfit(f"{warning.filename}:{warning.lineno} decides by a tensor")
    return function


def _held_in(key: Tensor, rooms: list[Tensor], tokens: int) -> int:
    """Which of the cache's layers holds these keys, (kv heads, keys, d), as they are."""
    for place, room in enumerate(rooms):
        if _lies(key) == _lies(room[0].narrow(-2, 0, tokens)):
            return place
    raise _Unfit("its attention reads other keys than the cache holds")


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@contextmanager
def _weights_replaced(model: nn.Module, replacements: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``model`` compute with other tensors: the tracer takes its parameters for constants."""
    of = {id(tensor): replacements[name] for name, tensor in named_weights(model)}
    held = ("_parameters", "_buffers")
    before = [(module, name, module.__dict__[name]) for module in model.modules() for name in held]
    for module, name, tensors in before:
        module.__dict__[name] = {key: of.get(id(t), t) for key, t in tensors.items()}
    try:
        yield
    finally:
        for module, name, tensors in before:
            module.__dict__[name] = tensors


def _queries(found: Pass) -> list[LastQuery]:
    """What is seen of the attention, where that is queries upon keys the cache holds."""
    queries = []
    for last in found.attention.values():
        if not isinstance(last, LastQuery) or last.bias is not None or last.mask is not None:
            raise _Unfit("its attention is more than queries upon keys")
        queries.append(last)
    return queries


class _WritingLayer(DynamicLayer):
    """A cache's layer whose length is written down as that of a tensor, and no number."""

    def __init__(self, keys: Tensor, values: Tensor, before: Tensor, length: _Length) -> None:
        super().__init__()
        self._rooms = keys, values
        self._before = before
        self._length = length
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        there = self._before.shape[0]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room.narrow(-2, there, 1).copy_(states)
        keys, values = (room.narrow(-2, 0, there + 1) for room in self._rooms)
        mark_as_staying(keys)
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + 1, 0


class _Length(int):
    """Raises where something is decided by it: what is written down would hold for it alone."""

    def _decide(self, *others: object) -> NoReturn:
        raise _Unfit("it decides by how many tokens there are")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = _decide
    __hash__ = int.__hash__

    def __add__(self, other: int) -> _Length:
        return _Length(int(self) + other)
