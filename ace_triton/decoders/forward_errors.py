"""Errors of the model's own forward on the batches of a calibration set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import AceError, ArgumentError
from ..out_of_memory import is_out_of_memory

ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""Errors that a forward may raise if its inputs do not fit."""


@contextmanager
def forward_errors_named(
    model: nn.Module, number: int | None, inputs: Mapping[str, torch.Tensor], longest: int | None
) -> Iterator[None]:
    """A context in which an error of the model's forward names the batch that runs.

    Args:
        model: the model.
        number: the batch's place in the calibration set. None if the caller gave token ids; then errors pass unchanged.
        inputs: the arguments of the forward.
        longest: the model's maximum number of positions; None if unknown.

    Raises:
        ArgumentError: if the forward fails, but not for lack of memory. The forward's error is its cause.
    """
    try:
        yield
    except ERRORS as error:
        if number is None or isinstance(error, AceError) or is_out_of_memory(error):
            raise
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        ids = inputs.get("input_ids")
        if longest is not None and ids is not None and ids.dim() == 2 and ids.shape[1] > longest:
            advice = f"it has {ids.shape[1]} tokens, and the model takes at most {longest}: use shorter sequences"
        else:
            advice = "give inputs that the model's own forward takes"
        raise ArgumentError(
            f"{type(model).__name__} cannot run on calibration[{number}] ({shapes}): "
            f"{type(error).__name__}: {' '.join(str(error).split())}; {advice}"
        ) from error
