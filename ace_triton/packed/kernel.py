"""The product of our kernels: one reads the packed weight for a few rows, one expands it in the cache for more rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..kernels import cpu_library, cpu_packed
from ..kernels.bound_launch import BoundCall
from ..kernels.expanded_linear import expanded_linear
from ..kernels.linear_call import DTYPES
from ..kernels.nm_linear import bound_nm_linear, nm_linear
from ..kernels.packed_dense import PackedDense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows
from ..kernels.quantized_linear import quantized_linear
from ..kernels.rows_linear import bound_rows_linear, rows_linear
from .products import BoundProduct, Packed, RowLimits


@dataclass(frozen=True)
class PatternRows:
    """Largest number of rows for a product: at 2:4, which has its own loop, and at other patterns or none."""

    two_of_four: int
    other: int

    def of(self, two_of_four: bool) -> int:
        """The number for a pattern."""
        return self.two_of_four if two_of_four else self.other


Expansion = Literal["tiles", "vectors"]
"""How expanded weights are multiplied: by AMX, or by AVX512-BF16 without it."""

FEW_ROWS: dict[Expansion, PatternRows] = {"tiles": PatternRows(4, 2), "vectors": PatternRows(8, 4)}
"""Up to these numbers of rows, bf16 weights that could be expanded are multiplied as they are. Measured for tiles on
one core of an Intel Emerald Rapids; for vectors, up to which Zen 4 and 5 were faster than by unpacking the weight."""


class Kernel(BoundProduct):
    """:func:`~ace_triton.kernels.nm_linear.nm_linear`, :func:`~ace_triton.kernels.rows_linear.rows_linear` or
    :func:`~ace_triton.kernels.quantized_linear.quantized_linear`; for more rows in bf16, on CPUs that have it,
    :func:`~ace_triton.kernels.expanded_linear.expanded_linear`."""

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
        if isinstance(packed, PackedDense):
            return quantized_linear(tokens, packed, bias)
        if _is_expanded(len(tokens), packed):
            return expanded_linear(tokens, packed, bias)
        if isinstance(packed, PackedRows):
            return rows_linear(tokens, packed, bias)
        return nm_linear(tokens, packed, bias)

    def operands(self, layer: Any) -> tuple[torch.Tensor, ...]:
        return tuple(layer.packed.tensors.values())

    def bound(
        self, tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, BoundCall | None]:
        if isinstance(packed, PackedRows):
            return bound_rows_linear(tokens, packed, bias)
        return bound_nm_linear(tokens, packed, bias)


def _is_expanded(rows: int, packed: PackedNM | PackedRows) -> bool:
    """True if a call with this many rows expands the weight."""
    values = packed.values
    if values.dtype != torch.bfloat16 or not values.is_cpu:
        return False
    found = expansion()
    two_of_four = isinstance(packed, PackedNM) and (packed.n, packed.m) == (2, 4)
    return found is not None and rows > FEW_ROWS[found].of(two_of_four)


def expansion() -> Expansion | None:
    """How this CPU multiplies expanded weights in bf16; None if it does not."""
    return expansion_of(cpu_library.isa()) if cpu_library.available() else None


@functools.cache
def expansion_of(isa: str) -> Expansion | None:
    """As :func:`expansion`, if ``isa`` is the instruction set in use."""
    if not cpu_packed.has_expanded_product():
        return None
    return "tiles" if cpu_packed.has_tiles() else "vectors"
