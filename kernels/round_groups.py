"""round_groups: each value rounded to the nearest one that 8 or 4 bits can store (:mod:`~ace_triton.kernels.few_bits`).

With Q the largest integer and g a group of neighboring values of a row:

    w_ij = absmax_ig round(Q v_ij / absmax_ig) / Q,   absmax_ig = max over j in g of |v_ij|, in the dtype of scales

The kernel reads each value once, 4 bytes, and writes its rounded value once. Values of 0 become +0.0. So w holds what
packing with these bits and this group stores, and rounding w again changes nothing.
"""

from __future__ import annotations

import torch

from . import cpu, few_bits, launch
from .errors import ArgumentError
from .op import Op, Work, bytes_of, launch_metadata
from .triton_import import tl, triton


def round_groups(
    values: torch.Tensor, bits: int, group: int, dtype: torch.dtype, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The values rounded by groups. A group with NaN or infinity becomes NaN.

    Args:
        values: fp32 [rows, cols], contiguous.
        bits: 8 or 4.
        group: number of neighbors in a row that share a scale, a multiple of 32; the last one may have fewer.
        dtype: dtype in which packing stores the scales: fp32, fp16 or bf16. A scale beyond its range becomes its
            largest number, and larger values of the group with it.
        into: receives the rounded values, fp32, fp16 or bf16 [rows, cols], contiguous. It may be ``values``. None for
            a new tensor in fp32.

    Returns:
        ``into``.

    Raises:
        ArgumentError: if a dtype, a shape, the bits or the group is not supported.
    """
    few_bits.check_bits(bits, group)
    into = torch.empty(values.shape, dtype=torch.float32, device=values.device) if into is None else into
    if values.dim() != 2 or values.dtype != torch.float32 or not values.is_contiguous():
        raise ArgumentError(
            f"values to round must be fp32 [rows, cols] and contiguous; got {values.dtype} {tuple(values.shape)} with "
            f"strides {values.stride()}"
        )
    if into.shape != values.shape or into.dtype not in few_bits.DTYPES or not into.is_contiguous():
        raise ArgumentError(
            f"into must be float32, float16 or bfloat16 {tuple(values.shape)} and contiguous; got {into.dtype} "
            f"{tuple(into.shape)} with strides {into.stride()}"
        )
    if dtype not in few_bits.DTYPES:
        raise ArgumentError(f"scales must be float32, float16 or bfloat16, got {dtype}")
    if values.numel():
        ROUND_GROUPS.on(values, into, writes=(into,))(values.detach(), bits, group, dtype, into)
    return into


def round_groups_reference(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The same with plain torch, in fp32, for values that are not empty."""
    absmax = few_bits.as_stored(few_bits.largest_of_groups(values, group), dtype)
    steps = few_bits.quantized_groups(values, absmax, group, bits)
    return few_bits.dequantized_groups(steps, absmax, group, bits).add_(0.0)  # Makes -0.0 to +0.0.


def _by_reference(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype, into: torch.Tensor) -> None:
    into.copy_(round_groups_reference(values, bits, group, dtype))


def _round_groups_triton(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype, into: torch.Tensor) -> None:
    rows, cols = values.shape
    group = min(group, cols)
    per_row = triton.cdiv(cols, group)
    tile = launch.round_groups(values, group)
    _round[(triton.cdiv(rows * per_row, tile.groups),)](
        *(values, into, rows * per_row, per_row, cols, group),
        LARGEST=few_bits.LARGEST[bits],
        SCALES=getattr(tl, str(dtype).removeprefix("torch.")),
        MOST=torch.finfo(dtype).max,
        GROUPS=tile.groups,
        BLOCK=tile.block,
        WHOLE=tile.block >= group,
        num_warps=launch.WARPS,
    )


def _work(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype, into: torch.Tensor) -> Work:
    return Work(bytes_of(values, into), 4 * values.numel())


ROUND_GROUPS = Op("round_groups", _work, _by_reference, cpu.round_groups, _round_groups_triton)


@triton.jit(launch_metadata=launch_metadata)
def _round(
    values_ptr,
    into_ptr,
    n_groups,
    per_row,
    cols,
    group,
    LARGEST: tl.constexpr,
    SCALES: tl.constexpr,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    start = number % per_row * group
    width = tl.where(number < n_groups, tl.minimum(group, cols - start), 0)[:, None]
    first = ((number // per_row).to(tl.int64) * cols + start)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        x = tl.load(values_ptr + first + place, mask=place < width, other=0.0)
        scale = _scale_of(tl.max(_magnitude(x), 1), SCALES, MOST)[:, None]
        w = _nearest(x, scale, LARGEST).to(into_ptr.dtype.element_ty)
        tl.store(into_ptr + first + place, w, mask=place < width)
    else:
        most = tl.zeros([GROUPS], tl.int32)
        for begin in range(0, group, BLOCK):
            x = tl.load(values_ptr + first + begin + place, mask=begin + place < width, other=0.0)
            most = tl.maximum(most, tl.max(_magnitude(x), 1))
        scale = _scale_of(most, SCALES, MOST)[:, None]
        for begin in range(0, group, BLOCK):
            inside = begin + place < width
            x = tl.load(values_ptr + first + begin + place, mask=inside, other=0.0)
            w = _nearest(x, scale, LARGEST).to(into_ptr.dtype.element_ty)
            tl.store(into_ptr + first + begin + place, w, mask=inside)


@triton.jit
def _magnitude(x):
    """Bits of |x|, which are ordered as the magnitudes are; infinity and NaN are the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(most, SCALES: tl.constexpr, MOST: tl.constexpr):
    """The largest magnitude, from its bits, as it is stored; NaN if it is not finite."""
    largest = tl.minimum(most.to(tl.float32, bitcast=True), MOST).to(SCALES).to(tl.float32)
    return tl.where(most < 0x7F800000, largest, float("nan"))


@triton.jit
def _nearest(x, scale, LARGEST: tl.constexpr):
    """Adding 1.5 * 2^23 rounds to the nearest integer, ties to even. The bounds keep the compiler from fusing that
    addition with the product."""
    steps = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)) * LARGEST
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    steps = (steps + 12582912.0) - 12582912.0
    return tl.div_rn(steps, LARGEST * 1.0 + tl.zeros_like(steps)) * scale + 0.0
