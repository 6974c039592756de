"""unpack_nm: the dense weight of a packed n:m weight, bit for bit; pruned weights are +0.0.

The values of a quantized weight are first converted to the weight's dtype.

Bytes per weight of e bytes: e * n / m + 1/8 read, e written, in one pass.
"""

from __future__ import annotations

import torch

from . import cpu_packed, launch, launch_packed
from .errors import ArgumentError
from .op import Op, Work, launch_metadata
from .packed_nm import DTYPES, PackedNM, unpack_bits
from .quantize_nm import dequantize_nm
from .registers import bits_of, kept_before, spread, unzip, zipped
from .triton_import import tl, triton


def unpack_nm(packed: PackedNM, into: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight [out, in] in its own dtype; kept weights are equal bit for bit, -0.0 and NaN included.

    Args:
        packed: the packed weight. Invalid metadata (see :meth:`PackedNM.check`) gives a wrong weight or an error.
        into: if given, receives the result and is returned; contiguous, with the weight's shape and dtype. None for a
            new tensor.

    Raises:
        ArgumentError: if values, metadata or ``into`` do not fit, or if tensors are on different devices.
    """
    dtype = packed.dtype
    if into is not None and (tuple(into.shape) != packed.shape or into.dtype != dtype or not into.is_contiguous()):
        raise ArgumentError(
            f"into must be contiguous {dtype} {packed.shape}, got {into.dtype} {tuple(into.shape)} "
            f"with strides {into.stride()}"
        )
    if packed.absmax is not None:
        packed.check_tensors()
        packed = dequantize_nm(packed)
    return UNPACK_NM.on(packed.values, packed.meta, into, writes=(into,))(packed, into)


def unpack_nm_reference(packed: PackedNM) -> torch.Tensor:
    """The dense weight, computed with plain torch."""
    if packed.absmax is not None:
        packed = dequantize_nm(packed)
    dense = packed.values.new_zeros(packed.shape)
    return dense.masked_scatter_(unpack_bits(packed.meta)[:, : packed.shape[1]], packed.values)


def _by_reference(packed: PackedNM, into: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    weight = unpack_nm_reference(packed)
    return weight if into is None else into.copy_(weight)


def _unpack_nm_cpu(packed: PackedNM, into: torch.Tensor | None) -> torch.Tensor:
    return cpu_packed.unpack_nm(packed, into) if packed.values.dtype in DTYPES else _by_reference(packed, into)


def _unpack_nm_triton(packed: PackedNM, into: torch.Tensor | None) -> torch.Tensor:
    if packed.values.dtype not in DTYPES:
        return _by_reference(packed, into)
    packed.check_tensors()
    weight = packed.values.new_empty(packed.shape) if into is None else into
    if not weight.numel():
        return weight
    rows, cols = packed.shape
    tile = launch_packed.unpack_nm(packed.values, cols)
    width = 2 * tile.vector * tile.threads
    grid = (triton.cdiv(cols, width) * triton.cdiv(rows, tile.block_rows),)
    arguments = (packed.values, packed.meta, weight, rows, cols)
    blocks = {"BLOCK_ROWS": tile.block_rows, "num_warps": launch.WARPS}
    if (packed.n, packed.m) == (2, 4):
        _two_of_four_body[grid](*arguments, VECTOR=tile.vector, LANES=tile.threads, **blocks)
    else:
        _any_pattern_body[grid](*arguments, N=packed.n, M=packed.m, BLOCK_COLS=width, **blocks)
    return weight


def _work(packed: PackedNM, into: torch.Tensor | None) -> Work:
    return Work(packed.packed_bytes + packed.dense_bytes)


UNPACK_NM = Op("unpack_nm", _work, _by_reference, _unpack_nm_cpu, _unpack_nm_triton)


@triton.jit(launch_metadata=launch_metadata)
def _two_of_four_body(
    values_ptr,
    meta_ptr,
    weight_ptr,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """A thread reads VECTOR values of a row in one access and writes the 2 * VECTOR weights of their groups."""
    blocks_across = tl.cdiv(cols, 2 * VECTOR * LANES)
    block = tl.program_id(0) % blocks_across
    i = tl.program_id(0) // blocks_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    value = block * (VECTOR * LANES) + tl.arange(0, VECTOR * LANES)[None, :]
    inside = (i < rows) & (value < cols // 2)
    values = unzip(tl.load(values_ptr + i.to(tl.int64) * (cols // 2) + value, mask=inside, other=0.0), VECTOR)
    start = (block * LANES + tl.arange(0, LANES)[None, :]) * (2 * VECTOR)
    word_start = i.to(tl.int64) * tl.cdiv(cols, 32)
    words = tl.load(meta_ptr + word_start + start // 32, mask=(i < rows) & (start < cols), other=0)
    bits = words >> start % 32
    weights = ()
    for g in tl.static_range(VECTOR // 2):
        weights = weights + spread(bits_of(values[2 * g]), bits_of(values[2 * g + 1]), bits, 4 * g)
    whole = zipped(weights).to(weight_ptr.dtype.element_ty, bitcast=True)
    j = block * (2 * VECTOR * LANES) + tl.arange(0, 2 * VECTOR * LANES)[None, :]
    tl.store(weight_ptr + i.to(tl.int64) * cols + j, whole, mask=(i < rows) & (j < cols))


@triton.jit(launch_metadata=launch_metadata)
def _any_pattern_body(
    values_ptr,
    meta_ptr,
    weight_ptr,
    rows,
    cols,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One weight at a time. A kept weight's index in its group's values is the number of kept ones before it."""
    blocks_across = tl.cdiv(cols, BLOCK_COLS)
    i = tl.program_id(0) // blocks_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    j = tl.program_id(0) % blocks_across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    inside = (i < rows) & (j < cols)
    words = tl.load(meta_ptr + i.to(tl.int64) * tl.cdiv(cols, 32) + j // 32, mask=inside, other=0)
    place = j // M * N + kept_before(words, j, M)
    # Damaged metadata could count past the values of a row.
    kept = inside & (words >> j % 32 & 1 != 0) & (place < cols // M * N)
    weight = tl.load(values_ptr + i.to(tl.int64) * (cols // M * N) + place, mask=kept, other=0.0)
    tl.store(weight_ptr + i.to(tl.int64) * cols + j, weight, mask=inside)
