"""Finds a model's blocks, and the modules that run after the last block.

No model family is named here. One short forward pass is recorded, and the parts
are recognised by what they do: the blocks are the list of modules, one per layer,
that ran in order; the trunk is the outermost module that holds them (the base
model, in most families); the final modules ran inside the trunk after the last
block (a norm, sometimes a projection). ``checks.py`` verifies the result.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oki_trace.errors import CaptureError
from oki_trace.llm.loading.hardware import input_device


@dataclass(frozen=True)
class ModelStructure:
    """The parts of one model, which it does not keep alive.

    ``trunk`` is None when the model calls its blocks itself. ``position_axis`` is the
    axis of positions in a block's output: 1, or 2 where several residual streams come
    before the batch. ``repeats``: blocks run more than once in one pass. The two
    outputs are those of the trunk and of the last block for ``dummy_ids`` (1, T).
    """

    reference: weakref.ref[nn.Module]
    blocks: tuple[nn.Module, ...]
    trunk: nn.Module | None
    final_modules: tuple[nn.Module, ...]
    position_axis: int
    repeats: bool
    trunk_output: Any = field(repr=False)
    block_output: Any = field(repr=False)
    dummy_ids: Tensor = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The model. Raises CaptureError when nothing else refers to it any more."""
        model = self.reference()
        if model is None:
            raise CaptureError(
                "The model no longer exists. Keep a reference to it while it is traced."
            )
        return model

    @property
    def layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    @property
    def streams(self) -> int:
        """The number of residual streams, 1 in most models."""
        shape = residual_stream(self.block_output).shape
        return math.prod(shape) // (shape[-1] * self.dummy_ids.shape[1])

    def layer_of(self) -> dict[nn.Module, int]:
        """The layer, 1 to L, of every module inside a block."""
        return {m: i for i, block in enumerate(self.blocks, 1) for m in block.modules()}


@dataclass
class _Call:
    """A call of ``module`` by ``parent``; ``end`` counts the calls begun before it returned."""

    module: nn.Module
    parent: nn.Module | None
    output: Any = None
    end: int = -1


def find_structure(model: Any) -> ModelStructure:
    """Run the model once on a few tokens and identify its parts.

    Raises CaptureError when no list of blocks is found, or when the model is an
    encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder. Choose a decoder-only model that "
            "generates text."
        )
    dummy_ids = dummy_token_ids(model)
    with _recorded_calls(model) as calls, torch.no_grad():
        model(input_ids=dummy_ids, use_cache=False)
    blocks = _blocks(model, calls)
    holders = {m for m in model.modules() if set(blocks) <= set(m.modules())}
    trunk = next((c for c in calls if c.module in holders and c.module is not model), None)
    last = next(c for c in reversed(calls) if c.module is blocks[-1])
    after = [c for c in calls[last.end :] if c.parent in holders and c.parent is not model]
    return ModelStructure(
        reference=weakref.ref(model),
        blocks=blocks,
        trunk=trunk.module if trunk else None,
        final_modules=_final_modules(last, after, trunk),
        position_axis=_position_axis(residual_stream(last.output), dummy_ids.shape[1]),
        repeats=sum(c.module is last.module for c in calls) > 1,
        trunk_output=trunk.output if trunk else None,
        block_output=last.output,
        dummy_ids=dummy_ids,
    )


def residual_stream(output: Any) -> Tensor:
    """The residual stream in the output of a block, norm or trunk: all of it, or its first item."""
    stream: Tensor = output if isinstance(output, Tensor) else output[0]
    return stream


def dummy_token_ids(model: Any, length: int = 11) -> Tensor:
    """Valid token ids, shape (1, length), on the device of the embeddings.

    No size of a model is likely to be 11, so an axis of that size counts positions.
    """
    vocab = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(3, 3 + length) * 7 % vocab
    return ids[None].to(input_device(model))


def _blocks(model: Any, calls: list[_Call]) -> tuple[nn.Module, ...]:
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    last_call = {call.module: i for i, call in enumerate(calls)}
    in_order: list[tuple[nn.Module, ...]] = []
    for module_list in model.modules():
        if isinstance(module_list, nn.ModuleList):
            called = tuple(m for m in module_list if m in last_call)
            if called and list(called) == sorted(called, key=last_call.__getitem__):
                in_order.append(called)
    # The depth in the config is a hint: some configs count their layers otherwise.
    candidates = [modules for modules in in_order if len(modules) == depth] or in_order
    if not candidates:
        raise CaptureError(
            f"No list of layers was found in {type(model).__name__}: "
            "it cannot be traced layer by layer. Choose another model."
        )
    return max(candidates, key=lambda modules: sum(_parameter_count(m) for m in modules))


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _final_modules(last: _Call, after: list[_Call], trunk: _Call | None) -> tuple[nn.Module, ...]:
    """The modules between the last block and the value that the trunk returns.

    Modules that do not lead to that value, such as a pooler, are left out.
    """
    returned = None if trunk is None else residual_stream(trunk.output)
    if residual_stream(last.output) is returned:
        return ()
    for count, call in enumerate(after, 1):
        is_stream = isinstance(call.output, (Tensor, tuple))
        if is_stream and residual_stream(call.output) is returned:
            return tuple(c.module for c in after[:count])
    return tuple(c.module for c in after)


def _position_axis(stream: Tensor, length: int) -> int:
    """The axis of size ``length`` after a batch of one; 1, the usual one, if there is none."""
    shape = tuple(stream.shape)
    return next((i for i in range(1, len(shape)) if shape[i - 1 : i + 1] == (1, length)), 1)


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Record every module call below ``model``, in the order in which the calls begin."""
    calls: list[_Call] = []
    stack: list[_Call] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(_Call(module, stack[-1].module if stack else None))
        calls.append(stack[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.output = output
        call.end = len(calls)

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
