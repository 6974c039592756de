"""Checks that a layer's weight can be pruned in place."""

from __future__ import annotations

import torch
from torch import nn

from .computed_weight import computed_weight
from .errors import PruneError
from .kernels.finite import all_finite
from .kernels.finite_check import FiniteCheck
from .kernels.memory import overlaps, why_no_memory, why_not_plain
from .linears import KERNEL_DTYPES, as_kernel_dtype, is_linear, linear_weight
from .tied import Owners


def check_weight(layer: nn.Module, label: str) -> torch.Tensor:
    """The weight as [out_features, in_features], not read yet; PruneError if it cannot be pruned."""
    computed = computed_weight(layer) if is_linear(layer) else None
    if computed is not None:
        raise PruneError(f"{label}: {computed}")
    weight = linear_weight(layer)
    if weight is None:
        raise PruneError(f"{label}: a {type(layer).__name__} is no nn.Linear; only linear layers can be pruned")
    if (why := why_not_plain(weight)) is not None:
        raise PruneError(f"{label}: the weight {why}")
    if weight.layout is not torch.strided:
        raise PruneError(f"{label}: the weight is sparse ({weight.layout}); make it dense first (weight.to_dense())")
    if not weight.is_contiguous() and overlaps(weight):
        raise PruneError(
            f"{label}: elements of the weight share memory with each other; clone it first (weight.clone())"
        )
    if weight.device.type == "meta":
        raise PruneError(f"{label}: the weight is on the meta device and holds no numbers; load it first")
    if not weight.dtype.is_floating_point:
        raise PruneError(
            f"{label}: the weight is stored as {weight.dtype} (quantized?); prune the floating-point model and "
            "quantize afterwards"
        )
    if weight.dtype not in KERNEL_DTYPES and (why := why_no_memory(weight)) is not None:
        raise PruneError(f"{label}: the weight {why}")
    return weight


def check_untied(layer: nn.Module, model: nn.Module, label: str) -> None:
    """PruneError if the layer's weight shares memory with another parameter of the model."""
    weight = layer.get_parameter("weight")
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is layer), None)
    tied = Owners(model).others(weight, name)
    if tied:
        raise PruneError(
            f"{label}: its weight is tied to {tied[0]}, which would be pruned with it; "
            "untie it first (layer.weight = nn.Parameter(layer.weight.clone()))"
        )


def check_finite(weight: torch.Tensor, label: str, finite: FiniteCheck) -> None:
    """PruneError if the weight holds NaN or infinity; reads it unless a launch has checked it already.

    Args:
        finite: what is known; keeps the result.
    """
    if finite.passed(weight):
        return
    try:
        passed = all_finite(as_kernel_dtype(weight))
    except ValueError as error:
        raise PruneError(f"{label}: the weight cannot be read: {error}") from error
    if not passed:
        raise PruneError(f"{label}: the weight holds NaN or infinity; repair the checkpoint before pruning it")
    finite.record(weight)
