"""weight_sums: RIA's row and column sums of |W| in one read of the weight.

R_i = sum_j |W_ij|,   C_j = sum_i |W_ij|      (RIA, "Plug-and-Play", ICLR 2024)
"""

from __future__ import annotations

import torch

from . import cpu
from .backend import choose_backend


def weight_sums(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums [out_features] and column sums [in_features] of |weight|, fp32, deterministic.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if choose_backend(weight) == "cpu":
        return cpu.weight_sums(weight)
    return weight_sums_reference(weight)


def weight_sums_reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, summed in fp64."""
    magnitude = weight.detach().double().abs()
    return magnitude.sum(1).float(), magnitude.sum(0).float()
