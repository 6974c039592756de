"""quantize_nm: the values of a packed n:m weight in 8 or 4 bits (layout 2 of :mod:`~ace_triton.kernels.packed_nm`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import few_bits
from .errors import ArgumentError
from .packed_nm import PackedNM


def quantize_nm(packed: PackedNM, bits: int, group: int) -> PackedNM:
    """The packed weight with each value rounded to the nearest one of ``bits`` bits; metadata are shared.

    Args:
        packed: not quantized, float32, float16 or bfloat16, on any device.
        bits: 8 or 4.
        group: number of inputs that share a scale, a multiple of 32.

    Raises:
        ArgumentError: if bits, group or the weight's dtype are not supported, or the weight holds NaN or infinity.
    """
    few_bits.check_bits(bits, group)
    if packed.absmax is not None or packed.values.dtype not in few_bits.DTYPES:
        raise ArgumentError(
            f"only float32, float16 and bfloat16 weights can be quantized, got {packed.values.dtype}: unpack it first"
        )
    size = _kept_of_a_group(packed, group)
    absmax = few_bits.largest_of_groups(packed.values, size)
    if not bool(absmax.isfinite().all()):
        raise ArgumentError("a weight with NaN or infinity cannot be quantized: prune or load the model again")
    steps = few_bits.quantized_groups(packed.values.float(), absmax.float(), size, bits)
    values = few_bits.stored(steps, bits)
    return replace(packed, values=values, absmax=absmax, group=group)


def dequantize_nm(packed: PackedNM, dtype: torch.dtype | None = None) -> PackedNM:
    """A quantized weight in layout 1.

    Args:
        packed: quantized.
        dtype: dtype of the values; None for the weight's own.
    """
    assert packed.absmax is not None
    assert packed.bits is not None
    size = _kept_of_a_group(packed, packed.group)
    values = few_bits.dequantized_groups(quantized_steps(packed), packed.absmax.float(), size, packed.bits)
    values = values.to(dtype or packed.absmax.dtype)
    return PackedNM(values, packed.meta, packed.n, packed.m, packed.shape)


def quantized_steps(packed: PackedNM) -> torch.Tensor:
    """The integers of a quantized weight's kept values, int8 [out, in * n / m]."""
    return few_bits.integers(packed.values, packed.kept_of_a_row)


def _kept_of_a_group(packed: PackedNM, group: int) -> int:
    return group // packed.m * packed.n
