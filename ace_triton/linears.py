"""Linear layers: which modules are linear, and their weight in the form that the kernels take."""

from __future__ import annotations

import torch
from torch import nn

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def as_kernel_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy in fp32 if the kernels do not support its dtype (fp64, fp8)."""
    return tensor if tensor.dtype in KERNEL_DTYPES else tensor.float()


def is_linear(layer: nn.Module) -> bool:
    """True if ``layer`` is an ``nn.Linear`` or a Conv1D of transformers."""
    return isinstance(layer, nn.Linear) or (type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"))


def linear_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight as a view [out_features, in_features]; None if ``layer`` is not a linear layer."""
    weight = getattr(layer, "weight", None) if is_linear(layer) else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return weight.detach() if isinstance(layer, nn.Linear) else weight.detach().t()
