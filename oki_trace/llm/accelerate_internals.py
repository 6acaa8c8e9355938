"""Detects the hooks with which accelerate moves weights and inputs between devices.

``tests/llm/test_internals.py`` fails for each name that a new version removes or changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate moves this module's weights or inputs."""
    return hasattr(module, "_hf_hook")


def moves_weights(model: nn.Module) -> bool:
    """Whether accelerate moves the weights or inputs of any module."""
    return any(map(has_hook, model.modules()))


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that a hook moves the module's inputs to; None without one."""
    device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)
