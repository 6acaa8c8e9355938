"""A bfloat16 model's matrices in the order oneDNN multiplies in.

torch hands oneDNN a matrix as it stands, and oneDNN copies it into an order of
its own at every product: for the one token of a decode step, that takes longer
than multiplying. Copied beforehand, the product is the same, bit for bit, in
half the time. The copies are as large as the model.
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

# Below this torch multiplies by itself, and rounds otherwise (ATen's mkldnn_gemm_min_size).
LEAST = 16**3
# Numbers of a product that are compared, for each shape. Where two kernels add up in another
# order (as torch's own does below that size), one in 20,000 is rounded otherwise.
CHECKED = 100_000
# Of the memory that is free, the copies may take so much.
SHARE = 0.25
# Copying takes as long as ten steps, and spares a third of each that follows.
WORTH_STEPS = 32


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights that may be copied, each once.

    None where that would change a product, or never fit.
    """
    if not (has_native_bfloat16() and torch.backends.mkldnn.is_available()):
        return []
    weights = (m.weight for m in model.modules() if type(m) is nn.Linear)
    found = {id(w): w for w in weights if w.dtype == torch.bfloat16 and w.numel() > LEAST}
    of_each_shape = {w.shape: w for w in found.values()}.values()
    same = _fit_into_memory(list(found.values())) and all(map(_is_the_same, of_each_shape))
    return list(found.values()) if same else []


def _fit_into_memory(weights: Sequence[Tensor]) -> bool:
    needed = sum(w.nbytes for w in weights)
    return bool(needed <= SHARE * psutil.virtual_memory().available)


@torch.no_grad()
def _is_the_same(weight: Tensor) -> bool:
    """Whether products with a copy are torch's own, bit for bit, in many numbers."""
    copied = _copy(weight)
    made = torch.Generator().manual_seed(0)
    for _ in range(1 + CHECKED // len(weight)):
        x = torch.randn(1, 1, weight.shape[1], generator=made).to(weight.dtype)
        if not torch.equal(product(x, copied, None), linear(x, weight)):
            return False
    return True


def _copy(weight: Tensor) -> Tensor:
    copied: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return copied


class PrepackedWeights:
    """PrepackedWeights of weights in oneDNN's order, kept from one reply to the next."""

    def __init__(self) -> None:
        self._of: list[tuple[int, int]] = []
        self._copies: list[Tensor] = []

    def of(self, weights: Sequence[Tensor], steps: int) -> list[Tensor]:
        """A copy of each; the weights themselves where so few steps are not worth it.

        So they are where the machine's memory could become short.
        """
        now = [(w.data_ptr(), w._version) for w in weights]
        if now != self._of:
            self.drop()
            if steps < WORTH_STEPS or not _fit_into_memory(weights):
                return list(weights)
            self._of = now
            self._copies = [_copy(w) for w in weights]
        return self._copies

    def drop(self) -> None:
        """Give their memory back."""
        self._of, self._copies = [], []


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` for a weight that may be packed."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@contextmanager
def products_of(model: nn.Module, factors: Mapping[int, Tensor]) -> Iterator[None]:
    """While this lasts, ``model`` multiplies with other tensors, packed or not.

    ``factors`` by the id of the weight they stand for.
    """
    # Scripted, since TorchScript's tracer takes no empty list, which is among the arguments.
    multiply = torch.jit.script(product) if factors else product
    changed = [m for m in model.modules() if type(m) is nn.Linear and id(m.weight) in factors]
    for module in changed:
        module.__dict__["forward"] = _Multiplying(multiply, factors[id(module.weight)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


@dataclass(frozen=True)
class _Multiplying:
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    factor: Tensor
    module: nn.Linear

    def __call__(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.factor, self.module.bias)
