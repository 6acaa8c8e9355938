"""The Logit Lens: the next-token distribution if a layer were the last one.

Logit Lens: nostalgebraist, "interpreting GPT: the logit lens" (2020). The
hidden state of every layer goes through *the model's own* final norm and head,
whatever their names and whatever follows them (softcap, scale, bias): the final
modules found by ``model_structure.py`` are replayed on it, and the model's own outer
forward does the rest, on a shell of the model in which a stand-in returns that
result in place of the trunk. The shell shares every weight, and the model itself
is not modified: it may decode at the same time.

Where more than a chain of modules follows the last block (streams that are averaged,
a model that calls its blocks itself), the blocks are replaced instead: the shell runs
the trunk too, and each stand-in returns the layer's stream.

A comparison with the model's own logits decides, once per load, whether the lens is
shown at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oki_trace.llm.capture.distribution import (
    Distribution,
    ModelDistribution,
    log_probs,
    summarize,
)
from oki_trace.llm.capture.model_structure import ModelStructure, residual_stream
from oki_trace.llm.loading.hardware import computing_dtype
from oki_trace.llm.torch_internals import children_of, shallow_copy

# Above these the lens is not the model's own head: fp32 rounding stays below
# 1e-5, 16-bit weights below 5e-2 in log-probability.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16_BIT = 1e-1
# Steps whose logits are in memory together: with more, a step is hardly cheaper.
_STEPS_TOGETHER = 4
# The largest |Δprob| of a drafted lens against the exact one in float32.
DRAFT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LensTarget:
    """What a step's lens is compared with: the ``model``'s own distribution and the token.

    ``exact_ids`` are the tokens that the model ranks highest; every projection computes
    their logits, the chosen token's, and the k largest of each row exactly.
    """

    token_id: int
    model: ModelDistribution
    exact_ids: Tensor


class LensProjection(Protocol):
    """Projects the hidden states of several steps; see ``LogitLens``."""

    def project_steps(
        self, hidden_states: Tensor, exact_ids: Sequence[Tensor], k: int
    ) -> Iterator[Tensor]:
        """Each step's logits (layers, vocab)."""

    def summarize_steps(
        self, hidden_states: Tensor, steps: Sequence[LensTarget], k: int
    ) -> Distribution:
        """The summary of all rows."""


@dataclass(frozen=True)
class LensCheck:
    """The largest |Δlogprob|, and why the lens is not available (None: it is)."""

    error: float | None
    reason: str | None


