"""few_bits: weights of 8 or 4 bits, as integers and one largest magnitude per group of neighboring inputs.

    w_ij = absmax_ig q_ij / Q,   q_ij an integer from -Q to Q, Q = 127 (8 bits) or 7 (4 bits), g = j // group

``absmax`` has the model's dtype. It is the magnitude of a weight of the group, so it is exact, and it never underflows;
a step ``absmax / Q`` in fp16 would. The weight with q = Q has exactly this magnitude. So quantizing the values that
:func:`dequantized` returns gives the same integers and the same ``absmax`` again, in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import ArgumentError

LARGEST = {8: 127, 4: 7}
"""Q: the largest integer for each number of bits."""

STEP = 32
"""A group has a multiple of this many inputs: a multiple of every m of n:m."""

LARGEST_GROUP = 2**20
"""The largest group: a group of more inputs than a row has is the row."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of ``absmax``, which are those of the tokens."""


def check_bits(bits: int, group: int) -> None:
    """Raise ArgumentError if the number of bits or the group is not supported."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in LARGEST:
        raise ArgumentError(f"bits must be one of {', '.join(map(str, LARGEST))}; got {bits!r}")
    check_group(group)


def check_group(group: int) -> None:
    """Raise ArgumentError if the group is not supported."""
    whole = isinstance(group, int) and not isinstance(group, bool)
    if not whole or not STEP <= group <= LARGEST_GROUP or group % STEP:
        raise ArgumentError(
            f"group, the number of inputs that share a scale, must be a multiple of {STEP} above 0 and at most "
            f"{LARGEST_GROUP}; got {group!r}"
        )


def largest_of_groups(values: torch.Tensor, size: int) -> torch.Tensor:
    """The largest magnitude of every ``size`` neighbors in the rows of ``values``: [rows, ceil(cols / size)]."""
    rows, cols = values.shape
    size = max(1, min(size, cols))
    magnitudes = values.abs()
    if cols % size:
        magnitudes = torch.nn.functional.pad(magnitudes, (0, size - cols % size))
    return magnitudes.view(rows, magnitudes.shape[1] // size, size).amax(-1)


def as_stored(absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Largest magnitudes, fp32, rounded to the dtype in which they are stored. Finite ones beyond its range become its
    largest number."""
    most = torch.finfo(dtype).max
    return torch.where(absmax.isfinite(), absmax.clamp(max=most), absmax).to(dtype).float()


def quantized(values: torch.Tensor, absmax: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest integers q, in fp32.

    Args:
        values: fp32 [rows, cols].
        absmax: fp32, of the values' shape or of one that broadcasts to it.
        bits: 8 or 4.
    """
    largest = LARGEST[bits]
    steps = (values / absmax).mul_(largest).round_().clamp_(-largest, largest)
    return steps.nan_to_num_(0.0)  # 0 / 0 in a group of zeros.


def dequantized(steps: torch.Tensor, absmax: torch.Tensor, bits: int) -> torch.Tensor:
    """The values of integers q, fp32.

    Args:
        steps: the integers, in any dtype.
        absmax: fp32, of the integers' shape or of one that broadcasts to it.
        bits: 8 or 4.
    """
    return (steps.float() / LARGEST[bits]).mul_(absmax)


def quantized_groups(values: torch.Tensor, absmax: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """As :func:`quantized`, for ``absmax`` [rows, ceil(cols / size)] of every ``size`` neighbors."""
    return _by_groups(values, absmax, size, lambda part, largest: quantized(part, largest, bits))


def dequantized_groups(steps: torch.Tensor, absmax: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """The inverse of :func:`quantized_groups`, fp32."""
    return _by_groups(steps, absmax, size, lambda part, largest: dequantized(part, largest, bits))


def stored(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers q, fp32 [rows, cols], as they are stored: int8 of the same shape, or uint8 [rows, ceil(cols / 2)] for 4
    bits."""
    if bits == 8:
        return steps.to(torch.int8)
    halves = steps.to(torch.int8).view(torch.uint8) & 15
    if halves.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def integers(values: torch.Tensor, cols: int) -> torch.Tensor:
    """The inverse of :func:`stored`: the integers q, int8 [rows, cols]."""
    if values.dtype == torch.int8:
        return values
    halves = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)[:, :cols]
    return (halves << 4).view(torch.int8) >> 4


def check_values(values: torch.Tensor, absmax: torch.Tensor, cols: int) -> None:
    """Raise ArgumentError if stored values or absmax hold what no quantization gives.

    Args:
        values: as :func:`stored` gives them.
        absmax: their largest magnitudes.
        cols: number of integers in a row.
    """
    if values.dtype == torch.int8:
        invalid = bool((values == -128).any())
    else:
        unused = values[:, -1:] >> 4 if cols % 2 else values[:0]
        invalid = bool(((values & 15 == 8) | (values >> 4 == 8)).any()) or bool(unused.any())
    if invalid:
        raise ArgumentError("its values hold a number that no quantization gives")
    if not bool((absmax >= 0).all()) or bool(absmax.isinf().any()):
        raise ArgumentError("its absmax holds NaN, infinity or a negative number")


def check_dtypes(values: torch.Tensor, absmax: torch.Tensor, group: int) -> None:
    """Raise ArgumentError if the group or the dtypes of stored values and absmax are not supported."""
    if values.dtype not in (torch.int8, torch.uint8):
        raise ArgumentError(
            f"values beside absmax must be torch.int8 (8 bits) or torch.uint8 (4 bits), got {values.dtype}"
        )
    check_bits(8, group)
    if absmax.dtype not in DTYPES:
        raise ArgumentError(f"absmax must be float32, float16 or bfloat16, got {absmax.dtype}")


def _by_groups(
    values: torch.Tensor,
    absmax: torch.Tensor,
    size: int,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """function(values, largest) for the whole groups of each row, and for the part of a group at its end."""
    whole = values.shape[1] // size
    parts = function(values[:, : whole * size].unflatten(1, (whole, size)), absmax[:, :whole, None]).flatten(1)
    if whole * size == values.shape[1]:
        return parts
    return torch.cat((parts, function(values[:, whole * size :], absmax[:, whole:])), 1)
