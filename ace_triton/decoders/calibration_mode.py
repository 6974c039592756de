"""The mode in which a model runs while it is pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import AceError, ArgumentError


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


@contextmanager
def several_dtypes_named(model: nn.Module) -> Iterator[None]:
    """A context in which an error about dtypes names those of the model's weights if they have several.

    Raises:
        ArgumentError: if a product fails because its inputs and its weight have different dtypes.
    """
    try:
        yield
    except (RuntimeError, ArgumentError) as error:
        reason = error.__cause__ if isinstance(error, ArgumentError) else error
        first: dict[torch.dtype, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                first.setdefault(parameter.dtype, name)
        of_forward = isinstance(reason, RuntimeError) and not isinstance(reason, AceError)
        if not of_forward or "dtype" not in str(reason) or len(first) < 2:
            raise
        listed = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in first.items())
        raise ArgumentError(
            f"{type(model).__name__} cannot run: its weights have several dtypes, {listed}, and its forward does not "
            f"convert between them ({reason}): give all weights one dtype, as with model.to(torch.bfloat16)"
        ) from error