class LogitLens:
    """Projects hidden states to logits through the model's own final modules and head.

    Use it from one thread; the model may run in another.
    """

    def __init__(self, structure: ModelStructure, *, run_trunk: bool = False) -> None:
        """With ``run_trunk`` the blocks are replaced, else the trunk that holds them."""
        self._axis = structure.position_axis
        self._computing_dtype = computing_dtype(structure.model)
        self._final_modules = () if run_trunk else structure.final_modules
        self._output = structure.block_output if run_trunk else structure.trunk_output
        self._ids = structure.dummy_ids[:, :1]
        self._returned: Any = None
        self._shell: Any = None
        trunk = () if structure.trunk is None else (structure.trunk,)
        replaced = structure.blocks if run_trunk else trunk
        if replaced:
            stand_ins = {m: _stand_in(m, lambda: self._returned) for m in replaced}
            self._shell = _shell(structure.model, stand_ins)

    @torch.no_grad()
    def project(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (rows, width), before the final norm, to logits (rows, vocab) in fp32."""
        self._returned = _with_stream(self._output, self._through_final_modules(hidden_states))
        ids = self._ids.expand(1, hidden_states.shape[0])
        logits: Tensor = self._shell(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        self._returned = None
        return logits.float()

    def project_steps(
        self, hidden_states: Tensor, exact_ids: Sequence[Tensor], k: int
    ) -> Iterator[Tensor]:
        """Hidden states (steps · layers, width), step by step, to each step's logits.

        ``exact_ids`` has one tensor of token ids per step. Every projection computes
        exactly the logits of these tokens and the k largest of each row; this one, all.
        """
        return iter(self.project(hidden_states).split(len(hidden_states) // len(exact_ids)))

    def summarize_steps(
        self, hidden_states: Tensor, steps: Sequence[LensTarget], k: int
    ) -> Distribution:
        """Hidden states (steps · layers, width) to the summary of each row's logits."""
        layers = len(hidden_states) // len(steps)
        summaries = []
        for i in range(0, len(steps), _STEPS_TOGETHER):
            together = steps[i : i + _STEPS_TOGETHER]
            logits = self.project(hidden_states[i * layers : (i + len(together)) * layers])
            chosen = torch.tensor([step.token_id for step in together]).repeat_interleave(layers)
            summaries.append(summarize(logits, [step.model for step in together], chosen, k))
        return Distribution.join(summaries)

    @torch.no_grad()
    def normed_states(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (rows, width) as the head takes them, after the final norm."""
        return self._through_final_modules(hidden_states)[0]

    def _through_final_modules(self, hidden_states: Tensor) -> Tensor:
        """(rows, width) to (1, rows, width), as one sequence of a batch of one."""
        batch_axis = self._axis - 1
        stream = hidden_states.movedim(0, batch_axis).unsqueeze(batch_axis)
        for module in self._final_modules:
            stream = residual_stream(module(stream))
        return stream

    def check(self, last_hidden: Tensor, logits: Tensor) -> LensCheck:
        """Compare the lens at the last layer with the model's own logits, all of them.

        ``last_hidden`` (rows, width) is the output of the last block, ``logits``
        (rows, vocab) what the model computed from it.
        """
        if self._shell is None:
            return LensCheck(None, "the model runs its blocks itself, so its head is not separate")
        try:
            # Twice, since the result for a row must not depend on the other rows.
            projected = self.project(last_hidden.repeat(2, *(1,) * (last_hidden.ndim - 1)))
            logits = logits.repeat(2, 1)
        except Exception as error:  # whatever a model's own code raises, the turn goes on
            return LensCheck(None, f"its head cannot be replayed ({type(error).__name__}: {error})")
        if projected.shape != logits.shape:
            return LensCheck(None, f"its head returns {tuple(projected.shape)} when replayed")
        dtypes = last_hidden.dtype, self._computing_dtype
        return _compare(projected, logits.float(), min(dtypes, key=lambda dtype: dtype.itemsize))


def _compare(projected: Tensor, logits: Tensor, dtype: torch.dtype) -> LensCheck:
    # In double precision: the error of a float32 softmax would cancel out and hide.
    difference = log_probs(projected) - log_probs(logits)
    finite = torch.isfinite(logits).cpu()
    if not finite.any():
        return LensCheck(None, "the model's logits are not finite")
    error = float(difference[finite].abs().max())
    if error <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
        return LensCheck(error, None)
    return LensCheck(
        error, f"its last layer differs from the model's logits by {error:.2g} in log-probability"
    )


def _with_stream(output: Any, stream: Tensor) -> Any:
    """A copy of a module's output with another stream; later code reads its other fields too."""
    if isinstance(output, Tensor):
        return stream
    if isinstance(output, tuple):
        return (stream, *output[1:])
    return type(output)(**{**output, "last_hidden_state": stream})


def _stand_in(module: nn.Module, output: Callable[[], Any]) -> nn.Module:
    """A module that returns ``output()``; a copy, since others read its other attributes."""
    # Hooks on the original, ours included, must not run for the copy.
    stand_in = shallow_copy(module, children_of(module), keep_hooks=False)
    stand_in.__dict__["forward"] = lambda *args, **kwargs: output()
    return stand_in


def _shell(module: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the modules from ``module`` down to the replaced ones.

    Everything else is shared, so no weight is held twice.
    """
    children = children_of(module)
    for name, child in children.items():
        if child in stand_ins:
            children[name] = stand_ins[child]
        elif child is not None and any(m in stand_ins for m in child.modules()):
            children[name] = _shell(child, stand_ins)
    return shallow_copy(module, children, keep_hooks=True)
