"""The product of our kernels: one reads the packed weight for a few rows, one expands it in the cache for more rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..kernels import cpu_library, cpu_packed
from ..kernels.backend import backend_of_device
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


@dataclass(frozen=True)
class ExpandedRows(PatternRows):
    """The same for weights that our kernel can expand. Quantized weights have one number for all patterns."""

    few_bits: int

    def of_weight(self, pattern: tuple[int, int] | None, bits: int | None) -> int:
        """The number for a weight's n:m pattern (None if it has none) and its bits, if it is quantized."""
        return self.of(pattern == (2, 4)) if bits is None else self.few_bits


Expansion = Literal["tiles", "vectors"]
"""How expanded weights are multiplied: by AMX, or by AVX512-BF16 without it."""

FEW_ROWS: dict[Expansion, ExpandedRows] = {"tiles": ExpandedRows(4, 2, 4), "vectors": ExpandedRows(8, 4, 24)}
"""Up to these numbers of rows, bf16 weights that could be expanded are multiplied as they are. Measured on one core of
an Intel Emerald Rapids, except for unquantized weights and vectors: up to these Zen 4 and 5 were faster than by
unpacking the weight."""


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
        if _is_expanded(len(tokens), packed):
            return expanded_linear(tokens, packed, bias)
        if isinstance(packed, PackedDense):
            return quantized_linear(tokens, packed, bias)
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


def _is_expanded(rows: int, packed: Packed) -> bool:
    """True if a call with this many rows expands the weight."""
    found = expansion() if packed.dtype == torch.bfloat16 and packed.values.is_cpu else None
    if found is None or rows <= FEW_ROWS[found].of_weight(pattern_of(packed), bits_of(packed)):
        return False
    return backend_of_device(packed.values.device) == "cpu"


def pattern_of(packed: Packed) -> tuple[int, int] | None:
    """The n:m pattern of a weight; None if it has none."""
    return (packed.n, packed.m) if isinstance(packed, PackedNM) else None


def bits_of(packed: Packed) -> int | None:
    """The bits of a weight's values if it is quantized."""
    return None if isinstance(packed, PackedRows) else packed.bits


def expansion() -> Expansion | None:
    """How this CPU multiplies expanded weights in bf16; None if it does not."""
    return expansion_of(cpu_library.isa()) if cpu_library.available() else None


@functools.cache
def expansion_of(isa: str) -> Expansion | None:
    """As :func:`expansion`, if ``isa`` is the instruction set in use."""
    if not cpu_packed.has_expanded_product():
        return None
    return "tiles" if cpu_packed.has_tiles() else "vectors"
