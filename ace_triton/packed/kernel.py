"""The product of our kernel, which reads the packed weight once for a few rows."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.bound_launch import BoundCall
from ..kernels.nm_linear import DTYPES, bound_nm_linear, nm_linear
from ..kernels.packed_dense import PackedDense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows
from ..kernels.quantized_linear import quantized_linear
from ..kernels.rows_linear import rows_linear
from .products import BoundProduct, Packed, RowLimits


class Kernel(BoundProduct):
    """:func:`~ace_triton.kernels.nm_linear.nm_linear`, :func:`~ace_triton.kernels.rows_linear.rows_linear` or
    :func:`~ace_triton.kernels.quantized_linear.quantized_linear`."""

    name, label = "packed", "ours"
    forms = (PackedNM, PackedRows, PackedDense)

    def takes(self, rows: int, limits: RowLimits) -> bool:
        return rows <= limits.packed

    def refusal(self, packed: Packed, rows: int) -> str | None:
        if packed.dtype in DTYPES:
            return None
        return f"our kernel supports float32, float16 and bfloat16, the weight is {packed.dtype}"

    def multiply(
        self, tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        if isinstance(packed, PackedRows):
            return rows_linear(tokens, packed, bias)
        if isinstance(packed, PackedDense):
            return quantized_linear(tokens, packed, bias)
        return nm_linear(tokens, packed, bias)

    def operands(self, layer: Any) -> tuple[torch.Tensor, ...]:
        return layer.values, layer.meta

    def bound(
        self, tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, BoundCall | None]:
        return bound_nm_linear(tokens, packed, bias)
