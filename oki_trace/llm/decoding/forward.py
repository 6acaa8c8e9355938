"""The forward passes of one reply: the prompt's, then one per token, all watched.

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
from oki_trace.llm.decoding.special_lengths import BEYOND, special_lengths

# From here on both ways are compared again at each power of two, whatever the config says.
_FIRST_COMPARISON = 512


class Forward:
    """Call it with all tokens so far, (1, T), once per step.

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
        self._graph = fast.step_graph
        self._config = generation_config
        self._kwargs = model_kwargs
        self._new_tokens = new_tokens
        self._note = note
        self._steps = 0
        self._run: StepRun | None = None
        # Tokens that the keyword arguments do not cover yet: a graph does not need them.
        self._uncovered = 0
        self._own_preparation = _prepares_inputs_itself(model)
        self._special_lengths = {
            length + beyond for length in special_lengths(model) for beyond in range(BEYOND)
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
        if self._graph is not None and self._steps == 2 and _counts_tokens_as_usual(self._model):
            run = self._begin(self._graph, inputs)
            if run is not None:
                same, own = run.matches_model(inputs["input_ids"], lambda: self._step(inputs))
                self._run = run if same else None
                return own
        return self._step(inputs)

    def _begin(self, graph: DecodeGraph, inputs: dict[str, Any]) -> StepRun | None:
        try:
            return graph.begin(inputs, self._new_tokens - 1)
        except Exception as error:  # a fast path may never end a reply
            self._give_up(f"it could not begin ({type(error).__name__}: {error})")
            return None

    def _replay(self, run: StepRun, input_ids: Tensor) -> ForwardPass:
        """A step by the graph, if it is still the step that the model would make."""
        length = input_ids.shape[1]
        compare = length in self._special_lengths or (
            length >= _FIRST_COMPARISON and length & (length - 1) == 0
        )
        if self._own_preparation or compare:
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
        self._uncovered += 1
        return forward_pass

    def _give_up(self, reason: str) -> None:
        self._run = None
        first = reason.splitlines()[0][:200]
        self._note(f"from step {self._steps - 1} on the step graph was not used: {first}")

    def _prompt(self, input_ids: Tensor) -> ForwardPass:
        if self._graph is not None:
            self._graph.release_copies(input_ids.shape[1])
        if not self._hooks.splits_prompt or input_ids.shape[1] == 1:
            with self._hooks.forward_arguments() as extra:
                arguments = {**self._kwargs, **extra}
                return self._watched(self._model._prefill(input_ids, self._config, arguments))
        mask = self._kwargs.get("attention_mask")
        shorter = {} if mask is None else {"attention_mask": mask[:, :-1]}
        arguments = {**self._kwargs, **shorter}
        outputs = self._model._prefill(input_ids[:, :-1], self._config, arguments)
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, arguments)
        del outputs
        return self._step(self._inputs(input_ids))

    def _inputs(self, input_ids: Tensor) -> dict[str, Any]:
        if self._uncovered:
            self._kwargs = self._model._update_model_kwargs_for_generation(
                {}, self._kwargs, num_new_tokens=self._uncovered
            )
            self._uncovered = 0
        length = 1 if self._kwargs["use_cache"] else None
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, **self._kwargs
        )
        return inputs

    def _step(self, inputs: dict[str, Any]) -> ForwardPass:
        with self._hooks.forward_arguments() as extra:
            outputs = self._model(**{**inputs, **extra}, return_dict=True)
        return self._watched(outputs)

    def _watched(self, outputs: Any) -> ForwardPass:
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
        # Copied, as a prompt's logits are many; before anything else runs the model again.
        logits = outputs.logits[0, -1].clone()
        hidden = self._hooks.take_hidden_states()
        return ForwardPass(logits, hidden, self._hooks.take_attention(outputs))


def _counts_tokens_as_usual(model: Any) -> bool:
    """Whether steps that a graph has run can be added to the keyword arguments afterwards."""
    own = type(model)._update_model_kwargs_for_generation
    return own is GenerationMixin._update_model_kwargs_for_generation


def _prepares_inputs_itself(model: Any) -> bool:
    """Whether the model prepares its inputs by its own code, which may handle a special case."""
    own = type(model).prepare_inputs_for_generation
    return (
        own is not GenerationMixin.prepare_inputs_for_generation
        or "prepare_inputs_for_generation" in vars(model)
    )
