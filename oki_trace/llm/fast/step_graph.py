"""A decode step as a graph of tensor operations, run without Python.

On a CPU a small model spends up to a fifth of a step in Python, between its
operations, and holds the interpreter's lock meanwhile. The operations are the
same at every step, so they are traced once (``torchscript.py``) and then
replayed: the same operations on the same numbers, bit for bit.

The first step of every reply is run both ways and compared. A model whose step
is not such a graph decodes as usual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oki_trace.llm.accelerate_internals import has_hook
from oki_trace.llm.decoding.forward_pass import (
    CACHE_NAMES,
    AttentionCapture,
    ForwardPass,
    LastQuery,
)
from oki_trace.llm.fast.kv_cache import PreallocatedLayer, preallocated_layers
from oki_trace.llm.fast.prepacked import PrepackedWeights
from oki_trace.llm.torch_internals import hooks_of, only_watches, without_fusion
from oki_trace.llm.transformers_internals import attention_implementation

# The inputs of a step that the graph can replay.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# After a longer prompt, its own tensors need the memory that copies of weights would take.
LONG_PROMPT = 1024


@dataclass(frozen=True)
class AttendingLayer:
    """Which cache layer the attention of a model layer reads, and the scaling of its scores."""

    layer: int
    cache_layer: int
    scaling: float


@dataclass(frozen=True)
class StepGraph:
    """The decode step of one model.

    ``function`` takes a token (1, 1), its position (1, 1), a tensor whose length is
    the number of tokens before it, the cache's buffers (keys and values in turn), the
    ``weights``, and once more those used in ``products``, which may be prepacked. It
    returns the logits (vocab,), the ``hidden`` rows, and the last query of each layer
    in ``attending``. ``not_prepacked`` says why no weights are.
    """

    function: Callable[..., tuple[Tensor, ...]]
    reference: weakref.ref[Any]
    modules: tuple[nn.Module, ...]
    weights: tuple[str, ...]
    products: tuple[str, ...]
    copies: PrepackedWeights
    not_prepacked: str | None
    implementation: str
    takes_positions: bool
    hidden: int
    attending: tuple[AttendingLayer, ...]

    @property
    def model(self) -> Any:
        """The model, or None once nothing else refers to it; ``modules`` are its submodules."""
        return self.reference()

    def begin(self, inputs: Mapping[str, Any], steps: int) -> GraphRun | None:
        """Run the next ``steps`` of a reply, the first of which has the model's ``inputs``.

        None if that is not the step of the graph. Weights are read as they are now, and
        prepacked only for many ``steps`` after a prompt that is not long.
        """
        cache = _cache_of(inputs)
        layers = preallocated_layers(cache)
        if not layers or not is_plain(self.model):
            return None
        length = layers[0].get_seq_length()
        mask = inputs.get("attention_mask")
        weights = {name: tensor.detach() for name, tensor in named_weights(self.model)}
        if not (
            _is_next_token(inputs, length)
            and (inputs.get("position_ids") is not None) == self.takes_positions
            and (mask is None or (mask.ndim == 2 and bool(mask.all())))
            and tuple(self.model.modules())[1:] == self.modules
            and attention_implementation(self.model.config) == self.implementation
            and tuple(weights) == self.weights
        ):
            return None
        products = [weights[name] for name in self.products]
        factors = self.copies.of(products, 0 if length > LONG_PROMPT else steps)
        return GraphRun(self, cache, layers, [*weights.values(), *factors])

    def release_copies(self, prompt_tokens: int) -> None:
        """Free the prepacked copies before a long prompt."""
        if prompt_tokens > LONG_PROMPT:
            self.copies.drop()


@dataclass(frozen=True)
class GraphRun:
    """Runs the steps of one reply, each on the keys and values of those before it."""

    graph: StepGraph
    cache: Any
    layers: list[PreallocatedLayer]
    weights: list[Tensor]

    @property
    def length(self) -> int:
        """The tokens in the cache."""
        return self.layers[0].get_seq_length()

    def accepts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are one more token after the steps it has run."""
        mask = inputs.get("attention_mask")
        return (
            _cache_of(inputs) is self.cache
            and inputs["input_ids"].shape == (1, 1)
            and _is_next_token(inputs, self.length)
            and (mask is None or mask.shape == (1, self.length + 1))
        )

    def step(self, token: Tensor) -> ForwardPass:
        """The pass of one more token, (1, 1)."""
        length = self.length
        outputs = self._run(token, length)
        for layer in self.layers:
            layer.set_length(length + 1)
        return self._pass(outputs)

    def matches_model(
        self, token: Tensor, own: Callable[[], ForwardPass]
    ) -> tuple[bool, ForwardPass]:
        """Return whether a step equals the model's ``own`` pass bit for bit, and that pass.

        Both write to the same place of the cache. Compared are the logits, the hidden
        states, the queries, and the new keys and values. If any differs, weights may
        have changed unnoticed, so their prepacked copies are dropped.
        """
        length = self.length
        try:
            outputs = self._run(token, length)
        except Exception:  # TorchScript raises RuntimeError, prepacked weights anything
            return False, own()
        written = self._new_entries(length)
        expected = own()
        replayed = self._pass(outputs)
        ours = [*_tensors(replayed), *written]
        theirs = [*_tensors(expected), *self._new_entries(length)]
        same = replayed.attention.keys() == expected.attention.keys() and all(
            torch.equal(left, right) for left, right in zip(ours, theirs, strict=True)
        )
        if not same:
            self.graph.copies.drop()
        return same, expected

    def _run(self, token: Tensor, length: int) -> tuple[Tensor, ...]:
        with without_fusion():
            return self.graph.function(
                token, *position_after(length), self._buffers(1), self.weights
            )

    def _buffers(self, new: int) -> list[Tensor]:
        return [buffer for layer in self.layers for buffer in layer.buffers(new)]

    def _new_entries(self, length: int) -> list[Tensor]:
        return [buffer.narrow(-2, length, 1).clone() for buffer in self._buffers(0)]

    def _pass(self, outputs: tuple[Tensor, ...]) -> ForwardPass:
        logits, *rest = outputs
        hidden, queries = rest[: self.graph.hidden], rest[self.graph.hidden :]
        attention: AttentionCapture = {
            a.layer: LastQuery(query, self.layers[a.cache_layer].keys[0], a.scaling, None, None)
            for a, query in zip(self.graph.attending, queries, strict=True)
        }
        return ForwardPass(logits, tuple(hidden), attention)


