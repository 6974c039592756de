"""The product that multiplies by a dense copy of the weight, which is unpacked once and kept."""

from __future__ import annotations

import torch

from ..kernels.packed_dense import PackedDense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows
from .conversions import Conversions
from .products import DENSE_COPY, Packed, Product, RowLimits
from .unpacked import unpacked_weight

_copies = Conversions()


class DenseCopy(Product):
    """:func:`dense_copy_of` and ``F.linear``, for limits with ``dense_copy`` in calls that no other product takes."""

    name, label, converts = DENSE_COPY, "dense copy", True
    forms = (PackedNM, PackedRows, PackedDense)

    def refusal(self, packed: Packed, rows: int) -> str | None:
        return None

    def multiply(
        self, tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        return torch.nn.functional.linear(tokens, dense_copy_of(packed), bias)


def dense_copy_of(packed: Packed) -> torch.Tensor:
    """The dense weight [out_features, in_features]. It is unpacked at the first call, and again after a change."""
    return _copies.of(packed, lambda: unpacked_weight(packed))


def free_dense_copy(packed: Packed) -> None:
    """Free the copy of a weight, if there is one."""
    _copies.forget(packed)
