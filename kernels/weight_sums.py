"""weight_sums: RIA's row and column sums of |W| in one read of the weight, or the score terms computed from them.

R_i = sum_j |W_ij|,   C_j = sum_i |W_ij|      (RIA, "Plug-and-Play", ICLR 2024)

Two launches. The first computes partial sums over a few hundred rows and columns each. The second merges them; it can
also invert the sums and compute the column vector of the score. Bytes per weight of e bytes: e read, and about 1 % more
for the partial sums of a large layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu, launch_sums
from .column_scale import ColumnScale, column_scale_reference, column_scale_work, rules, scale_at
from .errors import ArgumentError
from .finite import not_finite_reference, note_not_finite
from .finite_check import FiniteCheck
from .op import Op, Work, launch_metadata
from .score_terms import ScoreTerms
from .triton_import import tl, triton
from .vector_group import grouped_column_scale, in_group

# Tile for merging partial sums: a few dozen loads in flight per warp.
MERGED_PARTS, MERGED_SUMS = 16, 32

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class WeightSums(NamedTuple):
    """Sums of |weight|.

    Attributes:
        row: fp32 [out_features], the sum of each row.
        col: fp32 [in_features], the sum of each column.
        not_finite: int32 [1] flag, non-zero if a sum is NaN or infinite.
    """

    row: torch.Tensor
    col: torch.Tensor
    not_finite: torch.Tensor


def weight_sums(weight: torch.Tensor) -> WeightSums:
    """Row and column sums of |weight|; deterministic.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.

    Raises:
        ArgumentError: if the shape or dtype does not fit.
    """
    check_matrix(weight)
    return WEIGHT_SUMS.on(weight)(weight)


def relative_importance(weight: torch.Tensor, scale: ColumnScale | None = None) -> ScoreTerms:
    """RIA's |W_ij| / C_j + |W_ij| / R_i, times a column vector: the terms ``row``, ``col`` and ``scale`` of a score.

    The inverse of a sum of 0 is large but finite; its weights are 0, so their scores are too. The inverse of a sum that
    is not finite is NaN, so NaN and infinity in the weight show in both vectors. The terms' ``finite`` covers the
    weight and all vectors.

    Args:
        weight: [out_features, in_features], fp32, fp16 or bf16.
        scale: column scale of in_features columns, or None.

    Raises:
        ArgumentError: if a shape or dtype does not fit.
    """
    check_matrix(weight)
    if scale is not None and scale.in_features != weight.shape[1]:
        raise ArgumentError(
            f"the scale must have the weight's {weight.shape[1]} columns, got {scale.in_features} columns "
            f"for a weight of shape {tuple(weight.shape)}"
        )
    kept = _kept.get(weight)
    if kept is not None and kept.version == weight._version:
        return kept.with_scale(scale)
    if in_group():  # The scale's inputs may not be written yet.
        return _Kept.of(weight, RELATIVE_IMPORTANCE.on(weight)(weight, None)).with_scale(scale)
    vectors = () if scale is None else scale.vectors().values()
    return RELATIVE_IMPORTANCE.on(weight, *vectors)(weight, scale)


@dataclass(frozen=True)
class _Kept:
    """The terms of a weight, its version counter when they were computed, and what is known of their range."""

    version: int
    row: torch.Tensor
    col: torch.Tensor
    finite: FiniteCheck

    @classmethod
    def of(cls, weight: torch.Tensor, terms: ScoreTerms) -> _Kept:
        """The terms that were computed of a weight without a scale."""
        assert terms.row is not None
        assert terms.col is not None
        assert terms.finite is not None
        return cls(weight._version, terms.row, terms.col, terms.finite)

    def with_scale(self, scale: ColumnScale | None) -> ScoreTerms:
        """The terms with a column scale, which is all that is computed."""
        if scale is None:
            return ScoreTerms(self.row, self.col, finite=self.finite)
        vector, flags = grouped_column_scale(scale)
        return ScoreTerms(
            self.row, self.col, vector, finite=FiniteCheck(self.finite).record(terms=[vector], flags=flags)
        )


_kept = WeakTensorKeyDictionary()


def keep_relative_importance(weight: torch.Tensor, finite: FiniteCheck) -> None:
    """Compute the row and column terms of :func:`relative_importance` now.

    Later calls for the same tensor then do not read the weight, until it is written. The check for NaN and infinity is
    recorded in ``finite``, and nobody waits for it.
    """
    keep_terms(weight, RELATIVE_IMPORTANCE.on(weight)(weight, None), finite)


def keep_terms(weight: torch.Tensor, terms: ScoreTerms, finite: FiniteCheck) -> None:
    """Keep terms that :func:`relative_importance` computed from a weight, and record their check in ``finite``."""
    assert terms.finite is not None
    kept, found = _Kept.of(weight, terms), terms.finite.pending(weight)
    flags = found if isinstance(found, torch.Tensor) else None
    assert flags is not None or found
    finite.record(weight, terms=[kept.row, kept.col], flags=flags)
    _kept[weight] = replace(kept, finite=finite)


def weight_sums_reference(weight: torch.Tensor) -> WeightSums:
    """As :func:`weight_sums`, computed with plain torch in fp64."""
    magnitude = weight.detach().double().abs()
    sums = magnitude.sum(1).float(), magnitude.sum(0).float()
    return WeightSums(*sums, not_finite_reference(*sums))


def relative_importance_reference(weight: torch.Tensor, scale: ColumnScale | None = None) -> ScoreTerms:
    """As :func:`relative_importance`, computed with plain torch from sums in fp64."""
    sums = weight_sums_reference(weight)
    row, col = _inverse(sums.row), _inverse(sums.col)
    columns = None if scale is None else column_scale_reference(scale)
    made = (row, col) if columns is None else (row, col, columns)
    return checked_terms(weight, row, col, columns, not_finite_reference(*made))


def checked_terms(
    weight: torch.Tensor, row: torch.Tensor, col: torch.Tensor, scale: torch.Tensor | None, flags: torch.Tensor
) -> ScoreTerms:
    """The terms, with the flags of the launch that computed them."""
    vectors = [vector for vector in (row, col, scale) if vector is not None]
    return ScoreTerms(row, col, scale, finite=FiniteCheck().record(weight, terms=vectors, flags=flags))


def check_matrix(weight: torch.Tensor) -> None:
    if weight.dim() != 2:
        raise ArgumentError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")


def _inverse(sums: torch.Tensor) -> torch.Tensor:
    return torch.where(sums.isfinite(), sums.clamp(min=SMALLEST_NORMAL).reciprocal(), torch.nan)


_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
"""Row and column sums or their inverses, the column scale, and a flag that is non-zero if one is not finite."""


def _weight_sums_by(sums: Callable[..., _Sums]) -> Callable[[torch.Tensor], WeightSums]:
    """The body of :func:`weight_sums` that calls ``sums``."""

    def body(weight: torch.Tensor) -> WeightSums:
        row, col, _, found = sums(weight)
        return WeightSums(row, col, found)

    return body


def _relative_importance_by(sums: Callable[..., _Sums]) -> Callable[[torch.Tensor, ColumnScale | None], ScoreTerms]:
    """The body of :func:`relative_importance` that calls ``sums``."""

    def body(weight: torch.Tensor, scale: ColumnScale | None) -> ScoreTerms:
        row, col, vector, found = sums(weight, True, scale)
        return checked_terms(weight, row, col, vector, found)

    return body


def _sums_triton(weight: torch.Tensor, inverse: bool = False, scale: ColumnScale | None = None) -> _Sums:
    weight = weight.detach()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, cols = weight.shape
    tile = launch_sums.weight_sums(weight)
    across = triton.cdiv(cols, tile.pieces * tile.block_cols)
    down = triton.cdiv(rows, tile.block_rows * tile.trips)
    row_parts, row_sums = (torch.empty(n, rows, dtype=torch.float32, device=weight.device) for n in (across, 1))
    col_parts, col_sums = (torch.empty(n, cols, dtype=torch.float32, device=weight.device) for n in (down, 1))
    columns = None if scale is None else torch.empty_like(col_sums[0])
    # The first launch clears the flag.
    make = torch.empty if weight.numel() else torch.zeros
    found = make(1, dtype=torch.int32, device=weight.device)
    if weight.numel():
        _sum_magnitudes[(across * down,)](
            *(weight, row_parts, col_parts, found, rows, cols, weight.stride(0)),
            BLOCK_ROWS=tile.block_rows,
            BLOCK_COLS=tile.block_cols,
            PIECES=tile.pieces,
            TRIPS=tile.trips,
            num_warps=tile.num_warps,
        )
    if rows + cols:
        vectors = (None, 1.0, None, None) if scale is None else scale.rounded_parts()
        col_blocks = triton.cdiv(cols, MERGED_SUMS)
        _merge_parts[(col_blocks + triton.cdiv(rows, MERGED_SUMS),)](
            *(row_parts, col_parts, row_sums, col_sums, across, down, rows, cols, col_blocks),
            *(*vectors, columns, found),
            **rules(scale),
            INVERSE=inverse,
            SMALLEST=SMALLEST_NORMAL,
            BLOCK_PARTS=MERGED_PARTS,
            BLOCK_SUMS=MERGED_SUMS,
            num_warps=1,
        )
    return row_sums[0], col_sums[0], columns, found


def _work(weight: torch.Tensor) -> Work:
    return Work(weight.nbytes + 4 * sum(weight.shape), 2 * weight.numel())


def _work_with_scale(weight: torch.Tensor, scale: ColumnScale | None) -> Work:
    sums = _work(weight)
    if scale is None:
        return sums
    columns = column_scale_work(scale)
    return Work(sums.bytes + columns.bytes, sums.flops + columns.flops)


WEIGHT_SUMS = Op(
    "weight_sums", _work, weight_sums_reference, _weight_sums_by(cpu.weight_sums), _weight_sums_by(_sums_triton)
)
RELATIVE_IMPORTANCE = Op(
    "relative_importance",
    _work_with_scale,
    relative_importance_reference,
    _relative_importance_by(cpu.weight_sums),
    _relative_importance_by(_sums_triton),
)


@triton.jit(launch_metadata=launch_metadata)
def _sum_magnitudes(
    weight_ptr,
    row_parts_ptr,
    col_parts_ptr,
    found_ptr,
    rows,
    cols,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    TRIPS: tl.constexpr,
):
    tl.store(found_ptr, 0, mask=tl.program_id(0) == 0)
    sum_magnitudes(
        *(tl.program_id(0), weight_ptr, row_parts_ptr, col_parts_ptr, rows, cols, stride, TRIPS),
        *(BLOCK_ROWS, BLOCK_COLS, PIECES),
    )


@triton.jit
def sum_magnitudes(
    program,
    weight_ptr,
    row_parts_ptr,
    col_parts_ptr,
    rows,
    cols,
    stride,
    trips,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Partial sums over ``trips`` * BLOCK_ROWS rows and PIECES * BLOCK_COLS columns per program.

    A piece is as wide as one access of a warp, so every warp sums its own rows. One reduction at the end combines the
    warps.
    """
    across = tl.cdiv(cols, PIECES * BLOCK_COLS)
    block = program % across
    part = program // across
    i = part * (trips * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)[:, None]
    j = block * (PIECES * BLOCK_COLS) + tl.arange(0, BLOCK_COLS)[None, :]
    start = i.to(tl.int64) * stride
    step = tl.full([], BLOCK_ROWS, tl.int64) * stride
    col_sums = ()
    for _ in tl.static_range(PIECES):
        col_sums = col_sums + (tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32),)
    for _ in tl.range(trips):
        row_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        added = ()
        for k in tl.static_range(PIECES):
            inside = (i < rows) & (j < cols - k * BLOCK_COLS)
            weight = tl.load(weight_ptr + start + k * BLOCK_COLS + j, mask=inside, other=0.0).to(tl.float32)
            row_sums += tl.abs(weight)
            added = added + (col_sums[k] + tl.abs(weight),)
        col_sums = added
        place = row_parts_ptr + block.to(tl.int64) * rows + i
        tl.store(place, tl.sum(row_sums, 1, keep_dims=True), mask=i < rows)
        i += BLOCK_ROWS
        start += step
    for k in tl.static_range(PIECES):
        place = col_parts_ptr + part.to(tl.int64) * cols + k * BLOCK_COLS + j
        tl.store(place, tl.sum(col_sums[k], 0, keep_dims=True), mask=j < cols - k * BLOCK_COLS)


