"""Fuse the packed layers of a block that read the same tokens, so that decoding makes one product in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..kernels.packed_nm import PackedNM
from .dispatch import choose_product
from .nm_linear import NMLinear
from .packed_linear import PackedLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that read the same tokens, in the order in which they are called."""

MOST_ROWS = 16
"""Calls with more rows run each layer by itself: there the time of a call matters little."""


def none_to_fuse(option: str) -> str:
    """The message if ``option`` asks to fuse a model whose products do not fit together."""
    names = " or ".join(", ".join(group) for group in GROUPS)
    return f"{option}: no packed layers named {names} fit together"


def fuse_products(model: nn.Module) -> int:
    """Fuse the products of queries, keys and values, and of gate and up projections, in place.

    Their packed rows become one weight, and each layer keeps a view of its own rows, so the model takes no more memory.
    Its layers, their names and the files that it is saved to stay the same. A call without gradients, and with up to
    ``MOST_ROWS`` tokens that our kernel multiplies, makes one product for the group. On a CPU its outputs are those of
    the separate layers bit for bit. A group is taken apart by itself if its layers get different tokens, or if the
    weights or the bias of one are replaced, as by ``model.to``.

    Args:
        model: a module with packed layers.

    Returns:
        The number of groups that were fused. Layers that differ in pattern, bits, dtype, device or the presence of a
        bias, and layers with hooks, stay separate.
    """
    groups = 0
    for module in model.modules():
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            if _alike(layers):
                Fused(layers)  # type: ignore[arg-type]
                groups += 1
    return groups


class Fused:
    """The product of some layers that read the same tokens.

    The first layer computes it, the others take their part. A copy of a layer is not fused.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[NMLinear]) -> None:
        self._layers = tuple(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._last: tuple[torch.Tensor, int, tuple[torch.Tensor, ...]] | None = None
        self._whole = _joined(layers)
        self._places = self._found_places()
        for layer in layers:
            layer._fused = self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def outputs(self, layer: PackedLinear, tokens: torch.Tensor) -> torch.Tensor | None:
        """The outputs of one of the layers; None if it must compute them itself."""
        if not any(layer is own for own in self._layers):  # A shallow copy of one of them.
            return None
        if layer is self._layers[0]:
            return self._first(tokens) if self._takes(tokens) and self._is_whole() else None
        last = self._last
        if last is None:
            return None
        known, version, parts = last
        if known is not tokens or version != _version(tokens):
            self.part()
            return None
        if layer is self._layers[-1]:
            self._last = None
        return next(own for one, own in zip(self._layers, parts, strict=True) if one is layer)

    def part(self) -> None:
        """Take the group apart."""
        self._last = None
        for layer in self._layers:
            layer._fused = None

    def _is_whole(self) -> bool:
        """True if each layer still has its view of the joined rows; else the group is taken apart."""
        if self._found_places() == self._places:
            return True
        self.part()
        return False

    def _found_places(self) -> list[int | None]:
        """Addresses of the layers' tensors."""
        tensors = (tensor for layer in self._layers for tensor in (*layer._buffers.values(), layer._parameters["bias"]))
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def _first(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self._whole(tokens).split(self._sizes, dim=-1)
        if tokens.numel() > tokens.shape[-1]:
            parts = tuple(part.contiguous() for part in parts)
        self._last = tokens, _version(tokens), parts
        return parts[0]

    def _takes(self, tokens: torch.Tensor) -> bool:
        whole = self._whole
        whole.limits = self._layers[0].limits
        return (
            type(tokens) is torch.Tensor
            and 0 < tokens.numel() <= MOST_ROWS * whole.in_features
            and tokens.shape[-1] == whole.in_features
            and tokens.dtype == whole.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(tokens.device.type)
            and forward_ad._current_level < 0
            and not torch._C._are_functorch_transforms_active()
            and choose_product(tokens.numel() // whole.in_features, whole.packed, whole.limits) == "packed"
        )


def _alike(layers: Sequence[Any]) -> bool:
    """True if layers can be fused."""
    if not all(type(layer) is NMLinear and layer._fused is None for layer in layers):
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks or layer.values.is_meta for layer in layers):
        return False
    kinds = {(layer.in_features, layer.n, layer.m, layer.bits, layer.group, layer.dtype) for layer in layers}
    rest = {(layer.values.device, layer.bias is None, layer.limits) for layer in layers}
    return len(kinds) == len(rest) == 1 and len({id(layer) for layer in layers}) == len(layers)


@torch.no_grad()
def _joined(layers: Sequence[NMLinear]) -> NMLinear:
    """One layer with the rows of all, which become views of it."""
    first = layers[0]
    whole: dict[str, torch.Tensor] = {}
    for name in ("values", "meta", "absmax", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            continue
        whole[name] = torch.cat([part.detach() for part in parts])
        for layer, own in zip(layers, whole[name].split([layer.out_features for layer in layers]), strict=True):
            if name == "bias":
                layer.bias.data = own  # type: ignore[union-attr]
            else:
                setattr(layer, name, own)
    shape = (sum(layer.out_features for layer in layers), first.in_features)
    packed = PackedNM(whole["values"], whole["meta"], first.n, first.m, shape, whole.get("absmax"), first.group)
    bias = whole.get("bias")
    return NMLinear(packed, None if bias is None else nn.Parameter(bias, requires_grad=False), first.limits).eval()


def _version(tokens: torch.Tensor) -> int:
    """Counts writes to a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tokens.is_inference() else tokens._version
