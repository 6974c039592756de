"""The mode in which a model runs while it is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """A context without gradients and key-value cache, in evaluation mode, with experts run one by one.

    All settings are restored at exit.
    """
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
        # Tensors created in inference mode have no version counter, which detects changes in place.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, name, value in before:
            setattr(config, name, value)
