"""The calls of a packed layer on a GPU whose kernels are bound, so that decoding takes little time on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from ..kernels.backend import backend_of_device
from ..kernels.bound_launch import BoundCall
from ..kernels.linear_call import MOST_BOUND_TOKENS
from .dispatch import product_for
from .products import BoundProduct, Product, RowLimits, registry

if TYPE_CHECKING:
    from .packed_linear import PackedLinear

MOST_CALLS = 16
"""Calls of a layer that are kept, by the shape of their tokens. Later shapes use the launcher."""


@dataclass(frozen=True)
class _Known:
    """A call: its launches, its product, and what chose it."""

    bound: BoundCall
    product: BoundProduct
    limits: RowLimits | None
    products: tuple[Product, ...]


class BoundCalls:
    """The calls of one layer, by the shape of their tokens. A copy of the layer starts without any."""

    def __init__(self) -> None:
        self._calls: dict[torch.Size, _Known] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundCalls:
        return BoundCalls()

    def __reduce__(self) -> tuple[type[BoundCalls], tuple[()]]:
        return BoundCalls, ()

    def outputs(self, layer: PackedLinear, tokens: torch.Tensor) -> torch.Tensor | None:
        """The outputs [..., out_features] if a bound product takes this call and no gradient needs a record of it.

        The first call of a shape goes through the launcher, which compiles the kernel. So does the first one after the
        layer got tensors of another shape or dtype. None if the launcher must take the call.
        """
        if not _is_plain_call(layer, tokens):
            return None
        call = self._calls.get(tokens.shape)
        if call is None or call.limits is not layer.limits or call.products is not registry.products:
            return self._first(layer, tokens)
        if tokens.is_cuda and torch.cuda.current_device() != tokens.device.index:
            return None
        rows, bias, operands = tokens.view(-1, layer.in_features), layer.bias, call.product.operands(layer)
        sources = (rows, *operands) if bias is None else (rows, *operands, bias)
        if call.bound.takes(*sources):
            return call.bound(*sources).view(*tokens.shape[:-1], layer.out_features)
        return None if call.bound.fits(*sources) else self._first(layer, tokens)

    def _first(self, layer: PackedLinear, tokens: torch.Tensor) -> torch.Tensor | None:
        rows = tokens.numel() // max(1, layer.in_features)
        if not 0 < rows <= MOST_BOUND_TOKENS:
            return None
        packed = layer.packed
        product = product_for(rows, packed, layer.limits)
        if not isinstance(product, BoundProduct):
            return None
        outputs, bound = product.bound(tokens.view(rows, layer.in_features), packed, layer.bias)
        if bound is not None:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[tokens.shape] = _Known(bound, product, layer.limits, registry.products)
        return outputs.view(*tokens.shape[:-1], layer.out_features)


def _is_plain_call(layer: PackedLinear, tokens: torch.Tensor) -> bool:
    """True if the call is on a GPU, in the weight's dtype, without autograd, autocast, transforms and profilers."""
    return (
        type(tokens) is torch.Tensor
        and backend_of_device(tokens.device) == "triton"
        and tokens.dtype == layer.dtype
        and tokens.dim() > 0
        and tokens.shape[-1] == layer.in_features
        and tokens.is_contiguous()
        and not tokens.is_neg()
        and not (torch.is_grad_enabled() and (tokens.requires_grad or _has_gradient(layer)))
        and not torch.is_autocast_enabled(tokens.device.type)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()
    )


def _has_gradient(layer: PackedLinear) -> bool:
    return layer.bias is not None and layer.bias.requires_grad
