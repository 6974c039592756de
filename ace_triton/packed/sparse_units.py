"""The product of 2:4 weights of 16, 8 or 4 bits on NVIDIA's sparse matrix units, for 1 to 64 rows.

It never ran on a GPU, so a caller must ask for it.

Either set ``ACE_TRITON_MMA_SP=1`` before Python starts, or register the product::

    register_product(SparseUnits())

Layers without limits of their own then use it for every call that it does not refuse, and ``ace-triton bench`` times it
beside the others. Layers with :class:`~ace_triton.packed.products.RowLimits` use it for the rows that ``others`` gives
it.

The metadata in the order of the instruction (:func:`~ace_triton.kernels.nm_linear_mma.fragments_of`) are made at the
first call with a weight and kept as long as the weight exists. They take 1/8 byte per weight. A CUDA graph that
captures this first call makes them in every replay, so make one call before the capture.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..kernels.bound_launch import BoundCall
from ..kernels.launch_packed import has_sparse_units
from ..kernels.nm_linear_mma import bound_nm_linear_mma, fragments_of, nm_linear_mma, refusal
from ..kernels.packed_nm import PackedNM
from .conversions import Conversions
from .products import BoundProduct, RowLimits

ENVIRONMENT_VARIABLE = "ACE_TRITON_MMA_SP"

MOST_ROWS = 64
"""Rows that share a read of the weight."""

_conversions = Conversions()


class SparseUnits(BoundProduct):
    """:func:`~ace_triton.kernels.nm_linear_mma.nm_linear_mma`."""

    name, label, converts = "mma_sp", "mma.sp", True

    def refusal(self, packed: PackedNM, rows: int) -> str | None:
        why_not = _why_no_units(packed.values.device)
        if why_not is not None:
            return why_not
        if rows > MOST_ROWS:
            return f"mma_sp takes up to {MOST_ROWS} rows"
        return refusal(packed)

    def multiply(
        self, tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        return nm_linear_mma(tokens, packed, fragments(packed), bias)

    def operands(self, layer: Any) -> tuple[torch.Tensor, ...]:
        return *layer.packed.tensors.values(), fragments(layer.packed)

    def bound(
        self, tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, BoundCall | None]:
        return bound_nm_linear_mma(tokens, packed, fragments(packed), bias)


def _why_no_units(device: torch.device) -> str | None:
    if device.type == "cuda" and has_sparse_units(device):
        return None
    return f"mma.sp needs an NVIDIA GPU, Ampere or later, the weight is on {device}"


def fragments(packed: PackedNM) -> torch.Tensor:
    """The metadata of a weight in the order of the instruction; made at the first call, and again if it was written."""
    return _conversions.of(packed, lambda: fragments_of(packed))


def asked_for() -> bool:
    """True if ``ACE_TRITON_MMA_SP`` is set to 1 (or true, on, yes, y)."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "0").strip().lower() in {"1", "true", "on", "yes", "y"}
