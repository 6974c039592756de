"""The product of our kernel, which reads the packed weight once for a few rows."""

from __future__ import annotations

import torch

from ..kernels.nm_linear import DTYPES, nm_linear
from ..kernels.packed_nm import PackedNM
from .products import Product, RowLimits


class Kernel(Product):
    """:func:`~ace_triton.kernels.nm_linear.nm_linear`."""

    name, label = "packed", "ours"

    def takes(self, rows: int, limits: RowLimits) -> bool:
        return rows <= limits.packed

    def refusal(self, packed: PackedNM, rows: int) -> str | None:
        if packed.dtype in DTYPES:
            return None
        return f"our kernel supports float32, float16 and bfloat16, the weight is {packed.dtype}"

    def multiply(
        self, tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, limits: RowLimits
    ) -> torch.Tensor:
        return nm_linear(tokens, packed, bias)
