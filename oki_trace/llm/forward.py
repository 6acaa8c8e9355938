"""The forward passes of one reply: the prompt's, then one a token, all watched.

The model is called as ``generate()`` calls it. Where a step can be run as a
graph (``graph.py``), the first one is run both ways, and if all it leaves is
the same, the others are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from oki_trace.llm.graph import GraphRun, Pass, StepGraph
from oki_trace.llm.probe import Probe
from oki_trace.llm.room import CACHE_NAMES, give_room


class Forward:
    """Call it with all tokens so far, (1, T), once a step."""

    def __init__(
        self,
        model: Any,
        probe: Probe,
        graph: StepGraph | None,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        new_tokens: int,
    ) -> None:
        self._model = model
        self._probe = probe
        self._graph = graph
        self._config = generation_config
        self._kwargs = model_kwargs
        self._new_tokens = new_tokens
        self._steps = 0
        self._run: GraphRun | None = None
        for name in CACHE_NAMES:
            give_room(model_kwargs.get(name), new_tokens)

    def __call__(self, input_ids: Tensor) -> Pass:
        """What the pass that predicts the next token leaves behind."""
        self._steps += 1
        if self._steps == 1:
            return self._prompt(input_ids)
        if self._run is not None:
            return self._run.step(input_ids[:, -1:])
        inputs = self._inputs(input_ids)
        run = None
        if self._graph is not None and self._steps == 2:
            run = self._graph.begin(inputs, self._new_tokens - 1)
        if run is None:
            return self._step(inputs)
        same, found = run.agrees(inputs["input_ids"], lambda: self._step(inputs))
        self._run = run if same else None
        return found

    def _prompt(self, input_ids: Tensor) -> Pass:
        if self._graph is not None:
            self._graph.make_way(input_ids.shape[1])
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
