"""pack_rows: pack the non-zeros of a weight (:mod:`.packed_rows`), and unpack them again, bit for bit.

Bytes per weight of e bytes, with a share d of non-zeros: packing reads 2e and writes e * d + 1/8; unpacking reads
e * d + 1/8 and writes e.
"""

from __future__ import annotations

import torch

from . import cpu_packed, launch_packed
from .errors import ArgumentError
from .op import Op, Work, launch_metadata
from .packed_nm import WORD, unpack_bits
from .packed_rows import DTYPES, PackedRows
from .registers import count_bits
from .select_nm import pack_bits
from .triton_import import tl, triton


def pack_rows(weight: torch.Tensor) -> PackedRows:
    """Pack the non-zeros of a weight.

    The host reads the number of non-zeros, so a GPU call synchronizes and cannot be captured in a CUDA graph.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16, with any zeros.

    Raises:
        ArgumentError: if the shape or dtype is not supported.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ArgumentError(
            "weight must be [out_features, in_features] in float32, float16 or bfloat16, "
            f"got shape {tuple(weight.shape)} and {weight.dtype}"
        )
    return PACK_ROWS.on(weight)(weight)


def pack_rows_reference(weight: torch.Tensor) -> PackedRows:
    """The same in plain torch."""
    weight = weight.detach()
    keep = weight != 0
    octets = pack_bits(keep)
    rows, cols = weight.shape
    meta = torch.zeros(rows, -(-cols // WORD), dtype=torch.int32, device=weight.device)
    meta.view(torch.uint8)[:, : octets.shape[1]] = octets
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(keep.sum(1), 0, out=starts[1:])
    return PackedRows(weight[keep], meta, starts, (rows, cols))


def unpack_rows(packed: PackedRows, into: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight [out, in] in its own dtype; non-zeros are equal bit for bit, zeros are +0.0.

    Args:
        packed: the packed weight. Invalid metadata (see :meth:`PackedRows.check`) give a wrong weight.
        into: if given, receives the result and is returned; contiguous, with the weight's shape and dtype. None for a
            new tensor.

    Raises:
        ArgumentError: if a tensor does not fit, or if tensors are on different devices.
    """
    dtype = packed.values.dtype
    if into is not None and (tuple(into.shape) != packed.shape or into.dtype != dtype or not into.is_contiguous()):
        raise ArgumentError(
            f"into must be contiguous {dtype} {packed.shape}, got {into.dtype} {tuple(into.shape)} "
            f"with strides {into.stride()}"
        )
    return UNPACK_ROWS.on(packed.values, packed.meta, packed.starts, into, writes=(into,))(packed, into)


def unpack_rows_reference(packed: PackedRows) -> torch.Tensor:
    """The dense weight, computed with plain torch."""
    kept = unpack_bits(packed.meta)[:, : packed.shape[1]]
    if not len(packed.values):
        return packed.values.new_zeros(packed.shape)
    place = packed.starts[:-1, None] + kept.cumsum(1) - 1
    inside = kept & (place >= 0) & (place < len(packed.values))
    return torch.where(inside, packed.values[place.clamp(0, len(packed.values) - 1)], 0)


def _pack_rows_cpu(weight: torch.Tensor) -> PackedRows:
    return PackedRows(*cpu_packed.pack_rows(weight), (weight.shape[0], weight.shape[1]))


def _unpack_rows_cpu(packed: PackedRows, into: torch.Tensor | None) -> torch.Tensor:
    return cpu_packed.unpack_rows(packed, into) if packed.values.dtype in DTYPES else _unpack_by_reference(packed, into)


def _unpack_by_reference(packed: PackedRows, into: torch.Tensor | None) -> torch.Tensor:
    packed.check_tensors()
    weight = unpack_rows_reference(packed)
    return weight if into is None else into.copy_(weight)


