"""A decode step as a graph of tensor operations, run without Python.

On a CPU a small model spends up to a fifth of a step in Python, between its
operations, and holds the interpreter's lock meanwhile. The operations are the
same at every step, so they are written down once (``jit.py``), and steps run
from there: the same operations on the same numbers, bit for bit.

Nothing is taken on trust: the first step of every reply is run both ways. What
a graph cannot stand for decodes as it always does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from oki_trace.llm.capture.attention import LastQuery, Seen
from oki_trace.llm.fast.kv_cache import CACHE_NAMES, PreallocatedLayer
from oki_trace.llm.fast.prepacked import PrepackedWeights

# What a model may be given at a step for that to be the step of the graph.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# After so many tokens of a prompt, their own tensors take the memory that copies would.
LONG_PROMPT = 1024


@dataclass(frozen=True)
class Pass:
    """What the forward pass of one step leaves behind: see ``decode.RawStep``."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    attention: Seen


@dataclass(frozen=True)
class Attends:
    """Which of a cache's layers a layer's attention reads, and the scaling of its scores."""

    layer: int
    held_in: int
    scaling: float


@dataclass(frozen=True)
class StepGraph:
    """One step of one model.

    ``function`` takes a token (1, 1), its position (1, 1), a tensor as long as
    there are tokens before it, the cache's tensors, keys and values in turn, the
    ``weights``, and once more those used in ``products``, which may be packed. It
    gives the logits (vocab,), the ``hidden`` rows, and the last query of each that
    ``attends``.
    """

    function: Callable[..., tuple[Tensor, ...]]
    reference: weakref.ref[Any]
    modules: tuple[nn.Module, ...]
    weights: tuple[str, ...]
    products: tuple[str, ...]
    copies: PrepackedWeights
    implementation: str
    takes_positions: bool
    hidden: int
    attends: tuple[Attends, ...]

    @property
    def model(self) -> Any:
        """The model, as long as somebody holds it; ``modules`` are those within it."""
        return self.reference()

    def begin(self, inputs: Mapping[str, Any], steps: int) -> GraphRun | None:
        """For the steps to come of a reply, the next of which the model would be given ``inputs``.

        None where that is not the step of the graph. Weights are taken as they are now,
        and copied only for many ``steps`` after a prompt that is not long.
        """
        cache = _cache_of(inputs)
        layers = preallocated_layers(cache)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        fits = (
            layers
            and inputs.keys() <= {*_INPUTS, *CACHE_NAMES}
            and (positions is not None) == self.takes_positions
            and (positions is None or positions.tolist() == [[layers[0].get_seq_length()]])
            and (mask is None or (mask.ndim == 2 and bool(mask.all())))
            and is_plain(self.model)
            and tuple(self.model.modules())[1:] == self.modules
            and self.model.config._attn_implementation == self.implementation
        )
        weights = {name: tensor.detach() for name, tensor in named_weights(self.model)}
        if not fits or tuple(weights) != self.weights:
            return None
        worth = 0 if layers[0].get_seq_length() > LONG_PROMPT else steps
        factors = self.copies.of([weights[name] for name in self.products], worth)
        return GraphRun(self, cache, layers, [*weights.values(), *factors])

    def release_copies(self, prompt_tokens: int) -> None:
        """Before a prompt of so many: copies give their memory back where it is long."""
        if prompt_tokens > LONG_PROMPT:
            self.copies.drop()


