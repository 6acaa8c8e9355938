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

from oki_trace.llm.decoding.forward_pass import (
    CACHE_NAMES,
    AttentionCapture,
    ForwardPass,
    LastQuery,
)
from oki_trace.llm.fast.kv_cache import PreallocatedLayer, preallocated_layers
from oki_trace.llm.fast.prepacked import PrepackedWeights

# The inputs that a model may be given at a step that the graph replays.
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# After a prompt of so many tokens, its own tensors use the memory that copies would.
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
        """The model, as long as somebody holds it; ``modules`` are those within it."""
        return self.reference()

    def begin(self, inputs: Mapping[str, Any], steps: int) -> GraphRun | None:
        """Run the next ``steps`` of a reply, the first of which has the model's ``inputs``.

        None where that is not the step of the graph. Weights are read as they are now,
        and prepacked only for many ``steps`` after a prompt that is not long.
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
        """Free the prepacked copies before a long prompt."""
        if prompt_tokens > LONG_PROMPT:
            self.copies.drop()


class GraphRun:
    """Runs the steps of one reply, each on the keys and values of those before it."""

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

    def accepts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are one more token after the steps it has run."""
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        length = self._layers[0].get_seq_length()
        return (
            _cache_of(inputs) is self._cache
            and inputs["input_ids"].shape == (1, 1)
            and inputs.keys() <= {*_INPUTS, *CACHE_NAMES}
            and (positions is None or positions.tolist() == [[length]])
            and (mask is None or mask.shape == (1, length + 1))
        )

    def step(self, token: Tensor) -> ForwardPass:
        """The pass of one more token, (1, 1)."""
        length = self._layers[0].get_seq_length()
        outputs = self._run(token, length)
        for layer in self._layers:
            layer.set_length(length + 1)
        return self._pass(outputs)

    def matches_model(
        self, token: Tensor, own: Callable[[], ForwardPass]
    ) -> tuple[bool, ForwardPass]:
        """Whether a step equals the model's ``own`` pass bit for bit; that pass, run second.

        Both write to the same place of the cache. Compared are the logits, the hidden
        states, the queries, and the new keys and values. If any differs, weights may
        have changed unseen, so their prepacked copies are dropped.
        """
        length = self._layers[0].get_seq_length()
        try:
            outputs = self._run(token, length)
        except Exception:  # TorchScript raises RuntimeError, prepacked weights anything
            return False, own()
        written = self._new_entries(length)
        expected = own()
        graph_pass = self._pass(outputs)
        ours = [*_tensors(graph_pass), *written]
        theirs = [*_tensors(expected), *self._new_entries(length)]
        same = graph_pass.attention.keys() == expected.attention.keys() and all(
            torch.equal(left, right) for left, right in zip(ours, theirs, strict=True)
        )
        if not same:
            self._graph.copies.drop()
        return same, expected

    def _run(self, token: Tensor, length: int) -> tuple[Tensor, ...]:
        buffers = [buffer for layer in self._layers for buffer in layer.buffers(1)]
        # The optimizer may fuse operations that the model computes one by one.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._graph.function(token, *position_after(length), buffers, self._weights)

    def _new_entries(self, length: int) -> list[Tensor]:
        buffers = [buffer for layer in self._layers for buffer in layer.buffers(0)]
        return [buffer.narrow(-2, length, 1).clone() for buffer in buffers]

    def _pass(self, outputs: tuple[Tensor, ...]) -> ForwardPass:
        logits, *rest = outputs
        hidden, queries = rest[: self._graph.hidden], rest[self._graph.hidden :]
        attention: AttentionCapture = {
            a.layer: LastQuery(query, self._layers[a.cache_layer].keys[0], a.scaling, None, None)
            for a, query in zip(self._graph.attending, queries, strict=True)
        }
        return ForwardPass(logits, tuple(hidden), attention)


def _cache_of(inputs: Mapping[str, Any]) -> Any:
    return next((inputs[name] for name in CACHE_NAMES if name in inputs), None)


def position_after(length: int) -> tuple[Tensor, Tensor]:
    """The position of the token after ``length`` tokens, (1, 1), and a tensor of that length."""
    return torch.tensor([[length]]), torch.zeros(1).expand(length)


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


def _tensors(forward_pass: ForwardPass) -> list[Tensor]:
    rows = (
        row.query if isinstance(row, LastQuery) else row for row in forward_pass.attention.values()
    )
    return [forward_pass.logits, *forward_pass.hidden_states, *rows]