def _unpack_rows_triton(packed: PackedRows, into: torch.Tensor | None) -> torch.Tensor:
    if packed.values.dtype not in DTYPES:
        return _unpack_by_reference(packed, into)
    packed.check_tensors()
    weight = packed.values.new_empty(packed.shape) if into is None else into
    if weight.numel():
        rows, cols = packed.shape
        tile = launch_packed.rows_linear(packed.meta, 1)
        _unpack_rows_body[(triton.cdiv(rows, tile.block_rows),)](
            *(packed.values, packed.meta, packed.starts, weight, len(packed.values), rows, cols),
            BLOCK_ROWS=tile.block_rows,
            WORDS=tile.words,
            num_warps=tile.num_warps,
        )
    return weight


def _work_of_packing(weight: torch.Tensor) -> Work:
    rows, cols = weight.shape
    values = int(torch.count_nonzero(weight)) * weight.element_size()
    return Work(weight.nbytes + values + rows * -(-cols // WORD) * 4 + (rows + 1) * 8)


def _work_of_unpacking(packed: PackedRows, into: torch.Tensor | None) -> Work:
    return Work(packed.packed_bytes + packed.dense_bytes)


PACK_ROWS = Op("pack_rows", _work_of_packing, pack_rows_reference, _pack_rows_cpu)
UNPACK_ROWS = Op("unpack_rows", _work_of_unpacking, _unpack_by_reference, _unpack_rows_cpu, _unpack_rows_triton)


@triton.jit(launch_metadata=launch_metadata)
def _unpack_rows_body(
    values_ptr,
    meta_ptr,
    starts_ptr,
    weight_ptr,
    n_values,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A program unpacks whole rows, WORDS words of metadata at a time."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    start, n_left = row_of(starts_ptr, i, n_values, rows)
    read = tl.zeros([BLOCK_ROWS, 1], tl.int32)
    for first in tl.range(0, tl.cdiv(cols, 32), WORDS):
        weight, _, read = load_kept(values_ptr + start, meta_ptr, n_left, read, i, first, rows, cols, WORDS)
        j = (first + tl.arange(0, WORDS)[None, :, None]) * 32 + tl.arange(0, 32)[None, None, :]
        line = weight_ptr + i.to(tl.int64)[:, :, None] * cols
        tl.store(line + j, weight, mask=(i < rows)[:, :, None] & (j < cols))


@triton.jit
def row_of(starts_ptr, i, n_values, rows):
    """The places of the first values of rows i [R, 1], and how many values follow: 0 if a start is damaged.

    A row has fewer than 2^31 values, so its own places fit in 32 bits.
    """
    start = tl.load(starts_ptr + i, mask=i < rows, other=0)
    n_left = tl.where(start < 0, 0, tl.maximum(tl.minimum(n_values - start, 0x7FFFFFFF), 0)).to(tl.int32)
    return start, n_left


@triton.jit
def load_kept(first_ptr, meta_ptr, n_left, read, i, first, rows, cols, WORDS: tl.constexpr):
    """Weights [R, WORDS, 32] of rows i [R, 1], from word ``first`` of their metadata on.

    ``first_ptr`` [R, 1] points to each row's first value, ``n_left`` is from :func:`row_of`, and ``read`` is the number
    of values that were read. Also returns which weights are kept, and the new ``read``.
    """
    word = first + tl.arange(0, WORDS)[None, :]
    words_in_row = tl.cdiv(cols, 32)
    line = meta_ptr + i.to(tl.int64) * words_in_row
    words = tl.load(line + word, mask=(i < rows) & (word < words_in_row), other=0)
    counts = count_bits(words)
    before = read + tl.cumsum(counts, 1) - counts
    bits = words[:, :, None] >> tl.arange(0, 32)[None, None, :] & 1
    place = before[:, :, None] + tl.cumsum(bits, 2) - bits
    kept = (bits != 0) & (place < n_left[:, :, None])
    weight = tl.load(first_ptr[:, :, None] + place, mask=kept, other=0.0)
    return weight, kept, read + tl.sum(counts, 1, keep_dims=True)
