"""pack_cutlass: packs 2:4 weights in the layout of CUTLASS, which torch's semi-structured tensors use.

Every group of four is stored as two values and two 2-bit indices. One word of metadata holds the indices of four groups
(eight for int8). Words are interleaved in the order in which tensor cores read them. The layout is defined by
torch.sparse._semi_structured_conversions; results equal those of torch bit for bit.

Bytes per weight of e bytes: e read (e / 2 + 1/8 if packed), e / 2 + 1/8 written, in one pass.
"""

from __future__ import annotations

import torch

from . import launch, launch_packed
from .errors import ArgumentError
from .group_choice import best_of_group
from .op import Op, Work, bytes_of, launch_metadata
from .packed_nm import PackedNM, refuse_first, unpack_bits
from .registers import bits_of, joined_bits, spread, unzip, zipped
from .score_terms import ScoreTerms, score
from .select_nm import check_selection, flops_of_scores, members, select_nm_reference, with_unit_stride
from .triton_import import tl, triton

META = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int32}
"""The metadata's dtype for each dtype of the weight."""

BITS = {1: torch.int8, 2: torch.int16}
"""The integer dtype with the same number of bytes."""


def pack_cutlass(weight: torch.Tensor | PackedNM, terms: ScoreTerms | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [out, in / 2] and metadata [out, in / 16] (int16; [out, in / 32], int32, for int8) of a 2:4 weight.

    The host reads if a dense weight is 2:4, so a GPU call synchronizes and cannot be captured in a CUDA graph.

    Args:
        weight: dense [out, in], fp16 or bf16 (out and in multiples of 32) or int8 (out a multiple of 16, in of 64); or
            packed 2:4, which is converted without a dense copy.
        terms: score terms by which a dense fp16 or bf16 weight is pruned in the same pass; ``weight`` itself is not
            changed. None if the weight is 2:4 already.

    Raises:
        ArgumentError: if CUTLASS does not support the shape, dtype or pattern, or if the terms do not fit.
        PatternError: if a group has more than two non-zeros; torch's converter would silently drop one.
    """
    check_cutlass(weight)
    if isinstance(weight, PackedNM):
        if terms is not None:
            raise ArgumentError(
                "score terms need a dense weight, but this one is packed: unpack it (unpack_nm), or leave terms out"
            )
        return PACK_CUTLASS.on(weight.values, weight.meta)(weight, terms)
    if terms is not None:
        check_selection(weight, terms, "weight")
    return PACK_CUTLASS.on(weight, *(terms.tensors.values() if terms else ()))(weight, terms)


def _by_reference(weight: torch.Tensor | PackedNM, terms: ScoreTerms | None) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(weight, PackedNM):
        return pack_cutlass_reference(*four_of(weight))
    if terms is not None:
        keep = select_nm_reference(weight, terms, 2, 4, output="mask")
        weight = weight.detach().view(BITS[weight.element_size()]).where(keep, 0).view(weight.dtype)
    groups = weight.detach().reshape(weight.shape[0], -1, 4)
    refuse_first((groups != 0).sum(-1).flatten(), 2, 4, weight.shape[1])
    return pack_cutlass_reference(*groups.unbind(-1))


def pack_cutlass_reference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and metadata, computed with plain torch from the four members [out, in / 4] of every group."""
    meta_dtype = META[a.dtype]
    in_a, in_b, in_d = a != 0, b != 0, d != 0
    first = torch.where(in_a, 0, torch.where(in_b, 1, 2))
    both = in_a & in_b
    second = torch.where(both, 1, torch.where((in_a | in_b) & ~in_d, 2, 3))
    # Select integers, because torch.where changes the bits of a bf16 NaN.
    bits = [member.view(BITS[a.element_size()]) for member in (a, b, c, d)]
    low = torch.where(in_a, bits[0], torch.where(in_b, bits[1], bits[2]))
    high = torch.where(both, bits[1], torch.where(second == 2, bits[2], bits[3]))
    values = torch.stack((low, high), -1).flatten(1).view(a.dtype)
    nibbles = (first | (second << 2)).reshape(a.shape[0], -1, 2 * meta_dtype.itemsize)
    words = (nibbles << (4 * torch.arange(2 * meta_dtype.itemsize, device=a.device))).sum(-1)
    meta = words.to(meta_dtype)
    rows, cols = meta.shape
    placed = torch.empty_like(meta).flatten()
    placed[word_places(rows, cols, meta_dtype, meta.device).flatten()] = meta.flatten()
    return values, placed.reshape(rows, cols)


def word_places(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The index in memory of each word [rows, cols] of metadata.

    Rows are interleaved in blocks, 2 x 2 tiles are transposed, and columns are stored in pairs.
    """
    block, ways = (32, 4) if dtype == torch.int16 else (16, 2)
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(cols, device=device)[None, :]
    i = i // block * block + i % 8 * ways + i % block // 8
    swap = (j & 1) - (i & 1)
    i, j = i + swap, j - swap
    return j // 2 * (2 * rows) + 2 * i + j % 2


def four_of(packed: PackedNM) -> tuple[torch.Tensor, ...]:
    """The members [out, in / 4] of every group of a packed 2:4 weight."""
    a, b, c, d = unpack_bits(packed.meta)[:, : packed.shape[1]].reshape(packed.shape[0], -1, 4).unbind(-1)
    bits = packed.values.view(BITS[packed.values.element_size()])
    low, high = bits[:, 0::2], bits[:, 1::2]
    members = (
        torch.where(a, low, 0),
        torch.where(b, torch.where(a, high, low), 0),
        torch.where(c, torch.where(d, low, high), 0),
        torch.where(d, high, 0),
    )
    return tuple(member.view(packed.values.dtype) for member in members)


def check_cutlass(weight: torch.Tensor | PackedNM) -> None:
    """Raise ArgumentError if CUTLASS does not support the weight's shape, dtype or pattern."""
    shape: tuple[int, ...] = tuple(weight.shape)
    if isinstance(weight, PackedNM):
        if (weight.n, weight.m) != (2, 4):
            raise ArgumentError(f"CUTLASS supports only 2:4, but the weight is packed {weight.n}:{weight.m}")
        weight.check_tensors()
        dtype = weight.values.dtype
    else:
        dtype = weight.dtype
    if len(shape) != 2:
        raise ArgumentError(f"weight must be [out_features, in_features], got shape {shape}")
    if dtype not in META:
        raise ArgumentError(f"pack_cutlass needs float16, bfloat16 or int8, got {dtype}: convert the weight")
    rows, cols = (16, 64) if dtype == torch.int8 else (32, 32)
    if shape[0] % rows or shape[1] % cols:
        raise ArgumentError(
            f"for {dtype}, CUTLASS needs a multiple of {rows} outputs and of {cols} inputs, got shape {shape}"
        )


def _pack_cutlass_triton(
    weight: torch.Tensor | PackedNM, terms: ScoreTerms | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(weight, PackedNM):
        return _launched(weight.values, weight.meta, None, *weight.shape)[:2]
    values, meta, whole = _launched(with_unit_stride(weight), None, terms, *weight.shape)
    return (values, meta) if whole else _by_reference(weight, terms)


def _launched(
    source: torch.Tensor, bits: torch.Tensor | None, terms: ScoreTerms | None, rows: int, cols: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Values, metadata, and whether no group had more than two non-zeros; ``source`` is a dense weight, or the values
    of a packed one with its metadata ``bits``."""
    values = torch.empty(rows, cols // 2, dtype=source.dtype, device=source.device)
    meta_dtype = META[source.dtype]
    meta = torch.empty(rows, cols // (8 * meta_dtype.itemsize), dtype=meta_dtype, device=source.device)
    if not values.numel():
        return values, meta, True
    tile = launch_packed.unpack_nm(source, cols)
    grid = triton.cdiv(cols, 2 * tile.vector * tile.threads) * triton.cdiv(rows, tile.block_rows)
    lost = None if terms or bits is not None else torch.empty(grid, dtype=torch.int32, device=source.device)
    factors = (terms.row, terms.col, terms.scale, terms.coupling) if terms else (None,) * 4
    _pack_cutlass_body[(grid,)](
        *(source, bits, values, meta, lost),
        *factors,
        *(rows, cols, source.stride(0)),
        POWER=terms.power if terms else 0,
        BLOCK_ROWS=tile.block_rows,
        VECTOR=tile.vector,
        LANES=tile.threads,
        num_warps=launch.WARPS,
    )
    return values, meta, lost is None or not bool(lost.any())


def _work(weight: torch.Tensor | PackedNM, terms: ScoreTerms | None) -> Work:
    if isinstance(weight, PackedNM):
        return Work(2 * weight.packed_bytes)
    packed = weight.nbytes // 2 + weight.numel() // 8
    if terms is None:
        return Work(weight.nbytes + packed)
    return Work(bytes_of(weight, *terms.tensors.values()) + packed, flops_of_scores(weight, terms))


PACK_CUTLASS = Op("pack_cutlass", _work, _by_reference, triton=_pack_cutlass_triton)


@triton.jit(launch_metadata=launch_metadata)
def _pack_cutlass_body(
    source_ptr,
    bits_ptr,
    values_ptr,
    meta_ptr,
    lost_ptr,
    row_ptr,
    col_ptr,
    scale_ptr,
    coupling_ptr,
    rows,
    cols,
    stride,
    POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """A thread writes one word of metadata and VECTOR values in one access, from 2 * VECTOR weights."""
    blocks_across = tl.cdiv(cols, 2 * VECTOR * LANES)
    block = tl.program_id(0) % blocks_across
    row = (tl.program_id(0) // blocks_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    word = block * LANES + tl.arange(0, LANES)[None, :]
    value = block * (VECTOR * LANES) + tl.arange(0, VECTOR * LANES)[None, :]
    line = row.to(tl.int64)
    lost = tl.zeros([BLOCK_ROWS, LANES], tl.int32)
    weights = ()
    if bits_ptr is not None:
        inside = (row < rows) & (value < cols // 2)
        packed = unzip(tl.load(source_ptr + line * stride + value, mask=inside, other=0.0), VECTOR)
        start = word * (2 * VECTOR)
        bits = tl.load(bits_ptr + line * tl.cdiv(cols, 32) + start // 32, mask=(row < rows) & (start < cols), other=0)
        for g in tl.static_range(VECTOR // 2):
            low, high = bits_of(packed[2 * g]), bits_of(packed[2 * g + 1])
            weights = weights + spread(low, high, bits >> start % 32, 4 * g)
    else:
        members_of_word = _of_words(source_ptr, line * stride, block, row < rows, cols, VECTOR, VECTOR, LANES)
        row_term = None if row_ptr is None else tl.load(row_ptr + row, mask=row < rows, other=0.0)
        col_terms = _of_words(col_ptr, 0, block, True, cols, VECTOR, 4, LANES)
        scale_terms = _of_words(scale_ptr, 0, block, True, cols, VECTOR, 4, LANES)
        factors = _of_words(coupling_ptr, line * cols, block, row < rows, cols, VECTOR, 4, LANES)
        keys = ()
        for k in tl.static_range(2 * VECTOR):
            weights = weights + (bits_of(members_of_word[k]),)
            if POWER > 0:
                value_of = score(
                    members_of_word[k].to(tl.float32),
                    row_term,
                    None if col_ptr is None else col_terms[k],
                    None if scale_ptr is None else scale_terms[k],
                    None if coupling_ptr is None else factors[k],
                    POWER,
                )
                keys = keys + (value_of.to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
        if POWER > 0:
            weights = _pruned(weights, keys)

    values = ()
    codes = ()
    for g in tl.static_range(VECTOR // 2):
        low, high, code, count = _two_of_four(
            weights[4 * g], weights[4 * g + 1], weights[4 * g + 2], weights[4 * g + 3]
        )
        values = values + (low, high)
        codes = codes + (code,)
        lost = tl.maximum(lost, count)
    packed_values = zipped(values).to(values_ptr.dtype.element_ty, bitcast=True)
    there = (row < rows) & (value < cols // 2)
    tl.store(values_ptr + line * (cols // 2) + value, packed_values, mask=there)
    words = joined_bits(codes, 4).to(meta_ptr.dtype.element_ty)
    place = _word_place(row, word, rows, VECTOR)
    tl.store(meta_ptr + place, words, mask=(row < rows) & (word * (2 * VECTOR) < cols))
    if lost_ptr is not None:
        tl.store(lost_ptr + tl.program_id(0), (tl.max(tl.max(lost, 1), 0) > 2).to(tl.int32))


@triton.jit
def _pruned(weights, keys):
    """Bits of the members of groups of four; 0 for the two members with the lowest keys."""
    pruned = ()
    for g in tl.static_range(len(weights) // 4):
        kept = best_of_group((keys[4 * g], keys[4 * g + 1], keys[4 * g + 2], keys[4 * g + 3]), 2)
        for k in tl.static_range(4):
            pruned = pruned + (weights[4 * g + k] & kept[k].to(weights[4 * g + k].dtype),)
    return pruned


@triton.jit
def _of_words(pointer, line, block, inside, cols, VECTOR: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr):
    """The elements at the 2 * VECTOR columns of each word, one tile per column, SPLIT columns per access; () without a
    pointer."""
    parts = ()
    if pointer is not None:
        place = tl.arange(0, LANES * SPLIT)[None, :]
        for access in tl.static_range(2 * VECTOR // SPLIT):
            j = (block * LANES + place // SPLIT) * (2 * VECTOR) + access * SPLIT + place % SPLIT
            parts = parts + members(pointer, line + j, inside & (j < cols), SPLIT)
    return parts


@triton.jit
def _two_of_four(a, b, c, d):
    """Bits of the two values, their indices as four bits, and the number of non-zeros; as in torch's converter."""
    in_a, in_b, in_c, in_d = _not_zero(a), _not_zero(b), _not_zero(c), _not_zero(d)
    both = in_a & in_b
    third = (in_a | in_b) & (in_d == 0)
    low = tl.where(in_a, a, tl.where(in_b, b, c))
    high = tl.where(both, b, tl.where(third, c, d))
    first = tl.where(in_a, 0, tl.where(in_b, 1, 2))
    second = tl.where(both, 1, tl.where(third, 2, 3))
    count = in_a.to(tl.int32) + in_b.to(tl.int32) + in_c.to(tl.int32) + in_d.to(tl.int32)
    return low, high, first | second << 2, count


@triton.jit
def _not_zero(bits):
    """True for non-zeros. The sign bit of fp16 and bf16 is ignored, so -0.0 counts as zero."""
    if bits.dtype.primitive_bitwidth == 16:
        found = (bits & 0x7FFF) != 0
    else:
        found = bits != 0
    return found


@triton.jit
def _word_place(i, j, rows, VECTOR: tl.constexpr):
    """:func:`word_places` for words of 2 * VECTOR weights."""
    BLOCK: tl.constexpr = 32 if VECTOR == 8 else 16
    i = i // BLOCK * BLOCK + i % 8 * (BLOCK // 8) + i % BLOCK // 8
    swap = (j & 1) - (i & 1)
    i += swap
    j -= swap
    return (j // 2).to(tl.int64) * (2 * rows) + 2 * i + j % 2
