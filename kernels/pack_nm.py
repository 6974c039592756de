"""pack_nm: packs n:m weights in the layout of packed_nm, from a pruned weight or in the same pass as the selection.

Bytes per weight of e bytes: e read, e * n / m + 1/8 written, in one pass.
"""

from __future__ import annotations

import torch

from . import cpu_packed, launch
from .errors import PatternError
from .group_choice import best_of_group
from .op import Op, Work, bytes_of, launch_metadata
from .pack_cutlass import pack_cutlass
from .packed_nm import LAYOUT_VERSION, WORD, PackedNM, check_packable, refuse_first
from .registers import bits_of, compacted, zipped
from .score_terms import ScoreTerms, score
from .select_nm import (
    check_selection,
    columns,
    flops_of_scores,
    members,
    pack_bits,
    select_nm_reference,
    store_bits,
    with_unit_stride,
)
from .triton_import import tl, triton

__all__ = [
    "LAYOUT_VERSION",
    "PackedNM",
    "PatternError",
    "pack_cutlass",
    "pack_nm",
    "pack_nm_reference",
    "pack_scored",
    "pack_scored_reference",
]


def pack_nm(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    """Pack a weight that is already n:m.

    The host reads if the weight is n:m, so a GPU call synchronizes and cannot be captured in a CUDA graph.

    Args:
        weight: [out_features, in_features], fp32, fp16, bf16 or int8; at most n of every m inputs are non-zero.
        n: how many weights of a group are kept, 0 < n < m.
        m: group size, one of 2, 4, 8, 16, 32; divides in_features.

    Raises:
        ArgumentError: if the pattern, shape or dtype is not supported; the message says what is.
        PatternError: if a group has more than n non-zeros.
    """
    check_packable(weight, n, m)
    return PACK_NM.on(weight)(weight, n, m)


def pack_nm_reference(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    """The same in plain torch."""
    weight = weight.detach()
    rows, cols = weight.shape
    not_zero = (weight != 0).reshape(rows, cols // m, m)
    refuse_first(not_zero.sum(-1).flatten(), n, m, cols)
    negative = torch.signbit(weight).reshape(not_zero.shape)
    rank = torch.where(not_zero, 2, negative.to(torch.int8))
    pruned = rank.argsort(dim=-1, stable=True)[..., : m - n]
    keep = torch.ones_like(not_zero).scatter_(-1, pruned, False).reshape(rows, cols)
    return packed_by(weight, keep, n, m)


def pack_scored(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    """Prune by score and pack in one pass. ``weight`` is only read; the pruned dense weight is never written.

    Arguments and errors are those of :func:`~ace_triton.kernels.select_nm.select_nm`. If no score is NaN, the result
    equals ``pack_nm(select_nm(weight, terms, n, m), n, m)``. Otherwise the two are equal after unpacking.
    """
    check_packable(weight, n, m)
    check_selection(weight, terms, "weight")
    return PACK_SCORED.on(weight, *terms.tensors.values())(weight, terms, n, m)


def pack_scored_reference(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    """The same in plain torch."""
    return packed_by(weight.detach(), select_nm_reference(weight, terms, n, m, output="mask"), n, m)


def packed_by(weight: torch.Tensor, keep: torch.Tensor, n: int, m: int) -> PackedNM:
    """Pack the weights that a mask [out, in] keeps; it keeps exactly n of every m."""
    rows, cols = weight.shape
    octets = pack_bits(keep)
    meta = torch.zeros(rows, -(-cols // WORD), dtype=torch.int32, device=weight.device)
    meta.view(torch.uint8)[:, : octets.shape[1]] = octets
    return PackedNM(weight[keep].reshape(rows, cols // m * n), meta, n, m, (rows, cols))


def _pack_nm_cpu(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    if weight.dtype == torch.int8:
        return pack_nm_reference(weight, n, m)
    return _whole(weight, *_packed_cpu(weight, None, n, m))


def _pack_nm_triton(weight: torch.Tensor, n: int, m: int) -> PackedNM:
    return _whole(weight, *_packed_triton(weight, None, n, m))


def _pack_scored_cpu(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    return _packed_cpu(weight, terms, n, m)[0]


def _pack_scored_triton(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> PackedNM:
    return _packed_triton(weight, terms, n, m)[0]


def _whole(weight: torch.Tensor, packed: PackedNM, whole: bool) -> PackedNM:
    """``packed`` if it is ``whole``; else PatternError for the first group that lost a non-zero."""
    if not whole:
        refuse_first((weight.detach() != 0).reshape(-1, packed.m).sum(-1), packed.n, packed.m, weight.shape[1])
    return packed


def _packed_cpu(weight: torch.Tensor, terms: ScoreTerms | None, n: int, m: int) -> tuple[PackedNM, bool]:
    """The weight packed by score or, without terms, by its non-zeros; and whether no group lost a non-zero."""
    values, meta, whole = cpu_packed.pack_nm(weight.detach(), terms, n, m)
    return PackedNM(values, meta, n, m, (weight.shape[0], weight.shape[1])), whole


def _packed_triton(weight: torch.Tensor, terms: ScoreTerms | None, n: int, m: int) -> tuple[PackedNM, bool]:
    """As :func:`_packed_cpu`."""
    source = with_unit_stride(weight)
    rows, cols = source.shape
    values = torch.empty(rows, cols // m * n, dtype=weight.dtype, device=weight.device)
    words = -(-cols // WORD)
    new = torch.zeros if cols % WORD else torch.empty
    meta = new(rows, words, dtype=torch.int32, device=weight.device)
    packed = PackedNM(values, meta, n, m, (rows, cols))
    if not source.numel():
        return packed, True
    tile = launch.select_nm(source, m, "in")
    grid = tile.programs(source, m, "in")
    lost = None if terms else torch.empty(grid, dtype=torch.int32, device=weight.device)
    factors = (terms.row, terms.col, terms.scale, terms.coupling) if terms else (None,) * 4
    _pack_nm_body[(grid,)](
        *(source, values, meta.view(torch.uint8), lost),
        *factors,
        *(rows, cols, source.stride(0)),
        N=n,
        M=m,
        SPLIT=tile.split,
        POWER=terms.power if terms else 0,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_COLS=tile.block_cols,
        TRIPS=tile.trips,
        num_warps=tile.num_warps,
    )
    return packed, lost is None or not bool(lost.any())


def _work(weight: torch.Tensor, n: int, m: int) -> Work:
    rows, cols = weight.shape
    return Work(weight.nbytes + weight.nbytes // m * n + 4 * rows * -(-cols // WORD))


def _work_scored(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int) -> Work:
    moved = _work(weight, n, m).bytes + bytes_of(*terms.tensors.values())
    return Work(moved, flops_of_scores(weight, terms))


PACK_NM = Op("pack_nm", _work, pack_nm_reference, _pack_nm_cpu, _pack_nm_triton)
PACK_SCORED = Op("pack_scored", _work_scored, pack_scored_reference, _pack_scored_cpu, _pack_scored_triton)


@triton.jit(launch_metadata=launch_metadata)
def _pack_nm_body(
    weight_ptr,
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
    N: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TRIPS: tl.constexpr,
):
    """As select_nm's kernel along "in", but it writes the kept weights packed, in order; POWER 0 keeps non-zeros."""
    ACCESSES: tl.constexpr = M // SPLIT
    GROUPS: tl.constexpr = BLOCK_COLS // SPLIT
    blocks_across = tl.cdiv(cols // ACCESSES, BLOCK_COLS)
    block = tl.program_id(0) % blocks_across
    row = (tl.program_id(0) // blocks_across * (TRIPS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS))[:, None]
    group = block * GROUPS + tl.arange(0, GROUPS)[None, :]
    octets = (cols + 31) // 32 * 4

    col_terms = ()
    scale_terms = ()
    for access in tl.static_range(ACCESSES):
        j = columns(block, access, SPLIT, M, "in", BLOCK_COLS)
        col_terms = col_terms + members(col_ptr, j, j < cols, SPLIT)
        scale_terms = scale_terms + members(scale_ptr, j, j < cols, SPLIT)

    lost = tl.zeros([BLOCK_ROWS, GROUPS], tl.int32)
    for _ in tl.range(TRIPS):
        weights = ()
        keys = ()
        row_term = None if row_ptr is None else tl.load(row_ptr + row, mask=row < rows, other=0.0)
        for access in tl.static_range(ACCESSES):
            j = columns(block, access, SPLIT, M, "in", BLOCK_COLS)
            inside = (row < rows) & (j < cols)
            piece = members(weight_ptr, row.to(tl.int64) * stride + j, inside, SPLIT)
            factors = members(coupling_ptr, row.to(tl.int64) * cols + j, inside, SPLIT)
            for k in tl.static_range(SPLIT):
                if POWER == 0:
                    keys = keys + (_presence(piece[k]),)
                else:
                    value = score(
                        piece[k].to(tl.float32),
                        row_term,
                        None if col_ptr is None else col_terms[access * SPLIT + k],
                        None if scale_ptr is None else scale_terms[access * SPLIT + k],
                        None if coupling_ptr is None else factors[k],
                        POWER,
                    )
                    keys = keys + (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
                weights = weights + (bits_of(piece[k]),)
        kept = best_of_group(keys, N)
        if POWER == 0:
            for k in tl.static_range(M):
                lost = lost | (keys[k] & ~kept[k])
        values = compacted(weights, kept, N)
        start = row.to(tl.int64) * (cols // M * N)
        if N & (N - 1) == 0:
            place = block * (GROUPS * N) + tl.arange(0, GROUPS * N)[None, :]
            whole = zipped(values).to(values_ptr.dtype.element_ty, bitcast=True)
            tl.store(values_ptr + start + place, whole, mask=(row < rows) & (place < cols // M * N))
        else:
            for k in tl.static_range(N):
                value = values[k].to(values_ptr.dtype.element_ty, bitcast=True)
                tl.store(values_ptr + start + group * N + k, value, mask=(row < rows) & (group * M < cols))
        store_bits(meta_ptr, row.to(tl.int64) * octets, kept, block, row < rows, cols, octets, "in", BLOCK_COLS)
        row += BLOCK_ROWS
    if POWER == 0:
        tl.store(lost_ptr + tl.program_id(0), tl.max(tl.max(lost & ~1, 1), 0))


@triton.jit
def _presence(weight):
    """0 for positive zero, 1 for negative zero, 2 or more for non-zeros."""
    bits = bits_of(weight).to(tl.int32)
    if weight.dtype == tl.int8:
        key = (bits & 0xFF) << 1
    elif weight.dtype.primitive_bitwidth == 16:
        # Rotate left by one, so that the sign becomes the last bit.
        key = (bits << 1 & 0xFFFE) | (bits >> 15 & 1)
    else:
        key = (-(bits & 0x7FFFFFFF) >> 31 & 2) | (bits >> 31 & 1)
    return key
