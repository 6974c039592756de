"""Trained values in the dtype of a model's weights."""

from __future__ import annotations

import warnings

import torch


def as_stored(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Trained values in a weight's dtype; finite ones beyond its range become its largest number, with a warning.

    Infinity and NaN, which only a training that diverged gives, stay what they are.

    Args:
        name: the weight's name, for the warning.
        values: fp32.
        dtype: dtype of the weight.
    """
    most = torch.finfo(dtype).max
    too_large = values.isfinite() & (values.abs() > most)
    beyond = int(too_large.sum())
    if beyond:
        warnings.warn(
            f"{name}: {beyond} trained value{'s are' if beyond > 1 else ' is'} beyond {most:,.0f}, the largest number "
            f"of {dtype}, and stored as that number: convert the model to bfloat16 or float32 and recover it again, or "
            "use a smaller learning rate",
            stacklevel=2,
        )
        values = torch.where(too_large, values.clamp(-most, most), values)
    return values.to(dtype)
