"""Detects layers whose weight is computed from other tensors. A write to such a weight is lost."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize, prune


def computed_weight(layer: nn.Module) -> str | None:
    """The reason why a write to ``layer.weight`` would be lost, and how to make the weight permanent.

    None if the weight is stored.

    A stored weight is a parameter or a buffer of the layer. Other weights come from a parametrization, a mask of
    ``torch.nn.utils.prune``, or a hook that sets the weight before each forward (old weight and spectral norm).
    """
    if "weight" in layer._parameters or "weight" in layer._buffers:
        return None
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.get_submodule("parametrizations.weight").children()
        steps = ", ".join(type(step).__name__.lstrip("_") for step in chain)
        return (
            f"its weight is computed by a parametrization ({steps}); make it permanent first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "_tensor_name", getattr(hook, "name", None)) != "weight":
            continue
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            return (
                f"its weight is computed by a mask of torch.nn.utils.prune ({kind}); make it permanent first: "
                "torch.nn.utils.prune.remove(layer, 'weight')"
            )
        remedy = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}.get(kind)
        if remedy is not None:
            return (
                f"its weight is computed by {kind} before each forward; make it permanent first: "
                f"torch.nn.utils.{remedy}(layer)"
            )
    return (
        "its weight is computed, not stored as a parameter; make it permanent first: "
        "layer.weight = nn.Parameter(layer.weight.detach().clone())"
    )
