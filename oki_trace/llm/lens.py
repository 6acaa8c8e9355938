"""The Logit Lens: what the model would say if a layer were its last.

Logit Lens: nostalgebraist, "interpreting GPT: the logit lens" (2020). The
hidden state of every layer goes through *the model's own* final norm and head,
whatever they are called and whatever comes after them (softcap, scale, bias):
the tail found by ``anatomy.py`` is replayed on it, the result is put in place
of the trunk's output, and the model's own outer forward does the rest.

A comparison with the model's own logits decides, once per load, whether the
lens may be shown at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oki_trace.llm.anatomy import Anatomy

# Above these the lens is not the model's own head: fp32 rounding stays below
# 1e-5, 16-bit weights below 5e-2 in log-probability.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16_BIT = 1e-1


@dataclass(frozen=True)
class LensCheck:
    """The largest |Δlogprob| found, and why the lens is off (None: it is on)."""

    error: float | None
    reason: str | None


class LogitLens:
    """Projects residual streams to logits through the model's own tail and head."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._model: Any = anatomy.model
        self._trunk = anatomy.trunk
        self._tail = anatomy.tail
        self._output = anatomy.trunk_output
        self._ids = anatomy.probe_ids[:, :1]

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, width), before the final norm, to logits (rows, vocab) in fp32."""
        rows = hidden[None]
        for module in self._tail:
            rows = module(rows)
            rows = rows[0] if isinstance(rows, tuple) else rows
        assert self._trunk is not None
        with _returning(self._trunk, _with_last_hidden_state(self._output, rows)):
            output = self._model(
                input_ids=self._ids.expand(1, hidden.shape[0]), use_cache=False, return_dict=True
            )
        logits: Tensor = output.logits[0]
        return logits.float()

    def check(self, last_block: Tensor, logits: Tensor) -> LensCheck:
        """Hold the lens at the last layer against the model's own logits, all of them.

        ``last_block`` (rows, width) is what the last block put out, ``logits``
        (rows, vocab) what the model made of it.
        """
        if self._trunk is None:
            return LensCheck(None, "the model runs its blocks itself, so its head stands not apart")
        try:
            projected = self.project(last_block)
        except Exception as error:  # whatever a model's own code raises, the turn goes on
            return LensCheck(None, f"its head cannot be replayed ({type(error).__name__}: {error})")
        if projected.shape != logits.shape:
            return LensCheck(None, f"its head gives {tuple(projected.shape)} when replayed")
        return _compare(projected, logits.float(), last_block.dtype)


def _compare(projected: Tensor, logits: Tensor, dtype: torch.dtype) -> LensCheck:
    difference = projected.log_softmax(-1) - logits.log_softmax(-1)
    finite = torch.isfinite(logits)
    error = float(difference[finite].abs().max())
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BIT)
    if error <= tolerance:
        return LensCheck(error, None)
    return LensCheck(
        error, f"its last layer differs from the model's logits by {error:.2g} in log-probability"
    )


def _with_last_hidden_state(output: Any, hidden: Tensor) -> Any:
    """A copy of the trunk's own output object: heads read its other fields too."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    """Let ``module`` return ``value``, whatever it is called with."""
    # Offloading libraries wrap forward on the instance: put back what was there.
    wrapped = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: value
    try:
        yield
    finally:
        if wrapped is None:
            del module.forward
        else:
            module.forward = wrapped


@dataclass(frozen=True)
class Distribution:
    """What is kept of rows of logits; tensors on the CPU.

    ``token_ids``, ``logits``, ``probs`` (rows, k); ``entropy``, ``lse``,
    ``chosen_rank``, ``chosen_prob``, ``kl`` (rows,).
    """

    token_ids: Tensor
    logits: Tensor
    probs: Tensor
    entropy: Tensor
    chosen_rank: Tensor
    chosen_prob: Tensor
    kl: Tensor


@torch.no_grad()
def summarize(logits: Tensor, own: Tensor, chosen_id: int, k: int) -> Distribution:
    """Reduce logits (rows, vocab) in fp32; ``own`` (vocab,) are the model's own logits.

    ``kl`` is KL(own ‖ row) in nats. ``chosen_rank`` counts the tokens strictly
    more likely than the chosen one, plus one.
    """
    top_logits, top_ids = logits.topk(min(k, logits.shape[-1]))
    lse = logits.logsumexp(-1)
    probs = (logits - lse[:, None]).exp_()
    # -inf logits are tokens the model rules out: 0 · -inf counts as 0 here.
    entropy = lse - torch.nansum(probs * logits, -1)
    chosen = logits[:, chosen_id]
    rank = (logits > chosen[:, None]).sum(-1) + 1
    own_lse = own.logsumexp(-1)
    own_probs = (own - own_lse).exp()
    cross = torch.nansum(own_probs * logits, -1) - lse
    own_entropy = own_lse - torch.nansum(own_probs * own)
    return Distribution(
        token_ids=top_ids.cpu(),
        logits=top_logits.cpu(),
        probs=(top_logits - lse[:, None]).exp().cpu(),
        entropy=entropy.clamp_min(0).cpu(),
        chosen_rank=rank.cpu(),
        chosen_prob=(chosen - lse).exp().cpu(),
        kl=(-cross - own_entropy).clamp_min(0).cpu(),
    )
