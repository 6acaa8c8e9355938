"""The forward passes of one reply: one for the prompt and one per token, all captured.

The model is called as ``generate()`` calls it. Where decode steps can be replayed
as a graph (``fast/step_graph.py``), the first one is run both ways, and if
the two are equal bit for bit, the graph runs the others. The graph is given up for
the rest of the reply where the model prepares a step differently, where the two
differ when compared again at a length that may be special, and where it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from oki_trace.llm.decoding.forward_pass import (
    CACHE_NAMES,
    DecodeGraph,
    FastPaths,
    ForwardHooks,
    ForwardPass,
    StepRun,
)
from oki_trace.llm.decoding.special_lengths import MARGIN, special_lengths
from oki_trace.llm.transformers_internals import counts_tokens_as_usual, next_kwargs, prefill

# From this length on, both ways are compared again at each power of two.
_FIRST_COMPARISON = 512


class Forward:
    """Runs the model for one reply; call it with all tokens so far, (1, T), once per step.

    ``note`` receives a sentence about each fast path that was given up.
    """

    def __init__(
        self,
        model: Any,
        hooks: ForwardHooks,
        fast: FastPaths,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        new_tokens: int,
        note: Callable[[str], None],
    ) -> None:
        self._model = model
        self._hooks = hooks
        self._fast = fast
        self._graph = fast.step_graph
        self._config = generation_config
        self._kwargs = model_kwargs
        self._new_tokens = new_tokens
        self._note = note
        self._steps = 0
        self._run: StepRun | None = None
        # Tokens that the graph has run and that are not in the keyword arguments yet.
        self._pending_tokens = 0
        self._prepares_inputs_itself = _prepares_inputs_itself(model)
        self._compared_lengths = {
            length + i for length in special_lengths(model) for i in range(MARGIN)
        }
        for name in CACHE_NAMES:
            fast.preallocate(model_kwargs.get(name), new_tokens)

    def __call__(self, input_ids: Tensor) -> ForwardPass:
        """The pass that predicts the next token."""
        self._steps += 1
        if self._steps == 1:
            return self._prompt(input_ids)
        if self._run is not None:
            return self._replay(self._run, input_ids)
        inputs = self._inputs(input_ids)
        if self._graph is not None and self._steps == 2:
            run = self._begin(self._graph, inputs)
            if run is not None:
                same, own = run.matches_model(inputs["input_ids"], lambda: self._step(inputs))
                self._run = run if same else None
                return own
        return self._step(inputs)

    def keep(self, token_ids: Tensor) -> None:
        """Keep the cache, of all tokens (1, T) but the last, for the next reply."""
        self._fast.keep_prefix(token_ids[0, :-1].tolist(), self._cache())

    def _cache(self) -> Any:
        named = (self._kwargs.get(name) for name in CACHE_NAMES)
        return next((cache for cache in named if cache is not None), None)

    def _begin(self, graph: DecodeGraph, inputs: dict[str, Any]) -> StepRun | None:
        if not counts_tokens_as_usual(self._model):
            return None  # the steps of a graph could not be added to the arguments afterwards
        try:
            return graph.begin(inputs, self._new_tokens - 1)
        except Exception as error:  # a fast path may never end a reply
            self._give_up(f"it could not begin ({type(error).__name__}: {error})")
            return None

    def _replay(self, run: StepRun, input_ids: Tensor) -> ForwardPass:
        """A step by the graph, if the model would still run the same step."""
        length = input_ids.shape[1]
        compare = length in self._compared_lengths or (
            length >= _FIRST_COMPARISON and length & (length - 1) == 0
        )
        if self._prepares_inputs_itself or compare:
            inputs = self._inputs(input_ids)
            if not run.accepts(inputs):
                self._give_up("the model prepares this step differently")
                return self._step(inputs)
            if compare:
                same, own = run.matches_model(inputs["input_ids"], lambda: self._step(inputs))
                if not same:
                    self._give_up("it gives different numbers")
                return own
        try:
            forward_pass = run.step(input_ids[:, -1:])
        except Exception as error:  # TorchScript raises RuntimeError, prepacked weights anything
            self._give_up(f"it failed ({type(error).__name__}: {error})")
            return self._step(self._inputs(input_ids))
        self._pending_tokens += 1
        return forward_pass

    def _give_up(self, reason: str) -> None:
        self._run = None
        line = reason.splitlines()[0][:200]
        self._note(f"from step {self._steps - 1} on the step graph was not used: {line}")

    def _prompt(self, input_ids: Tensor) -> ForwardPass:
        if self._graph is not None:
            self._graph.release_copies(input_ids.shape[1])
        cache = self._cache()
        new = input_ids.shape[1] - (0 if cache is None else cache.get_seq_length())
        if self._hooks.splits_prompt and new == 1 and input_ids.shape[1] > 1:
            return self._step(self._inputs(input_ids))
        if not self._hooks.splits_prompt or new == 1:
            with self._hooks.forward_arguments() as extra:
                arguments = {**self._kwargs, **extra}
                return self._captured(prefill(self._model, input_ids, self._config, arguments))
        arguments = dict(self._kwargs)
        if arguments.get("attention_mask") is not None:
            arguments["attention_mask"] = arguments["attention_mask"][:, :-1]
        outputs = prefill(self._model, input_ids[:, :-1], self._config, arguments)
        self._kwargs = next_kwargs(self._model, outputs, arguments)
        del outputs
        return self._step(self._inputs(input_ids))

    def _inputs(self, input_ids: Tensor) -> dict[str, Any]:
        if self._pending_tokens:
            self._kwargs = next_kwargs(self._model, {}, self._kwargs, self._pending_tokens)
            self._pending_tokens = 0
        length = 1 if self._kwargs["use_cache"] else None
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, **self._kwargs
        )
        return inputs

    def _step(self, inputs: dict[str, Any]) -> ForwardPass:
        with self._hooks.forward_arguments() as extra:
            outputs = self._model(**{**inputs, **extra}, return_dict=True)
        return self._captured(outputs)

    def _captured(self, outputs: Any) -> ForwardPass:
        self._kwargs = next_kwargs(self._model, outputs, self._kwargs)
        # A copy, so that the logits of a whole prompt are freed.
        logits = outputs.logits[0, -1].clone()
        hidden_states = self._hooks.take_hidden_states()
        return ForwardPass(logits, hidden_states, self._hooks.take_attention(outputs))


def _prepares_inputs_itself(model: Any) -> bool:
    """Whether the model prepares its inputs by its own code, which may handle a special case."""
    own = type(model).prepare_inputs_for_generation
    return (
        own is not GenerationMixin.prepare_inputs_for_generation
        or "prepare_inputs_for_generation" in vars(model)
    )
