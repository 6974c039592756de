"""Merge adapters into a pruned model without losing its zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..packed.packed_linear import PackedLinear
from .zeros import pruned_zeros


@dataclass(frozen=True)
class MergedLayer:
    """A layer into which an adapter was merged.

    Attributes:
        name: the layer's dotted name in the model.
        dropped: share of the update that fell on pruned weights and was dropped, measured by sums of squares; 0 if the
            layer is not pruned.
    """

    name: str
    dropped: float


@dataclass(frozen=True)
class LoraMerge:
    """The result of :func:`merge_lora`.

    Attributes:
        model: the model without adapters.
        layers: the merged layers, in the order of the model.
        dropped: share of the whole update that was dropped, measured by sums of squares.
    """

    model: Any
    layers: tuple[MergedLayer, ...]
    dropped: float

    def __str__(self) -> str:
        return f"merged {len(self.layers)} layers; the mask dropped {self.dropped:.1%} of the update"


@torch.no_grad()
def merge_lora(model: Any) -> LoraMerge:
    """Merge the active adapters into a pruned model and keep its zeros: W becomes W + m * AB, m the mask of W.

    The merged model is not the adapted one: what the adapters add at pruned places is lost. The result says how much
    that is. Packed layers stay packed.

    Args:
        model: a model of peft with LoRA or other adapters that can be merged, on a pruned or packed model. The base
            model is changed in place.

    Returns:
        The model without adapters, and how much of the update the mask dropped.

    Raises:
        ArgumentError: if the model has no adapters, they are merged already, disabled, or not finite, or no adapted
            layer is pruned; nothing was changed.
    """
    layers = _adapted(model)
    _check(model, layers)
    merged = []
    whole_dropped = whole = 0.0
    for name, layer in layers.items():
        with _dense_base(layer) as base:
            dropped, changed = _merge(layer, base)
        merged.append(MergedLayer(name, dropped / changed if changed else 0.0))
        whole_dropped, whole = whole_dropped + dropped, whole + changed
    return LoraMerge(_unload(model, layers), tuple(merged), whole_dropped / whole if whole else 0.0)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of peft that wrap a layer of the model, by name in the model."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            found[name.removeprefix("base_model.model.")] = module
    return found


def _check(model: nn.Module, layers: dict[str, Any]) -> None:
    if not layers:
        raise ArgumentError(f"this {type(model).__name__} has no adapter that can be merged: give the model of peft")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ArgumentError(
            f"{merged[0]}: its adapter is merged already, so the zeros are lost: load the pruned model and the adapter "
            "again, and merge with ace_triton.merge_lora alone"
        )
    disabled = [name for name, layer in layers.items() if layer.disable_adapters]
    if disabled:
        raise ArgumentError(f"{disabled[0]}: its adapter is disabled: call enable_adapter_layers() on the model first")
    for name, layer in layers.items():
        for part, parameter in layer.named_parameters():
            if set(part.split(".")) & set(layer.active_adapters) and not bool(parameter.isfinite().all()):
                raise ArgumentError(f"{name}.{part}: holds NaN or infinity; train the adapter again, with a lower rate")
    bases = [layer.get_base_layer() for layer in layers.values()]
    if not any(
        isinstance(base, PackedLinear) or any(pruned_zeros(p) is not None for p in base.parameters(recurse=False))
        for base in bases
    ):
        raise ArgumentError("no adapted layer is pruned, so there is no mask to keep: merge with merge_and_unload()")


def _merge(layer: Any, base: nn.Module) -> tuple[float, float]:
    """Merge one adapter. Returns the sum of squares of the dropped part of the update, and of the whole update."""
    weights = [p for p in base.parameters(recurse=False) if p.dim() >= 2]
    before = [weight.detach().clone() for weight in weights]
    layer.merge()
    dropped = changed = 0.0
    for weight, old in zip([p for p in base.parameters(recurse=False) if p.dim() >= 2], before, strict=True):
        changed += _energy(weight.detach() - old)
        zeros = pruned_zeros(old)
        if zeros is not None:
            dropped += _energy(weight.detach()[zeros])
            weight.masked_fill_(zeros, 0)
    return dropped, changed


def _energy(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum())


@contextmanager
def _dense_base(layer: Any) -> Iterator[nn.Module]:
    """The base layer, as a dense one inside the block if it is packed; what the block writes is packed again."""
    holder = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    packed = holder.base_layer
    if not isinstance(packed, PackedLinear):
        yield packed
        return
    dense = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(packed.unpack(), requires_grad=False)
    dense.register_parameter("bias", packed.bias)
    holder.base_layer = dense
    try:
        yield dense
    finally:
        holder.base_layer = packed
    merged = packed.repacked(dense)
    for name, tensor in merged.named_buffers():
        setattr(packed, name, tensor)


def _unload(model: Any, layers: dict[str, Any]) -> Any:
    """The model without its adapters."""
    if hasattr(model, "unload"):
        return model.unload()
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):  # Adapters that were added by add_adapter of transformers.
        model._hf_peft_config_loaded = False
        del model.peft_config
    return model
