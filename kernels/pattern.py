"""n:m patterns: which group sizes are supported, and whether a pattern fits a weight."""

from __future__ import annotations

from typing import Literal

import torch

from .errors import ArgumentError

GROUP_SIZES = (2, 4, 8, 16, 32)

Axis = Literal["in", "out"]


def check_pattern(weight: torch.Tensor, n: int, m: int, axis: Axis) -> None:
    """Raise ArgumentError if n:m is invalid, or if m does not divide the size of ``weight`` along ``axis``."""
    if axis not in ("in", "out"):
        raise ArgumentError(f"axis must be 'in' or 'out', got {axis!r}")
    if m not in GROUP_SIZES:
        raise ArgumentError(f"m must be one of {GROUP_SIZES}, got {m!r}")
    if not 0 < n < m:
        raise ArgumentError(f"n of n:m must be between 1 and {m - 1}, got {n!r}")
    size = weight.shape[1] if axis == "in" else weight.shape[0]
    if size % m:
        raise ArgumentError(
            f"{n}:{m} groups along {axis!r} need a multiple of {m}, but the weight has {size} "
            f"{'inputs' if axis == 'in' else 'outputs'} (shape {tuple(weight.shape)})"
        )