def _cache_of(inputs: Mapping[str, Any]) -> Any:
    return next((inputs[name] for name in CACHE_NAMES if name in inputs), None)


def _is_next_token(inputs: Mapping[str, Any], length: int) -> bool:
    """Whether the graph knows all ``inputs``, and they are for the position ``length``."""
    positions = inputs.get("position_ids")
    return inputs.keys() <= {*_INPUTS, *CACHE_NAMES} and (
        positions is None or positions.tolist() == [[length]]
    )


def position_after(length: int) -> tuple[Tensor, Tensor]:
    """The position of the token after ``length`` tokens, (1, 1), and a tensor of that length."""
    return torch.tensor([[length]]), torch.zeros(1).expand(length)


def is_plain(model: nn.Module) -> bool:
    """Whether it runs nothing but its own code, on plain weights in the CPU's memory."""
    if torch.is_autocast_enabled("cpu"):  # it caches copies of the weights
        return False
    modules = list(model.modules())
    return (
        not model.training
        and all(only_watches(hook) for module in modules for hook in hooks_of(module))
        and not any("forward" in m.__dict__ or has_hook(m) for m in modules)
        and all(
            type(p) is nn.Parameter and p.device.type == "cpu" and p.dtype.is_floating_point
            for p in model.parameters()
        )
    )


def named_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, as they are now, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _tensors(forward_pass: ForwardPass) -> list[Tensor]:
    rows = forward_pass.attention.values()
    queries = (row.query if isinstance(row, LastQuery) else row for row in rows)
    return [forward_pass.logits, *forward_pass.hidden_states, *queries]
