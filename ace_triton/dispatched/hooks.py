"""The hooks with which accelerate runs a dispatched model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a module that place its weights or inputs on a device."""
    outer = getattr(module, "_hf_hook", None)
    for hook in getattr(outer, "hooks", () if outer is None else (outer,)):
        if hasattr(hook, "execution_device") and hasattr(hook, "weights_map"):
            yield hook


def device_of_hook(hook: Any) -> torch.device:
    """Where a hook lets its module run; the CPU if the hook has no device."""
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its inputs, also if its weights are offloaded and so on the meta device."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    devices = (hook.execution_device for module in model.modules() for hook in hooks_of(module))
    return next((torch.device(device) for device in devices if device is not None), torch.device("cpu"))
