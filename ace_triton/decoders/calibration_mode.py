"""The mode in which a model runs while it is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, no key-value cache, one expert at a time; what was set before is set again."""
    training = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    settings = {"use_cache": False, "_experts_implementation": "eager"}
    before = [(c, name, getattr(c, name)) for c in configs.values() for name in settings if hasattr(c, name)]
    try:
        model.eval()
        for config, name, _ in before:
            setattr(config, name, settings[name])
        # Tensors of inference mode have no versions, by which one overwritten in place is known.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, name, value in before:
            setattr(config, name, value)
