"""The only module that uses undocumented parts of torch, or TorchScript.

``pyproject.toml`` bounds torch above because of this module, and
``tests/llm/test_internals.py`` fails for each name that a new version removes or changes.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks that run before and after the module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def global_hooks() -> list[Any]:
    """The hooks that run before and after the forward of every module of the process."""
    return [*_modules._global_forward_pre_hooks.values(), *_modules._global_forward_hooks.values()]


def only_watches(hook: Any) -> bool:
    """Whether a hook is one of transformers or of this package, which change no result."""
    return str(getattr(hook, "__module__", "")).startswith(("transformers.", "oki_trace.llm."))


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's direct children by name, a shared one under each of its names."""
    return dict(module._modules)


def shallow_copy(
    module: nn.Module, children: dict[str, nn.Module | None], *, keep_hooks: bool
) -> nn.Module:
    """A copy that shares the module's parameters and has other children."""
    copied = copy.copy(module)
    copied._modules = children
    if not keep_hooks:
        copied._forward_hooks = OrderedDict()
        copied._forward_pre_hooks = OrderedDict()
    # Offloading libraries store a forward there that is bound to the original.
    copied.__dict__.pop("forward", None)
    return copied


def version_of(tensor: Tensor) -> int:
    """Grows with every change in place. Raises RuntimeError for an inference tensor."""
    return tensor._version


@contextmanager
def tensors_replaced(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """In this context, ``model`` uses the ``replacements`` of parameters and buffers, by id."""
    kinds = ("_parameters", "_buffers")
    before = [(module, kind, module.__dict__[kind]) for module in model.modules() for kind in kinds]
    for module, kind, tensors in before:
        replaced = {name: replacements.get(id(own), own) for name, own in tensors.items()}
        module.__dict__[kind] = replaced
    try:
        yield
    finally:
        for module, kind, tensors in before:
            module.__dict__[kind] = tensors


# ---------------------------------------------------------------- torch.compile


def uncompiled(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; any other model itself."""
    while isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original
    return model


@contextmanager
def compiled_calls_off(model: nn.Module) -> Iterator[None]:
    """In this context, modules run uncompiled, whether ``compile()`` or their forward was set."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        for name in ("_compiled_call_impl", "forward"):
            compiled = module.__dict__.get(name)
            original = getattr(compiled, "_torchdynamo_orig_callable", None)
            if compiled is not None and (name != "forward" or original is not None):
                before.append((module.__dict__, name, compiled))
                module.__dict__[name] = original if name == "forward" else None
    try:
        yield
    finally:
        for attributes, name, compiled in before:
            attributes[name] = compiled


# ---------------------------------------------------------------- oneDNN


def prepacked(weight: Tensor) -> Tensor:
    """A copy of a bfloat16 matrix in oneDNN's own layout, for a product with one row."""
    copied: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return copied


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` for a weight that may be prepacked. Can be scripted."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


# ---------------------------------------------------------------- TorchScript (deprecated)


def no_torchscript() -> str | None:
    """Why TorchScript is not used on this Python; None if it is."""
    unsupported = sys.version_info >= (3, 14)
    return "torch does not support TorchScript on Python 3.14" if unsupported else None


def traced(function: Callable[..., Any], example: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """``function`` as a graph, and a warning for each branch of Python on a tensor."""
    tracer_warning: Any = torch.jit.TracerWarning  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracer_warning.ignore_lib_warnings()
        tracing: Any = torch.jit._trace
        names = tracing.get_callable_argument_names(function)
        lookup = tracing._create_interpreter_name_lookup_fn(0)
        # torch.jit.trace() would keep every graph, some megabytes, until the process ends.
        graph, _ = torch._C._create_graph_by_tracing(
            function, example, lookup, True, False, None, names
        )
    whole: Any = torch._C._create_function_from_graph("step", graph)
    return whole, [warning for warning in caught if issubclass(warning.category, tracer_warning)]


def scripted(function: Callable[..., Any]) -> Any:
    """``function`` compiled by TorchScript, for a call that the tracer does not record."""
    return torch.jit.script(function)


def without_fusion() -> Any:
    """The context in which a graph's operations run one by one, as the model's do."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
