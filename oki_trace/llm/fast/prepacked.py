"""A bfloat16 model's weight matrices, prepacked in oneDNN's layout.

torch passes a matrix to oneDNN in row-major order, and oneDNN reorders it at
every product: for the one token of a decode step, that takes longer than
multiplying. With a prepacked matrix the product is the same, bit for bit, in half the
time. The copies take as much memory as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oki_trace.llm.loading.hardware import has_native_bfloat16
from oki_trace.llm.torch_internals import prepacked, prepacked_linear, scripted, version_of

# Smaller products torch computes itself, and rounds differently (ATen's mkldnn_gemm_min_size).
MIN_SIZE = 16**3
# Numbers of a product that are compared, for each shape. Two kernels that sum in different
# orders differ in one number of 20,000.
CHECKED = 100_000
# The share of the free memory that the copies may take.
MEMORY_SHARE = 0.25
# Copying takes as long as ten steps, and saves a third of each step that follows.
WORTH_STEPS = 32


@dataclass(frozen=True)
class Prepackable:
    """The weights that may be prepacked, each once; ``reason`` says why there are none."""

    weights: tuple[Tensor, ...]
    reason: str | None


def prepackable(model: nn.Module) -> Prepackable:
    """Which weights may be prepacked without changing a product."""
    linears = (m.weight for m in model.modules() if type(m) is nn.Linear)
    weights = {id(w): w for w in linears if w.dtype == torch.bfloat16 and w.numel() > MIN_SIZE}
    reason = None
    if not weights:
        reason = "no large bfloat16 matrices"
    elif not torch.backends.mkldnn.is_available():
        reason = "this build of torch has no oneDNN"
    elif not has_native_bfloat16():
        reason = "the CPU has no bfloat16 instructions"
    elif not _fits_into_memory(list(weights.values())):
        reason = "the copies would take too much memory"
    elif not all(map(_is_exact, {w.shape: w for w in weights.values()}.values())):
        reason = "products with prepacked weights differ on this machine"
    return Prepackable(() if reason else tuple(weights.values()), reason)


def _fits_into_memory(weights: Sequence[Tensor]) -> bool:
    needed = sum(w.nbytes for w in weights)
    return bool(needed <= MEMORY_SHARE * psutil.virtual_memory().available)


@torch.no_grad()
def _is_exact(weight: Tensor) -> bool:
    """Whether products with a copy equal torch's own, bit for bit, in many numbers."""
    copy = prepacked(weight)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1 + CHECKED // len(weight)):
        x = torch.randn(1, 1, weight.shape[1], generator=generator).to(weight.dtype)
        if not torch.equal(prepacked_linear(x, copy, None), linear(x, weight)):
            return False
    return True


class PrepackedWeights:
    """Copies of weights in oneDNN's layout, kept from one reply to the next."""

    def __init__(self) -> None:
        self._sources: list[tuple[int, int]] = []
        self._copies: list[Tensor] = []

    def of(self, weights: Sequence[Tensor], steps: int) -> list[Tensor]:
        """A copy of each weight.

        The weights themselves if ``steps`` are too few to be worth a copy, or if the
        machine's memory could become short.
        """
        sources = [(w.data_ptr(), version_of(w)) for w in weights]
        if sources != self._sources:
            self.drop()
            if steps < WORTH_STEPS or not _fits_into_memory(weights):
                return list(weights)
            self._sources, self._copies = sources, [prepacked(w) for w in weights]
        return self._copies

    def drop(self) -> None:
        """Free the copies."""
        self._sources, self._copies = [], []


@contextmanager
def multiplying_with(model: nn.Module, factors: Mapping[int, Tensor]) -> Iterator[None]:
    """In this context, ``model`` multiplies with other tensors, prepacked or not.

    ``factors`` by the id of the weight that each replaces.
    """
    # Scripted, since TorchScript's tracer takes no empty list, which is among the arguments.
    multiply = scripted(prepacked_linear) if factors else prepacked_linear
    changed = [m for m in model.modules() if type(m) is nn.Linear and id(m.weight) in factors]
    for module in changed:
        module.__dict__["forward"] = _Multiplication(multiply, factors[id(module.weight)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


@dataclass(frozen=True)
class _Multiplication:
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    factor: Tensor
    module: nn.Linear

    def __call__(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.factor, self.module.bias)