@triton.jit(launch_metadata=launch_metadata)
def _merge_parts(
    row_parts_ptr,
    col_parts_ptr,
    row_sums_ptr,
    col_sums_ptr,
    across,
    down,
    rows,
    cols,
    col_blocks,
    square_ptr,
    inverse_divisor,
    base_ptr,
    factor_ptr,
    scale_ptr,
    found_ptr,
    SIGN: tl.constexpr,
    QUARTERS: tl.constexpr,
    INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """The first ``col_blocks`` programs merge column sums and compute the column scale; the others merge row sums."""
    block = tl.program_id(0)
    if block < col_blocks:
        merge_parts(
            *(col_parts_ptr, col_sums_ptr, found_ptr, block, down, cols),
            *(INVERSE, SMALLEST, BLOCK_PARTS, BLOCK_SUMS),
        )
        if scale_ptr is not None:
            j = block * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)
            scale = scale_at(square_ptr, inverse_divisor, base_ptr, factor_ptr, j, j < cols, SIGN, QUARTERS)
            tl.store(scale_ptr + j, scale, mask=j < cols)
            note_not_finite(scale, found_ptr, 1, False)
    else:
        merge_parts(
            *(row_parts_ptr, row_sums_ptr, found_ptr, block - col_blocks, across, rows),
            *(INVERSE, SMALLEST, BLOCK_PARTS, BLOCK_SUMS),
        )


@triton.jit
def merge_parts(
    parts_ptr,
    sums_ptr,
    found_ptr,
    block,
    parts,
    size,
    INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    k = block * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)[None, :]
    sums = tl.zeros([1, BLOCK_SUMS], tl.float32)
    for first in tl.range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        inside = (part < parts) & (k < size)
        sums += tl.sum(tl.load(parts_ptr + part.to(tl.int64) * size + k, mask=inside, other=0.0), 0, keep_dims=True)
    if INVERSE:
        sums = tl.where(sums - sums == 0, 1.0 / tl.maximum(sums, SMALLEST), float("nan"))
    note_not_finite(tl.reshape(sums, [BLOCK_SUMS]), found_ptr, 1, True)
    tl.store(sums_ptr + k, sums, mask=k < size)
