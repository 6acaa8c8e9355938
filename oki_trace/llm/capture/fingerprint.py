"""Fingerprints of a model and its tokenizer, which detect a change to either.

The checks of a model are valid until the model changes. Between two traces a user may
replace a module, resize the embeddings, cast, quantize, prune, train, add an adapter
or a hook, or choose another attention implementation. All of this changes the
identities compared here, which are read before each reply, in a few milliseconds and
without running the model. For changes while it runs, each reply checks its own
numbers (``reply_checks.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oki_trace.llm.accelerate_internals import has_hook
from oki_trace.llm.decoding.decoder_thread import autocast_state
from oki_trace.llm.torch_internals import global_hooks, hooks_of, only_watches, version_of
from oki_trace.llm.transformers_internals import attention_name

Fingerprint = tuple[Any, ...]
"""Equal to another where nothing was changed. It keeps no module or tensor alive."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the model as it is now, in the calling thread."""
    return (
        *map(_module, model.modules()),
        *map(_parameter, model.parameters()),
        *map(_metadata, model.buffers()),
        _config(model),
        autocast_state(),
        torch.get_float32_matmul_precision(),
    )


def runs_own_code(model: nn.Module) -> bool:
    """Whether no hook or replaced forward may compute something else than at the last reply.

    A fingerprint cannot tell: such code may read variables of the user's, and Python gives the
    identity of a removed hook to the next one.
    """
    modules = list(model.modules())
    hooks = [*global_hooks(), *(hook for module in modules for hook in hooks_of(module))]
    return all(map(only_watches, hooks)) and not any(
        "forward" in module.__dict__ and not has_hook(module) for module in modules
    )


def tokenizer_fingerprint(tokenizer: Any) -> Fingerprint:
    """The fingerprint of a tokenizer's vocabulary; its chat template is read at every use."""
    return (
        id(tokenizer),
        len(tokenizer),
        tuple(tokenizer.all_special_ids),
        tuple((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items()),
    )


def _module(module: nn.Module) -> tuple[Any, ...]:
    return (
        id(module),
        module.training,
        tuple(map(id, hooks_of(module))),
        # Set by offloading libraries, and by users who patch.
        id(module.__dict__["forward"]) if "forward" in module.__dict__ else None,
        id(getattr(type(module), "forward", None)),
        # An adapter may be switched off or scaled without any other change to a module.
        getattr(module, "_disable_adapters", None),
        str(getattr(module, "_active_adapter", None)),
        str(getattr(module, "scaling", None)),
    )


def _parameter(tensor: Tensor) -> tuple[Any, ...]:
    try:
        address, version = tensor.data_ptr(), version_of(tensor)
    except RuntimeError:  # a quantized tensor may have no address, an inference tensor no version
        address, version = 0, 0
    return id(tensor), address, version, *_metadata(tensor)


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    """Buffers are compared by this alone: a model may write to them as it runs."""
    return type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape)


def _config(model: nn.Module) -> str:
    """All settings that a model's code may read, and its attention implementations."""
    names = ("config", "generation_config")
    configs = [module.__dict__.get(name) for module in model.modules() for name in names]
    distinct = {id(config): config for config in configs if config is not None}.values()
    return "\n".join([*map(attention_name, distinct), *map(_text_of, distinct)])


def _text_of(config: Any) -> str:
    to_dict = getattr(config, "to_dict", None)
    return str(to_dict() if callable(to_dict) else vars(config))
