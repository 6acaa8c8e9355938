"""A model and its tokenizer in brief: what tells whether anything of them was changed.

The checks of a model hold for the model as it was. Between two traces a user may
replace a module, resize the embeddings, cast, quantize, prune, train, add an adapter
or a hook, or choose another attention implementation. All of this shows in the
identities compared here, which are read anew before each reply, in a few
milliseconds and without running the model. What a reply's own numbers say is
checked as well (``reply_checks.py``), for what happens while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oki_trace.llm.torch_internals import hooks_of, version_of
from oki_trace.llm.transformers_internals import attention_name


@dataclass(frozen=True)
class Fingerprint:
    """Two are equal when nothing was changed. No module or tensor is kept alive by it."""

    modules: tuple[Any, ...]
    tensors: tuple[Any, ...]
    config: str
    numerics: tuple[Any, ...]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of the model as it is now, in the calling thread."""
    return Fingerprint(
        modules=tuple(_module(module) for module in model.modules()),
        tensors=(*map(_parameter, model.parameters()), *map(_form, model.buffers())),
        config=_config(model),
        numerics=numerics(),
    )


def tokenizer_fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    """Of a tokenizer's vocabulary as it is now; its chat template is read at every use."""
    return (
        id(tokenizer),
        len(tokenizer),
        tuple(tokenizer.all_special_ids),
        tuple((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items()),
    )


def numerics() -> tuple[Any, ...]:
    """The settings of this thread and process under which a model computes."""
    device_types = {"cpu", *(_accelerator())}
    return (
        *((kind, torch.is_autocast_enabled(kind)) for kind in sorted(device_types)),
        *((kind, torch.get_autocast_dtype(kind)) for kind in sorted(device_types)),
        torch.get_float32_matmul_precision(),
    )


def _accelerator() -> Iterator[str]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        yield found.type


def _module(module: nn.Module) -> tuple[Any, ...]:
    return (
        id(module),
        module.training,
        tuple(map(id, hooks_of(module))),
        # Put there by offloading libraries, and by users who patch.
        id(module.__dict__["forward"]) if "forward" in module.__dict__ else None,
        id(getattr(type(module), "forward", None)),
        # An adapter may be switched off or scaled without any module changing.
        getattr(module, "_disable_adapters", None),
        str(getattr(module, "_active_adapter", None)),
        str(getattr(module, "scaling", None)),
    )


def _parameter(tensor: Tensor) -> tuple[Any, ...]:
    try:
        place, version = tensor.data_ptr(), version_of(tensor)
    except RuntimeError:  # quantized tensors have no one place, inference tensors no version
        place, version = 0, 0
    return id(tensor), place, version, *_form(tensor)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """All that is compared of a buffer: a model may write to its buffers as it runs."""
    return type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape)


def _config(model: nn.Module) -> str:
    """All settings that a model's code may read, and the names of its attention."""
    configs = {id(config): config for config in _configs(model)}.values()
    names = [attention_name(config) for config in configs]
    return "\n".join([*names, *(_text_of(config) for config in configs)])


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = module.__dict__.get(name)
            if config is not None:
                yield config


def _text_of(config: Any) -> str:
    to_dict = getattr(config, "to_dict", None)
    return str(to_dict() if callable(to_dict) else vars(config))
