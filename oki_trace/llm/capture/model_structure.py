"""Where a model keeps its blocks, and what it does after the last one.

Nothing here knows a model family. One short forward pass is watched, and the
parts are told by what they do: the blocks are the list of modules, one a
layer, that ran in order; the trunk is the outermost module that holds them;
the tail is what ran inside the trunk after the last block (a final norm,
sometimes a projection). Whether the guess is right is decided by the numbers,
in ``lens.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from oki_trace.errors import CaptureError
from oki_trace.llm.loading.hardware import input_device


@dataclass(frozen=True)
class ModelStructure:
    """The parts of one model. ``trunk`` is None when the model calls its blocks itself.

    ``position_axis`` is where a block's output counts positions: 1, or 2 where
    several residual streams come before the batch. ``repeats`` says that blocks
    run more than once in one pass. The outputs are those of the hooks. The model
    itself is not kept alive by it.
    """

    reference: weakref.ref[nn.Module]
    blocks: tuple[nn.Module, ...]
    trunk: nn.Module | None
    tail: tuple[nn.Module, ...]
    position_axis: int
    repeats: bool
    trunk_output: Any = field(repr=False)
    block_output: Any = field(repr=False)
    dummy_ids: torch.Tensor = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The model, as long as somebody holds it."""
        model = self.reference()
        if model is None:
            raise CaptureError("The model is gone. Keep a reference to it while it is traced.")
        return model

    @property
    def layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers' numbers, 1 to L."""
        return tuple(range(1, self.layers + 1))

    def layer_of(self) -> dict[nn.Module, int]:
        """The layer, 1 to L, of every module inside a block."""
        return {m: i for i, block in enumerate(self.blocks, 1) for m in block.modules()}


@dataclass
class _Call:
    module: nn.Module
    parent: nn.Module | None
    output: Any = None
    ended: int = -1


def find_structure(model: Any) -> ModelStructure:
    """Run the model once on a few tokens and name its parts.

    Raises CaptureError when no list of blocks can be told apart, or when the
    model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder. Choose a model that only decodes."
        )
    dummy_ids = dummy_token_ids(model)
    with _watching(model) as calls, torch.no_grad():
        model(input_ids=dummy_ids, use_cache=False)
    blocks = _blocks(model, calls)
    holders = {m for m in model.modules() if set(blocks) <= set(m.modules())}
    outer = [c for c in calls if c.module in holders and c.module is not model]
    trunk = outer[0] if outer else None
    last = next(c for c in reversed(calls) if c.module is blocks[-1])
    after = [c for c in calls[last.ended :] if c.parent in holders and c.parent is not model]
    return ModelStructure(
        reference=weakref.ref(model),
        blocks=blocks,
        trunk=trunk.module if trunk else None,
        tail=_tail(last, after, trunk),
        position_axis=_position_axis(residual_stream(last.output), dummy_ids.shape[1]),
        repeats=sum(c.module is last.module for c in calls) > 1,
        trunk_output=trunk.output if trunk else None,
        block_output=last.output,
        dummy_ids=dummy_ids,
    )


def residual_stream(output: Any) -> torch.Tensor:
    """The residual stream in what a block, a norm or a trunk puts out: all of it, or its first."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def dummy_token_ids(model: Any, length: int = 11) -> torch.Tensor:
    """A few valid token ids, shape (1, length), on the device of the embeddings.

    The length is one that no size of a model is likely to have, so that an axis
    of that size counts positions.
    """
    vocab = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(3, 3 + length) * 7 % vocab
    return ids[None].to(input_device(model))


def _blocks(model: Any, calls: list[_Call]) -> tuple[nn.Module, ...]:
    depth = _declared_depth(model)
    called = {call.module: i for i, call in enumerate(calls)}
    lists = [
        tuple(m for m in candidate if m in called)
        for candidate in model.modules()
        if isinstance(candidate, nn.ModuleList)
    ]
    in_order = [ran for ran in lists if ran and _ascending([called[m] for m in ran])]
    # The depth a config declares is a hint: some count their layers otherwise.
    best = max([r for r in in_order if len(r) == depth] or in_order, key=_parameters, default=())
    if not best:
        raise CaptureError(
            f"No list of layers was found in {type(model).__name__}: "
            "it cannot be traced layer by layer. Choose another model."
        )
    return best


def _tail(last: _Call, after: list[_Call], trunk: _Call | None) -> tuple[nn.Module, ...]:
    """The modules from the last block to what the trunk returns; a pooler beside it is left out."""
    returned = None if trunk is None else residual_stream(trunk.output)
    if residual_stream(last.output) is returned:
        return ()
    for count, call in enumerate(after, 1):
        is_stream = isinstance(call.output, (torch.Tensor, tuple))
        if is_stream and residual_stream(call.output) is returned:
            return tuple(c.module for c in after[:count])
    return tuple(c.module for c in after)


def _position_axis(stream: torch.Tensor, length: int) -> int:
    """The axis of ``length`` that follows a batch of one; 1, the usual place, if there is none."""
    shape = tuple(stream.shape)
    return next((i for i in range(1, len(shape)) if shape[i - 1 : i + 1] == (1, length)), 1)


def _ascending(numbers: list[int]) -> bool:
    return numbers == sorted(numbers)


def _declared_depth(model: Any) -> int | None:
    config = model.config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", None)
    return int(depth) if isinstance(depth, int) else None


def _parameters(modules: tuple[nn.Module, ...]) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[_Call]]:
    """Record every module call below ``model``, in order of entry."""
    calls: list[_Call] = []
    stack: list[_Call] = []

    def enter(module: nn.Module, args: Any) -> None:
        call = _Call(module, stack[-1].module if stack else None)
        calls.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.output = output
        call.ended = len(calls)

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
