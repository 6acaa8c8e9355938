"""The Logit Lens: what the model would say if a layer were its last.

Logit Lens: nostalgebraist, "interpreting GPT: the logit lens" (2020). The
hidden state of every layer goes through *the model's own* final norm and head,
whatever they are called and whatever comes after them (softcap, scale, bias):
the tail found by ``model_structure.py`` is replayed on it, and the model's own outer
forward does the rest, on a shell of the model in which a stand-in returns that
result in the trunk's place. The shell shares every weight, and the model itself
is not touched: it may decode at the same time.

Where what follows the last block is no chain of modules (streams that are
averaged, a model that runs its blocks itself), the blocks are replaced instead:
the shell runs the trunk too, and each stand-in puts out the layer's stream.

A comparison with the model's own logits decides, once per load, whether the
lens may be shown at all.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oki_trace.llm.capture.distribution import log_probs
from oki_trace.llm.capture.model_structure import ModelStructure, residual_stream
from oki_trace.llm.loading.hardware import computing_dtype

# Above these the lens is not the model's own head: fp32 rounding stays below
# 1e-5, 16-bit weights below 5e-2 in log-probability.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16_BIT = 1e-1
# The largest |Δprob| of a drafted lens against the whole one in float32.
DRAFT_TOLERANCE = 1e-3


class LensProjection(Protocol):
    """Projects the hidden states of several steps to logits; see ``LogitLens.project_steps``."""

    def project_steps(self, hidden: Tensor, wanted: Sequence[Tensor], k: int) -> Iterator[Tensor]:
        """Each step's logits (layers, vocab)."""


@dataclass(frozen=True)
class LensCheck:
    """The largest |Δlogprob| found, and why the lens is off (None: it is on)."""

    error: float | None
    reason: str | None


class LogitLens:
    """Projects residual streams to logits through the model's own tail and head.

    It may be used while the model runs in another thread, but from one thread.
    """

    def __init__(self, structure: ModelStructure, *, run_trunk: bool = False) -> None:
        """With ``run_trunk`` the blocks are replaced, else the trunk that holds them."""
        self._axis = structure.position_axis
        self._computing = computing_dtype(structure.model)
        self._tail = () if run_trunk else structure.tail
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
    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, width), before the final norm, to logits (rows, vocab) in fp32."""
        self._returned = _with_stream(self._output, self._through_tail(hidden))
        ids = self._ids.expand(1, hidden.shape[0])
        logits: Tensor = self._shell(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        self._returned = None
        return logits.float()

    def project_steps(self, hidden: Tensor, wanted: Sequence[Tensor], k: int) -> Iterator[Tensor]:
        """Hidden states of several steps, their layers in turn, to each step's logits.

        Of these the k largest of each row and the tokens ``wanted`` of a step are
        exact whoever does it; here all are.
        """
        return iter(self.project(hidden).split(len(hidden) // len(wanted)))

    @torch.no_grad()
    def normed_states(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, width) as the head takes them, after the final norm."""
        return self._through_tail(hidden)[0]

    def _through_tail(self, hidden: Tensor) -> Tensor:
        batch = self._axis - 1
        rows = hidden.movedim(0, batch).unsqueeze(batch)
        for module in self._tail:
            rows = residual_stream(module(rows))
        return rows

    def check(self, last_block: Tensor, logits: Tensor) -> LensCheck:
        """Hold the lens at the last layer against the model's own logits, all of them.

        ``last_block`` (rows, width) is what the last block put out, ``logits``
        (rows, vocab) what the model made of it.
        """
        if self._shell is None:
            return LensCheck(None, "the model runs its blocks itself, so its head stands not apart")
        try:
            # Twice, as a row's place among others must not matter.
            projected = self.project(last_block.repeat(2, *(1,) * (last_block.ndim - 1)))
            logits = logits.repeat(2, 1)
        except Exception as error:  # whatever a model's own code raises, the turn goes on
            return LensCheck(None, f"its head cannot be replayed ({type(error).__name__}: {error})")
        if projected.shape != logits.shape:
            return LensCheck(None, f"its head gives {tuple(projected.shape)} when replayed")
        narrowest = min(last_block.dtype, self._computing, key=lambda dtype: dtype.itemsize)
        return _compare(projected, logits.float(), narrowest)


def _compare(projected: Tensor, logits: Tensor, dtype: torch.dtype) -> LensCheck:
    # Not in float32, whose own error would be on both sides and not be seen.
    difference = log_probs(projected) - log_probs(logits)
    finite = torch.isfinite(logits).cpu()
    if not finite.any():
        return LensCheck(None, "the model's logits are not finite")
    error = float(difference[finite].abs().max())
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    if error <= tolerance:
        return LensCheck(error, None)
    return LensCheck(
        error, f"its last layer differs from the model's logits by {error:.2g} in log-probability"
    )


def _with_stream(output: Any, hidden: Tensor) -> Any:
    """A copy of the module's own output object: what comes after reads its other fields too."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


def _stand_in(module: nn.Module, returns: Callable[[], Any]) -> nn.Module:
    """Takes the module's place in the shell; a copy, since others read its other attributes."""
    copied = copy.copy(module)
    copied.__dict__["forward"] = lambda *args, **kwargs: returns()
    # The copy is shallow: hooks on the original, our own among them, would run for it.
    copied._forward_hooks = OrderedDict()
    copied._forward_pre_hooks = OrderedDict()
    return copied


def _shell(module: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the modules from ``module`` down to those that are replaced.

    All else is shared, so no weight is held twice.
    """
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    # Offloading libraries put a forward bound to the original onto it.
    copied.__dict__.pop("forward", None)
    for name, child in module._modules.items():
        if child in stand_ins:
            copied._modules[name] = stand_ins[child]
        elif child is not None and any(m in stand_ins for m in child.modules()):
            copied._modules[name] = _shell(child, stand_ins)
    return copied
