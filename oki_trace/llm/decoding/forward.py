"""The forward passes of one reply: the prompt's, then one a token, all watched.

The model is called as ``generate()`` calls it. Where a step can be run as a
graph (``graph.py``), the first one is run both ways, and if all it leaves is
the same, the others are. The graph is left for good where the model prepares a
step otherwise than the graph stands for, where the two differ when run both ways
once more at a length that may be special, and where it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from oki_trace.llm.capture.probe import Probe
from oki_trace.llm.fast.kv_cache import CACHE_NAMES, give_room
from oki_trace.llm.fast.special_lengths import BEYOND, special_lengths
from oki_trace.llm.fast.step_graph import GraphRun, Pass, StepGraph

# Run both ways again at each power of two from here on, whatever the config says.
_FIRST_DOUBT = 512


class Forward:
    """Call it with all tokens so far, (1, T), once a step. ``note`` is told what was given up."""

    def __init__(
        self,
        model: Any,
        probe: Probe,
        graph: StepGraph | None,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        new_tokens: int,
        note: Callable[[str], None],
    ) -> None:
        self._model = model
        self._probe = probe
        self._graph = graph
        self._config = generation_config
        self._kwargs = model_kwargs
        self._new_tokens = new_tokens
        self._note = note
        self._steps = 0
        self._run: GraphRun | None = None
        # Tokens that the keyword arguments do not cover yet: a graph has no use for them.
        self._uncovered = 0
        self._prepares = _prepares_otherwise(model)
        self._doubtful = {
            length + beyond for length in special_lengths(model) for beyond in range(BEYOND)
        }
        for name in CACHE_NAMES:
            give_room(model_kwargs.get(name), new_tokens)

    def __call__(self, input_ids: Tensor) -> Pass:
        """What the pass that predicts the next token leaves behind."""
        self._steps += 1
        if self._steps == 1:
            return self._prompt(input_ids)
        if self._run is not None:
            return self._upon(self._run, input_ids)
        inputs = self._inputs(input_ids)
        if self._graph is not None and self._steps == 2 and _counts_as_all_do(self._model):
            run = self._begun(self._graph, inputs)
            if run is not None:
                same, found = run.agrees(inputs["input_ids"], lambda: self._step(inputs))
                self._run = run if same else None
                return found
        return self._step(inputs)

    def _begun(self, graph: StepGraph, inputs: dict[str, Any]) -> GraphRun | None:
        try:
            return graph.begin(inputs, self._new_tokens - 1)
        except Exception as error:  # what makes a reply quick may never end it
            self._leave(f"it could not begin ({type(error).__name__}: {error})")
            return None

    def _upon(self, run: GraphRun, input_ids: Tensor) -> Pass:
        """A step by the graph, if it is still the step that the model would make."""
        length = input_ids.shape[1]
        doubtful = length in self._doubtful or (
            length >= _FIRST_DOUBT and length & (length - 1) == 0
        )
        if self._prepares or doubtful:
            inputs = self._inputs(input_ids)
            if not run.takes(inputs):
                self._leave("the model prepares this step otherwise")
                return self._step(inputs)
            if doubtful:
                same, found = run.agrees(inputs["input_ids"], lambda: self._step(inputs))
                if not same:
                    self._leave("it gives other numbers")
                return found
        try:
            found = run.step(input_ids[:, -1:])
        except Exception as error:  # TorchScript raises RuntimeError, packed weights anything
            self._leave(f"it failed ({type(error).__name__}: {error})")
            return self._step(self._inputs(input_ids))
        self._uncovered += 1
        return found

    def _leave(self, reason: str) -> None:
        self._run = None
        first = reason.splitlines()[0][:200]
        self._note(f"from step {self._steps - 1} on the step graph was not used: {first}")

    def _prompt(self, input_ids: Tensor) -> Pass:
        if self._graph is not None:
            self._graph.release_copies(input_ids.shape[1])
        if not self._probe.splits_prompt or input_ids.shape[1] == 1:
            with self._probe.asking() as asked:
                arguments = {**self._kwargs, **asked}
                return self._seen(self._model._prefill(input_ids, self._config, arguments))
        mask = self._kwargs.get("attention_mask")
        cut = {} if mask is None else {"attention_mask": mask[:, :-1]}
        arguments = {**self._kwargs, **cut}
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

    def _step(self, inputs: dict[str, Any]) -> Pass:
        with self._probe.asking() as asked:
            outputs = self._model(**{**inputs, **asked}, return_dict=True)
        return self._seen(outputs)

    def _seen(self, outputs: Any) -> Pass:
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)
        # Copied, as a prompt's logits are many; before anything else runs the model again.
        logits = outputs.logits[0, -1].clone()
        return Pass(logits, self._probe.take_hidden(), self._probe.take_attention(outputs))


def _counts_as_all_do(model: Any) -> bool:
    """Whether the steps that a graph has run can be added to its keyword arguments afterwards."""
    own = type(model)._update_model_kwargs_for_generation
    return own is GenerationMixin._update_model_kwargs_for_generation


def _prepares_otherwise(model: Any) -> bool:
    """Whether the model prepares its inputs by code of its own, which may see to a special case."""
    own = type(model).prepare_inputs_for_generation
    return (
        own is not GenerationMixin.prepare_inputs_for_generation
        or "prepare_inputs_for_generation" in vars(model)
    )
