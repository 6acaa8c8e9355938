"""The Logit Lens: what the model would say if a layer were its last.

Logit Lens: nostalgebraist, "interpreting GPT: the logit lens" (2020). The
hidden state of every layer goes through *the model's own* final norm and head,
whatever they are called and whatever comes after them (softcap, scale, bias):
the tail found by ``anatomy.py`` is replayed on it, and the model's own outer
forward does the rest, on a shell of the model in which a stand-in returns that
result in the trunk's place. The shell shares every weight, and the model itself
is not touched: it may decode at the same time.

A comparison with the model's own logits decides, once per load, whether the
lens may be shown at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    """Projects residual streams to logits through the model's own tail and head.

    It may be used while the model runs in another thread, but from one thread.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._tail = anatomy.tail
        self._output = anatomy.trunk_output
        self._ids = anatomy.probe_ids[:, :1]
        self._returned: Any = None
        self._shell: Any = None
        if anatomy.trunk is not None:
            stand_in = _stand_in(anatomy.trunk, lambda: self._returned)
            self._shell = _shell(anatomy.model, anatomy.trunk, stand_in)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, width), before the final norm, to logits (rows, vocab) in fp32."""
        rows = hidden[None]
        for module in self._tail:
            rows = module(rows)
            rows = rows[0] if isinstance(rows, tuple) else rows
        self._returned = _with_last_hidden_state(self._output, rows)
        ids = self._ids.expand(1, hidden.shape[0])
        logits: Tensor = self._shell(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        self._returned = None
        return logits.float()

    def check(self, last_block: Tensor, logits: Tensor) -> LensCheck:
        """Hold the lens at the last layer against the model's own logits, all of them.

        ``last_block`` (rows, width) is what the last block put out, ``logits``
        (rows, vocab) what the model made of it.
        """
        if self._shell is None:
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


def _stand_in(trunk: nn.Module, returns: Callable[[], Any]) -> nn.Module:
    """Takes the trunk's place in the shell; a copy, since heads read its other attributes."""
    copied = copy.copy(trunk)
    copied.__dict__["forward"] = lambda *args, **kwargs: returns()
    return copied


def _shell(model: nn.Module, trunk: nn.Module, stand_in: nn.Module) -> nn.Module:
    """A copy of the modules from the model down to the trunk, which is replaced.

    All else is shared, so no weight is held twice.
    """
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    # Offloading libraries put a forward bound to the original onto it.
    copied.__dict__.pop("forward", None)
    for name, child in model._modules.items():
        if child is trunk:
            copied._modules[name] = stand_in
        elif child is not None and any(m is trunk for m in child.modules()):
            copied._modules[name] = _shell(child, trunk, stand_in)
    return copied


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
    probs = logits.softmax(-1)
    top_probs = probs.gather(-1, top_ids)
    # Cheaper than a second pass over the vocabulary, and as exact.
    lse = top_logits[:, 0] - top_probs[:, 0].log()
    own_probs = own.softmax(-1)
    own_lse = own.logsumexp(-1)
    mean_logit, own_mean, cross = (
        _expectation(probs, logits),
        _expectation(own_probs, own),
        _expectation(own_probs, logits),
    )
    chosen = logits[:, chosen_id]
    ahead = (logits > chosen[:, None]).view(torch.uint8).sum(-1, dtype=torch.int32)
    return Distribution(
        token_ids=top_ids.cpu(),
        logits=top_logits.cpu(),
        probs=top_probs.cpu(),
        entropy=(lse - mean_logit).clamp_min(0).cpu(),
        chosen_rank=ahead.long().cpu() + 1,
        chosen_prob=(chosen - lse).exp().cpu(),
        kl=(lse - cross - (own_lse - own_mean)).clamp_min(0).cpu(),
    )


def _expectation(probs: Tensor, logits: Tensor) -> Tensor:
    """Σ p · logit over the vocabulary, where 0 · -inf, a token ruled out, counts as 0."""
    found = (probs * logits).sum(-1)
    if torch.isnan(found).any():
        found = torch.nansum(probs * logits, -1)
    return found