class GraphRun:
    """Runs the steps of one reply, each upon the keys and values of those before it."""

    def __init__(
        self,
        graph: StepGraph,
        cache: Any,
        layers: list[PreallocatedLayer],
        weights: list[Tensor],
    ) -> None:
        self._graph = graph
        self._cache = cache
        self._layers = layers
        self._weights = weights

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are those of one more token, upon what it has run so far."""
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        there = self._layers[0].get_seq_length()
        return (
            _cache_of(inputs) is self._cache
            and inputs["input_ids"].shape == (1, 1)
            and inputs.keys() <= {*_INPUTS, *CACHE_NAMES}
            and (positions is None or positions.tolist() == [[there]])
            and (mask is None or mask.shape == (1, there + 1))
        )

    def step(self, token: Tensor) -> Pass:
        """The pass of one more token, (1, 1)."""
        there = self._layers[0].get_seq_length()
        found = self._run(token, there)
        for layer in self._layers:
            layer.show(there + 1)
        return self._pass(found)

    def agrees(self, token: Tensor, own: Callable[[], Pass]) -> tuple[bool, Pass]:
        """Whether a step is, bit for bit, the model's ``own``, which is made after it and returned.

        Both write to the same place of the cache. The logits are compared, the
        hidden states, the queries, and what is written. If any differs, weights may
        have changed unseen: copies of them are dropped.
        """
        there = self._layers[0].get_seq_length()
        try:
            found = self._run(token, there)
        except Exception:  # TorchScript raises RuntimeError, packed weights anything
            return False, own()
        written = self._written(there)
        expected = own()
        run = self._pass(found)
        mine = [*_tensors(run), *written]
        its = [*_tensors(expected), *self._written(there)]
        same = run.attention.keys() == expected.attention.keys() and all(
            torch.equal(left, right) for left, right in zip(mine, its, strict=True)
        )
        if not same:
            self._graph.copies.drop()
        return same, expected

    def _run(self, token: Tensor, there: int) -> tuple[Tensor, ...]:
        rooms = [room for layer in self._layers for room in layer.room_for(1)]
        # The optimizer may fuse what the model computes step by step.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._graph.function(token, *place_after(there), rooms, self._weights)

    def _written(self, there: int) -> list[Tensor]:
        rooms = [room for layer in self._layers for room in layer.room_for(0)]
        return [room.narrow(-2, there, 1).clone() for room in rooms]

    def _pass(self, found: tuple[Tensor, ...]) -> Pass:
        logits, *rest = found
        hidden, queries = rest[: self._graph.hidden], rest[self._graph.hidden :]
        seen: Seen = {
            a.layer: LastQuery(query, self._layers[a.held_in].keys[0], a.scaling, None, None)
            for a, query in zip(self._graph.attends, queries, strict=True)
        }
        return Pass(logits, tuple(hidden), seen)


def _cache_of(inputs: Mapping[str, Any]) -> Any:
    return next((inputs[name] for name in CACHE_NAMES if name in inputs), None)


def place_after(there: int) -> tuple[Tensor, Tensor]:
    """The position of the token after so many, (1, 1), and a tensor of that length."""
    return torch.tensor([[there]]), torch.zeros(1).expand(there)


def preallocated_layers(cache: Any) -> list[PreallocatedLayer]:
    """The layers of a cache that keeps nothing but growing keys and values; else none."""
    if type(cache) is not DynamicCache:
        return []
    layers = [layer for layer in cache.layers if type(layer) is PreallocatedLayer and layer.roomy]
    return layers if len(layers) == len(cache.layers) else []


def is_plain(model: nn.Module) -> bool:
    """Whether it is nothing but its own code, on plain weights in the CPU's memory."""
    if torch.is_autocast_enabled("cpu"):  # which keeps copies of weights beside them
        return False
    modules = list(model.modules())
    hooks = (
        hook
        for m in modules
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    return (
        not model.training
        and all(_only_watches(hook) for hook in hooks)
        and not any("forward" in m.__dict__ or hasattr(m, "_hf_hook") for m in modules)
        and all(
            type(p) is nn.Parameter and p.device.type == "cpu" and p.dtype.is_floating_point
            for p in model.parameters()
        )
    )


def _only_watches(hook: Any) -> bool:
    """Transformers' hooks answer output_attentions; ours are not needed, or are in the graph."""
    return str(getattr(hook, "__module__", "")).startswith(("transformers.", "oki_trace.llm."))


def named_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, as they are now, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _tensors(found: Pass) -> list[Tensor]:
    rows = (row.query if isinstance(row, LastQuery) else row for row in found.attention.values())
    return [found.logits, *found.hidden, *rows]
