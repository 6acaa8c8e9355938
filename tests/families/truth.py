"""A model's own numbers, computed without any code of the project.

Full forward passes without a cache, the model's own eager attention, and
``generate()``. The lens is asked of the model's own code: a forward pass whose
last block is made to put out what an earlier block did, so that all that comes
after it (norm, head, softcap, scale, bias) is done by the model, whatever it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Generated:
    """The result of ``generate()`` for a prompt: the tokens, and the logits (vocab,) of each step.

    ``attention`` has for each step the eager weights of its newest position,
    (heads, keys) for every layer that gives any.
    """

    tokens: list[int]
    logits: list[Tensor]
    attention: list[list[Tensor]]


@torch.no_grad()
def generated(model: Any, prompt: list[int], count: int, **settings: Any) -> Generated:
    """The ``count`` tokens that ``generate()`` adds to ``prompt``."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return Generated(
        tokens=out.sequences[0, len(prompt) :].tolist(),
        logits=[step[0].float() for step in out.logits],
        attention=[[w[0, :, -1] for w in _weights(step)] for step in out.attentions or ()],
    )


def _weights(found: Any) -> list[Tensor]:
    return [w for w in found or () if isinstance(w, Tensor) and w.ndim == 4]


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """Whether a token's logits depend on tokens that come after it."""
    ids = torch.arange(40, 52)[None]
    other = ids.clone()
    other[0, -1] += 7
    first, second = (model(input_ids=i, use_cache=False).logits[0, :-1] for i in (ids, other))
    return bool((first - second).abs().max() > 1e-3)


def adds_tokens(model: Any) -> bool:
    """Whether ``generate()`` runs the model on an additional mask token."""
    ids = torch.arange(40, 52)[None]
    inputs = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids))
    return bool(inputs["input_ids"].shape[1] > ids.shape[1])


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    """The model's logits at every position of ``ids``: (T, vocab)."""
    found: Tensor = whole_pass(model, ids).logits[0]
    return found.float()


@torch.no_grad()
def whole_pass(model: Any, ids: list[int], **options: Any) -> Any:
    """One pass over all of ``ids`` without a cache, positions counted as generate() does."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.arange(len(ids))[None]
    return model(input_ids=torch.tensor([ids]), use_cache=False, **options)


@torch.no_grad()
def block_outputs(model: Any, blocks: tuple[nn.Module, ...], ids: list[int]) -> list[Any]:
    """The input of block 1, then the output of each block, for all of ``ids``: L+1 streams."""
    streams: list[Any] = [None] * (len(blocks) + 1)

    def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams[0] = (args[0] if args else kwargs["hidden_states"]).clone()

    def keeper(layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            streams[layer] = (output if isinstance(output, Tensor) else output[0]).clone()

        return keep

    handles = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    handles += [b.register_forward_hook(keeper(i)) for i, b in enumerate(blocks, 1)]
    try:
        whole_pass(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return streams


@torch.no_grad()
def logits_had_it_ended_with(model: Any, last: nn.Module, ids: list[int], stream: Tensor) -> Tensor:
    """The logits (T, vocab) of a forward pass in which block ``last`` returns ``stream``."""

    def put(module: Any, args: Any, output: Any) -> Any:
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    with _hooked(last, put):
        return logits(model, ids)


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def eager_twin(model: Any) -> Any:
    """The same model, built to run its own eager attention."""
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype).eval()


@torch.no_grad()
def eager_attention(twin: Any, ids: list[int]) -> list[Tensor]:
    """The weights of every layer that has any over token positions: (heads, T, T)."""
    found = getattr(whole_pass(twin, ids, output_attentions=True), "attentions", None)
    whole = (len(ids), len(ids))
    return [w[0] for w in _weights(found) if w.shape[-2:] == whole]
