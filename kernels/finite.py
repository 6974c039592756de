"""all_finite: is every element a finite number, in one read and no write."""

from __future__ import annotations

import torch

from . import cpu
from .backend import choose_backend


def all_finite(tensor: torch.Tensor) -> bool:
    """True where ``tensor`` (any shape; fp32, fp16 or bf16) holds neither NaN nor infinity."""
    if choose_backend(tensor) == "cpu":
        return cpu.all_finite(tensor)
    return all_finite_reference(tensor)


def all_finite_reference(tensor: torch.Tensor) -> bool:
    """The same in plain torch."""
    return bool(torch.isfinite(tensor.detach()).all())
