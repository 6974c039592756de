"""How one linear layer is packed: by its pattern of zeros, or in few bits, if it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..linears import linear_weight
from ..sparsity import Sparsity
from .nm_linear import NMLinear
from .packed_linear import PackedLinear
from .pattern import WIDEST_ROUNDED, find_pattern, follows
from .products import RowLimits
from .quantized_linear import QuantizedLinear
from .rows_linear import RowsLinear
from .unpacked import unpacked_weight

PROBE_TOKENS = 3
"""Random tokens for the check that a layer with its own forward computes x W^T + b."""

LEAST_UNSTRUCTURED = 0.44
"""A weight whose zeros follow no pattern is packed from this share of zeros on. With fewer zeros it would be little
smaller, and slower than the dense one. A little below 45 %, because a share of a row is rounded down."""

OFFLOADED = (
    "its weight is on the meta device (accelerate offloads it, or it was never loaded): load the model whole, without "
    "device_map, or pack the saved checkpoint (ace-triton pack)"
)
"""Why a layer without values is not packed."""


class NotEligible(Exception):
    """A layer cannot be packed; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """How layers are packed; ``pattern`` None to detect it, ``dense_bits`` None to leave layers that are dense.

    ``pruned_to`` is the pattern that the model was pruned to, if it is known. With ``bits`` it is used for layers that
    follow it, although too many of their kept weights may be rounded to 0 to detect it.
    """

    pattern: tuple[int, int] | None
    limits: RowLimits | None
    bits: int | None
    group: int
    dense_bits: int | None = None
    pruned_to: tuple[int, int] | None = None


def pack_layer(layer: nn.Module, wanted: Wanted) -> PackedLinear:
    """The packed form of a linear layer; NotEligible if it has none."""
    weight = linear_weight(layer)
    assert weight is not None
    if weight.is_meta:
        raise NotEligible(OFFLOADED)
    if any(getattr(layer, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")) or "forward" in vars(layer):
        raise NotEligible("it has hooks or its own forward, which packing would remove")
    try:
        packed = _rounded_before(layer, weight, wanted) or _smaller(_pack_sparse(layer, weight, wanted))
    except NotEligible:
        if wanted.dense_bits is None:
            raise
        try:
            packed = _smaller(QuantizedLinear.from_linear(layer, wanted.dense_bits, wanted.group, wanted.limits))
        except ValueError as error:
            raise NotEligible(str(error)) from error
    if type(layer).forward is not nn.Linear.forward and not _multiplies(layer, weight):
        raise NotEligible(f"a {type(layer).__name__} does not compute x W^T + b")
    return packed


def _rounded_before(layer: nn.Module, weight: torch.Tensor, wanted: Wanted) -> PackedLinear | None:
    """A layer with few zeros in the bits of dense layers, if these keep each value: its zeros come from rounding."""
    if wanted.dense_bits is None or wanted.bits is not None or wanted.pattern is not None or not weight.numel():
        return None
    if int((weight != 0).sum()) <= WIDEST_ROUNDED * weight.numel() or not bool(weight.isfinite().all()):
        return None
    try:
        packed = _smaller(QuantizedLinear.from_linear(layer, wanted.dense_bits, wanted.group, wanted.limits))
    except (ValueError, NotEligible):
        return None
    return packed if torch.equal(unpacked_weight(packed.packed), weight) else None


def _smaller(packed: PackedLinear) -> PackedLinear:
    """The packed layer; NotEligible if it is not smaller than the dense one."""
    size = packed.packed
    if size.packed_bytes >= size.dense_bytes:
        raise NotEligible(
            f"packed as {packed.pattern} it is no smaller: {size.packed_bytes} bytes instead of {size.dense_bytes}"
        )
    return packed


def _pack_sparse(layer: nn.Module, weight: torch.Tensor, wanted: Wanted) -> PackedLinear:
    nm = wanted.pattern or _detect(weight, wanted.bits, wanted.pruned_to)
    if nm is None and wanted.bits is not None:
        raise NotEligible(f"its zeros follow no pattern n:m, and only n:m weights can be stored in {wanted.bits} bits")
    try:
        if nm is None:
            return RowsLinear.from_linear(layer, wanted.limits)
        return NMLinear.from_linear(layer, *nm, wanted.limits, bits=wanted.bits, group=wanted.group)
    except ValueError as error:
        raise NotEligible(str(error)) from error


def _detect(weight: torch.Tensor, bits: int | None, pruned_to: tuple[int, int] | None) -> tuple[int, int] | None:
    """The pattern n:m to pack a weight in; None if its zeros follow no such pattern along the inputs."""
    found = find_pattern(weight, rounded=bits is not None)
    if found.nm is not None and found.across is None:
        return found.nm
    if bits is not None and pruned_to is not None and follows(weight, *pruned_to):
        return pruned_to
    if found.dense:
        raise NotEligible("it is dense: it was not pruned")
    zeros = 1 - float((weight != 0).sum()) / weight.numel()
    if zeros < LEAST_UNSTRUCTURED:
        raise NotEligible(
            f"it is {found}, and {zeros:.0%} of it are zeros: weights that are not n:m along the inputs are packed "
            f"from {LEAST_UNSTRUCTURED:.0%} zeros on"
        )
    return None


def nm_of(pattern: str) -> tuple[int, int]:
    """n and m of a pattern; ArgumentError if it is not n:m."""
    sparsity = Sparsity(pattern)
    if sparsity.n is None or sparsity.m is None:
        raise ArgumentError(
            f"pattern {pattern!r}: packing takes 'n:m', for example '2:4', or None to detect each layer's pattern"
        )
    return sparsity.n, sparsity.m


@torch.no_grad()
def _multiplies(layer: nn.Module, weight: torch.Tensor) -> bool:
    """True if a linear layer with its own forward computes x W^T + b."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    tokens = tokens.to(weight)
    bias: Any = layer.bias
    expected = torch.nn.functional.linear(tokens.float(), weight.float(), None if bias is None else bias.float())
    given = layer(tokens)
    if not isinstance(given, torch.Tensor) or given.shape != expected.shape:
        return False
    tolerance = 8 * torch.finfo(weight.dtype).eps * float(expected.abs().amax())
    return bool((given.float() - expected).abs().amax() <= tolerance)
